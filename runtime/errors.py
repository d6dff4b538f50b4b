"""Everything that can go wrong, as one tree.

    DeployError                     anything below; ``exit_code`` is what the command line ends with
    ├── CheckpointError             a file that is no checkpoint, or whose weights do not fit the model
    ├── ImageSizeError              an image size that the patch grid does not divide
    ├── TokenBudgetError            a token budget that is not 1 <= K <= N, nested, integer
    ├── CalibrationError            a calibration that cannot be made, or does not fit the model; no table is written
    ├── BundleError                 a bundle that cannot be used
    │   ├── BundleIntegrityError    a file is missing or has changed
    │   └── BundleSchemaError       the manifest is not one this version reads
    ├── BackendError                a backend that failed
    │   ├── BackendUnavailableError the backend, provider or device is not there
    │   ├── EngineMismatchError     no built engine covers this GPU, library version or graph
    │   ├── DeviceError             a CUDA call failed
    │   └── StepError               one step failed; the prior is dropped, the stream may go on
    ├── SourceError                 a video source that cannot be opened or read
    │   ├── SourceNotFoundError     nothing there
    │   ├── SourceFormatError       something there, but no video
    │   └── SourceLostError         the source broke off before its end
    ├── SinkError                   a result that cannot be written
    ├── FrameShapeError             a frame that does not have the shape that was agreed
    └── ExportMismatchError         two implementations disagree (exit code 1)

A message names the thing, what it got, what is allowed, and what to do next.
"""

from __future__ import annotations


class DeployError(Exception):
    """Base of every error that a user, a file or a device can cause."""

    exit_code = 2


class CheckpointError(DeployError):
    """A checkpoint that cannot be read, or whose weights do not fit the model."""


class ImageSizeError(DeployError):
    """An image size that the patch size does not divide."""


class TokenBudgetError(DeployError):
    """A token budget outside 1..N, not nested, or not made of integers."""


class CalibrationError(DeployError):
    """A calibration that cannot be made, or whose table does not fit the model; nothing was written."""


class BundleError(DeployError):
    """A bundle that cannot be used."""


class BundleIntegrityError(BundleError):
    """A file of the bundle is missing, or its hash differs from the manifest."""


class BundleSchemaError(BundleError):
    """A manifest that this version does not read."""


class BackendError(DeployError):
    """A backend that failed."""


class BackendUnavailableError(BackendError):
    """A backend, provider or device that is not there; the message says how to get it."""


class EngineMismatchError(BackendError):
    """No engine that was built covers this GPU, library version or graph; the message says what to build."""


class DeviceError(BackendError):
    """A CUDA call failed: no memory left, a lost device, an illegal address."""


class StepError(BackendError):
    """One step failed. The state was dropped; the next step starts without a prior."""


class SourceError(DeployError):
    """A video source that cannot be opened or read."""


class SourceNotFoundError(SourceError):
    """Nothing is at the place that was named."""


class SourceFormatError(SourceError):
    """Something is there, but it is not a video that can be decoded."""


class SourceLostError(SourceError):
    """The source broke off before its end; frames delivered before stay valid."""


class SinkError(DeployError):
    """A result that cannot be written: no permission, no space, a closed pipe."""


class FrameShapeError(DeployError):
    """A frame whose shape or dtype is not the agreed one; the prior is unchanged."""


class ExportMismatchError(DeployError):
    """Two implementations of one step disagree."""

    exit_code = 1
