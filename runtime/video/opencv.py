"""What only OpenCV reaches: webcams by number and GStreamer pipelines. It is no base dependency and imported here."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import BackendUnavailableError, SourceNotFoundError


def import_cv2(purpose: str) -> Any:
    """OpenCV's module.

    Raises:
        BackendUnavailableError: It is not there; the message names ``purpose`` and says how to get it.
    """
    try:
        import cv2
    except ImportError as error:
        raise BackendUnavailableError(
            f"{purpose} needs OpenCV, which cannot be imported ({error}). pip install opencv-python, "
            "or on a Jetson apt install python3-opencv, whose OpenCV has GStreamer."
        ) from error
    return cv2


class OpenCvCamera:
    """One connection to a webcam or a GStreamer pipeline.

    Args:
        spec: Number of the webcam, or a pipeline that ends in ``appsink``.
        size: Height and width to ask the webcam for, None for its usual ones.
        frame_rate: Frames per second to ask the webcam for.

    Raises:
        BackendUnavailableError: OpenCV is missing, or was built without GStreamer.
        SourceNotFoundError: No camera has this number, or the pipeline does not start.
    """

    def __init__(
        self, spec: int | str, *, size: tuple[int, int] | None = None, frame_rate: float | None = None
    ) -> None:
        self._cv2 = import_cv2("a webcam by number" if isinstance(spec, int) else "a GStreamer pipeline")
        self._capture = self._open_webcam(spec) if isinstance(spec, int) else self._open_pipeline(spec)
        if size is not None:
            self._capture.set(self._cv2.CAP_PROP_FRAME_HEIGHT, size[0])
            self._capture.set(self._cv2.CAP_PROP_FRAME_WIDTH, size[1])
        if frame_rate is not None:
            self._capture.set(self._cv2.CAP_PROP_FPS, frame_rate)
        self.frame_rate: float | None = self._capture.get(self._cv2.CAP_PROP_FPS) or None

    def pictures(self, on_error: Callable[[], None]) -> Generator[tuple[NDArray[np.uint8], float | None], None, None]:
        """Pictures with the time of this computer's clock at which they came."""
        while True:
            is_there, bgr = self._capture.read()
            if not is_there:
                return
            yield self._cv2.cvtColor(bgr, self._cv2.COLOR_BGR2RGB), time.monotonic()

    def missing(self) -> str | None:
        """OpenCV does not say why there are no more pictures."""
        return None

    def close(self) -> None:
        """Give the camera free; may be called twice."""
        self._capture.release()

    def _open_webcam(self, number: int) -> Any:
        capture = self._cv2.VideoCapture(number)
        if not capture.isOpened():
            raise SourceNotFoundError(
                f"{number}: no webcam with this number. Check that it is plugged in and not in use."
            )
        return capture

    def _open_pipeline(self, pipeline: str) -> Any:
        if not _is_built_with(self._cv2, "GStreamer"):
            raise BackendUnavailableError(
                f"this OpenCV ({self._cv2.__version__}) was built without GStreamer, as all from PyPI are. "
                "Uninstall it and use the system's: apt install python3-opencv, in a venv with --system-site-packages."
            )
        capture = self._cv2.VideoCapture(pipeline, self._cv2.CAP_GSTREAMER)
        if not capture.isOpened():
            raise SourceNotFoundError(
                f"{pipeline}: the pipeline does not start. Try it with gst-launch-1.0; it has to end in appsink."
            )
        return capture


def _is_built_with(cv2: Any, part: str) -> bool:
    lines = (line.strip() for line in cv2.getBuildInformation().splitlines())
    return any(line.startswith(f"{part}:") and "YES" in line for line in lines)
