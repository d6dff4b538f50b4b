"""What values a tensor takes, over many frames, and how large a range of them a code should cover."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

BINS = 2048
LEVELS = 128  # of int8 on one side of zero
PERCENTILE = 99.99
CANDIDATE_STEP = 8  # bins between two ranges that method entropy tries


class Histogram:
    """Counts of absolute values, in bins of one width that doubles when a larger value comes.

    Two old bins make one new one exactly, so the counts do not depend on the order of the frames.

    Attributes:
        counts: int64 [BINS].
        reach: Upper end of the last bin; a power of two.
        largest: The largest absolute value.
    """

    def __init__(self) -> None:
        self.counts = np.zeros(BINS, np.int64)
        self.reach = 2.0**-20
        self.largest = 0.0

    def add(self, values: NDArray[np.floating]) -> None:
        """Count the values of a tensor.

        Raises:
            ValueError: One of them is NaN or infinite.
        """
        sizes = np.abs(values, dtype=np.float32).ravel()
        largest = float(sizes.max(initial=0.0))
        if not np.isfinite(largest):
            raise ValueError("a value is NaN or infinite")
        self.largest = max(self.largest, largest)
        while self.largest >= self.reach:
            self._double()
        bins = (sizes * np.float32(BINS / self.reach)).astype(np.int32)
        self.counts += np.bincount(bins, minlength=BINS)

    def _double(self) -> None:
        self.counts[: BINS // 2] = self.counts.reshape(-1, 2).sum(axis=1)
        self.counts[BINS // 2 :] = 0
        self.reach *= 2

    def merge(self, other: Histogram) -> None:
        """Add the counts of another one, which this changes to the same reach."""
        self.largest = max(self.largest, other.largest)
        while self.reach < other.reach:
            self._double()
        while other.reach < self.reach:
            other._double()
        self.counts += other.counts

    def share_beyond(self, limit: float) -> float:
        """Share of the values in bins that lie wholly beyond ``limit``, in [0, 1]."""
        first = int(np.ceil(limit / self.reach * BINS))
        return float(self.counts[first:].sum() / max(1, self.counts.sum()))


def largest_value(histogram: Histogram) -> float:
    """Method ``minmax``: nothing is cut off."""
    return histogram.largest


def percentile_value(histogram: Histogram, percentile: float) -> float:
    """Method ``percentile``: this many percent of the values lie within, up to the width of a bin."""
    cumulative = np.cumsum(histogram.counts)
    last = int(np.searchsorted(cumulative, percentile / 100 * cumulative[-1]))
    return min(histogram.largest, (last + 1) * histogram.reach / BINS)


def entropy_value(histogram: Histogram) -> float:
    """Method ``entropy``: the range whose int8 codes tell most of the distribution.

    For each candidate the values beyond it are counted at its end, the rest is laid into 128 levels, and the candidate
    with the smallest Kullback-Leibler divergence of the two distributions wins (Migacz, "8-bit Inference with
    TensorRT", GTC 2017).
    """
    counts = histogram.counts.astype(np.float64)
    used = int(np.flatnonzero(counts)[-1]) + 1
    candidates = range(used, min(LEVELS, used) - 1, -CANDIDATE_STEP)
    best = min(candidates, key=lambda length: _divergence(counts[:used], length))
    return min(histogram.largest, best * histogram.reach / BINS)


def _divergence(counts: NDArray[np.float64], length: int) -> float:
    """Kullback-Leibler divergence of the first ``length`` bins, the rest counted at their end, from their levels."""
    inside = counts[:length]
    reference = inside.copy()
    reference[-1] += counts[length:].sum()
    level = np.arange(length) * LEVELS // length
    filled = inside > 0
    totals = np.bincount(level, inside, LEVELS)
    bins = np.bincount(level, filled, LEVELS)
    levelled = np.where(filled, totals[level] / np.maximum(bins[level], 1), 0.0)
    p, q = reference / reference.sum(), levelled / max(levelled.sum(), 1e-300)
    used = p > 0
    return float(np.sum(p[used] * np.log(p[used] / np.maximum(q[used], 1e-12))))


METHODS: dict[str, Callable[[Histogram], float]] = {
    "minmax": largest_value,
    "entropy": entropy_value,
    "percentile": lambda histogram: percentile_value(histogram, PERCENTILE),
}
