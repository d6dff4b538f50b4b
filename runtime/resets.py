"""When the prior must not be carried over."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FIRST_FRAME = "first frame"
SCENE_CUT = "scene cut"
RESOLUTION_CHANGE = "resolution change"
TIME_GAP = "time gap"
FAILED_STEP = "failed step"
NON_FINITE_STATE = "non-finite or empty state"


@dataclass(frozen=True)
class ResetSettings:
    """Limits beyond which a frame does not continue the one before.

    Attributes:
        cut_difference: Mean absolute difference of two thumbnails, in grey levels of 0..255, after the change of the
            mean brightness is taken out; above it, and above ``cut_ratio`` times the recent differences, is a cut.
        cut_ratio: See there; keeps a fast pan from counting as a series of cuts.
        largest_gap_s: Longest time between two frames.
    """

    cut_difference: float = 22.0
    cut_ratio: float = 3.0
    largest_gap_s: float = 1.0


class ResetDetector:
    """Tells for each frame whether, and why, it has to start without a prior.

    A failed step or an unusable state is noted with :meth:`note` and takes effect at the next frame.
    """

    def __init__(self, settings: ResetSettings | None = None) -> None:
        self._settings = settings or ResetSettings()
        self._pending: str | None = FIRST_FRAME
        self._thumbnail: NDArray[np.float32] | None = None
        self._timestamp_s = 0.0
        self._usual_difference = 0.0

    def note(self, reason: str) -> None:
        """Reset at the next frame, for this reason; the first reason of several stays."""
        self._pending = self._pending or reason

    def check(self, image: NDArray[np.uint8], timestamp_s: float, discontinuity: str | None = None) -> str | None:
        """The reason to drop the prior before this frame, or None.

        Args:
            image: uint8 [H, W, 3], letterboxed.
            timestamp_s: Capture time, seconds.
            discontinuity: What the source says about this frame.
        """
        thumbnail = _thumbnail(image)
        reason = self._pending or discontinuity or self._gap(timestamp_s) or self._cut(thumbnail)
        if reason is not None:
            self._usual_difference = 0.0
        self._pending, self._thumbnail, self._timestamp_s = None, thumbnail, timestamp_s
        return reason

    def _gap(self, timestamp_s: float) -> str | None:
        gap = timestamp_s - self._timestamp_s
        return TIME_GAP if gap > self._settings.largest_gap_s or gap < 0 else None

    def _cut(self, thumbnail: NDArray[np.float32]) -> str | None:
        if self._thumbnail is None or self._thumbnail.shape != thumbnail.shape:
            return None
        difference = float(np.abs(thumbnail - self._thumbnail).mean())
        usual = self._usual_difference
        self._usual_difference = difference if usual == 0.0 else 0.8 * usual + 0.2 * difference
        limit = max(self._settings.cut_difference, self._settings.cut_ratio * usual)
        return SCENE_CUT if difference > limit else None


def _thumbnail(image: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Green channel in cells of 32 x 32 pixels, each the mean of 64 samples, minus the mean of all."""
    rows, columns = (max(1, side // 32) for side in image.shape[:2])
    samples = image[: rows * 32 : 4, : columns * 32 : 4, 1].astype(np.float32)
    height, width = samples.shape[0] // rows, samples.shape[1] // columns
    cells = samples[: rows * height, : columns * width].reshape(rows, height, columns, width).mean(axis=(1, 3))
    return np.asarray(cells - cells.mean(), np.float32)
