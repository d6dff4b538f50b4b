"""When the prior must not be carried over."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FIRST_FRAME = "first frame"
SCENE_CUT = "scene cut"
RESOLUTION_CHANGE = "resolution change"
TIME_GAP = "time gap"
FAILED_STEP = "failed step"
NON_FINITE_STATE = "non-finite or empty state"

_RECENT = 5  # differences whose median is the usual one
_CELLS = (9, 16)  # rows and columns of a thumbnail


@dataclass(frozen=True)
class ResetSettings:
    """Limits beyond which a frame does not continue the one before.

    Attributes:
        cut_difference: Mean absolute difference of two thumbnails, in steps of 0..255, after the mean of each colour
            is taken out; above it, and above ``cut_ratio`` times the recent differences, is a cut. On generated
            scenes cuts give 18 and more, everything else 8 and less; real clips without a cut give 4 and less.
        cut_ratio: See there; keeps a fast pan or a flickering light from counting as a series of cuts.
        largest_gap_s: Longest time between two frames.
    """

    cut_difference: float = 12.0
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
        self._differences: deque[float] = deque(maxlen=_RECENT)

    def note(self, reason: str) -> None:
        """Reset at the next frame, for this reason; the first reason of several stays."""
        self._pending = self._pending or reason

    def check(self, thumbnail: NDArray[np.float32], timestamp_s: float, discontinuity: str | None = None) -> str | None:
        """The reason to drop the prior before this frame, or None.

        Args:
            thumbnail: The frame as :func:`thumbnail_of` gives it.
            timestamp_s: Capture time, seconds.
            discontinuity: What the source says about this frame.
        """
        reason = self._pending or discontinuity or self._gap(timestamp_s)
        if reason is not None:
            self._differences.clear()
        elif self._cut(thumbnail):
            reason = SCENE_CUT
        self._pending, self._thumbnail, self._timestamp_s = None, thumbnail, timestamp_s
        return reason

    def _gap(self, timestamp_s: float) -> str | None:
        gap = timestamp_s - self._timestamp_s
        return TIME_GAP if gap > self._settings.largest_gap_s or gap < 0 else None

    def _cut(self, thumbnail: NDArray[np.float32]) -> bool:
        """Whether the picture changed by more than is usual; what follows a cut is measured by the cut itself."""
        if self._thumbnail is None or self._thumbnail.shape != thumbnail.shape:
            return False
        difference = float(np.abs(thumbnail - self._thumbnail).mean())
        usual = float(np.median(self._differences)) if self._differences else 0.0
        is_cut = difference > max(self._settings.cut_difference, self._settings.cut_ratio * usual)
        if is_cut:
            self._differences.clear()
        self._differences.append(difference)
        return is_cut


def thumbnail_of(image: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Means of 9 x 16 cells (fewer if the image is tiny) over every fourth pixel, minus the mean of each colour.

    Args:
        image: uint8 [H, W, 3], without the letterbox's border; of any size.

    Returns:
        float32 [9, 16, 3].
    """
    cells: NDArray[np.generic] = image[::4, ::4]
    edges = [
        np.linspace(0, side, min(side, count) + 1).astype(np.intp)
        for side, count in zip(cells.shape, _CELLS, strict=False)
    ]
    for axis, edge in enumerate(edges):
        cells = np.add.reduceat(cells, edge[:-1], axis=axis, dtype=np.uint32)
    counts = np.outer(np.diff(edges[0]), np.diff(edges[1]))
    means = cells / counts[:, :, None]
    return np.asarray(means - means.mean(axis=(0, 1)), np.float32)
