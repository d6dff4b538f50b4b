"""How close two answers are where rounding differs: signal-to-noise ratios, and the share of tokens chosen alike."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.errors import BackendError
from runtime.parity import relative_difference


@dataclass(frozen=True)
class Limits:
    """What an engine has to reach against the fp32 reference to pass.

    Attributes:
        sqnr_db: Smallest signal-to-noise ratio of each floating-point tensor, decibels.
        overlap: Smallest share of the tokens that a stage keeps which the reference keeps too, in [0, 1].
        tolerance: Decides instead of these two where it is given: the largest relative difference of each tensor, the
            same tokens being kept up to near-ties.
    """

    sqnr_db: float
    overlap: float
    tolerance: float | None = None

    def __str__(self) -> str:
        if self.tolerance is not None:
            return f"within {self.tolerance:.0e}"
        return f"to {self.sqnr_db:.0f} dB and {self.overlap:.0%} of the same tokens"


# By what the engine computes in; docs/verify.md says what was measured. Nearly all noise comes from tokens that are
# chosen otherwise. 20 dB, a tenth, is where torchao's tests draw the line for int8 against float.
LIMITS = {
    "fp32": Limits(math.inf, 1.0, tolerance=1e-4),
    "tf32": Limits(30.0, 0.98),
    "fp16": Limits(30.0, 0.98),
    "bf16": Limits(20.0, 0.97),
    "fp8": Limits(20.0, 0.97),
    "int8": Limits(20.0, 0.97),
}


def coarsest(*precisions: str) -> str:
    """Of the precisions that a graph and an engine name, the one that is allowed most.

    Raises:
        BackendError: One of them has no limits.

    >>> coarsest("fp32", "bf16"), coarsest("int8", "fp16")
    ('bf16', 'int8')
    """
    unknown = [name for name in precisions if name not in LIMITS]
    if unknown:
        raise BackendError(f"no limits are known for precision {unknown[0]!r}, only for {', '.join(LIMITS)}.")
    return min(precisions, key=lambda name: LIMITS[name].sqnr_db)


def sqnr_db(signal: float, noise: float) -> float:
    """Signal-to-noise ratio of two sums of squares, decibels; infinite without noise.

    >>> sqnr_db(100.0, 1.0), sqnr_db(3.0, 0.0), sqnr_db(0.0, 1.0)
    (20.0, inf, -inf)
    """
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 and math.isfinite(noise) else -math.inf


class Agreement:
    """Sums over frames of one budget, from which the ratios follow for all frames together.

    Attributes:
        differences: Largest relative difference of each tensor in a frame, see
            :func:`runtime.parity.relative_difference`.
        unequal: Tensors that are missing or of another shape, or that differ and are no floating-point numbers.
    """

    def __init__(self) -> None:
        self.differences: dict[str, float] = defaultdict(float)
        self.unequal: set[str] = set()
        self._signal: dict[str, float] = defaultdict(float)
        self._noise: dict[str, float] = defaultdict(float)
        self._alike: Counter[int] = Counter()
        self._kept: Counter[int] = Counter()

    def add(self, got: Mapping[str, NDArray[np.generic]], want: Mapping[str, NDArray[np.generic]]) -> None:
        """Take in one frame of a batch of one.

        State per patch is compared on the patches that both kept for the same number of stages: elsewhere one side
        computed it and the other did not.

        Args:
            got, want: Outputs and next state by name.
        """
        alike = np.ones(0, bool)
        if "kept_stages" in want:
            kept, expected = got["kept_stages"][0], want["kept_stages"][0]
            self._add_choice(kept.astype(np.int64), expected.astype(np.int64), want["tokens_kept"].shape[1])
            alike = kept == expected
        for name, reference in want.items():
            if name in ("kept_stages", "tokens_kept"):
                continue
            if name not in got or got[name].shape != reference.shape:
                self.unequal.add(name)
            elif name.startswith("next_") and reference.shape[1:2] == alike.shape:
                self._add_values(name, got[name][:, alike], reference[:, alike])
            else:
                self._add_values(name, got[name], reference)

    def _add_choice(self, got: NDArray[np.int64], want: NDArray[np.int64], stages: int) -> None:
        before = got.size
        for stage in range(stages):
            one, other = got > stage, want > stage
            if int(other.sum()) < before:  # a stage that keeps all that came to it chooses nothing
                self._alike[stage] += int((one & other).sum())
                self._kept[stage] += max(int(one.sum()), int(other.sum()))
            before = int(other.sum())

    def _add_values(self, name: str, got: NDArray[np.generic], want: NDArray[np.generic]) -> None:
        difference = relative_difference(got, want)
        self.differences[name] = max(self.differences[name], difference)
        if np.issubdtype(want.dtype, np.floating):
            b = want.astype(np.float64)
            finite = np.isfinite(b)
            a, b = got.astype(np.float64)[finite], b[finite]
            self._signal[name] += float(b @ b)
            self._noise[name] += float((a - b) @ (a - b)) if math.isfinite(difference) else math.inf
        elif difference:
            self.unequal.add(name)

    @property
    def sqnr_db(self) -> dict[str, float]:
        """Signal-to-noise ratio of each floating-point tensor, decibels."""
        return {name: sqnr_db(signal, self._noise[name]) for name, signal in self._signal.items()}

    @property
    def overlap(self) -> dict[int, float]:
        """By stage that chose among tokens: share of those kept which both kept, in [0, 1]."""
        return {stage: self._alike[stage] / kept if kept else 1.0 for stage, kept in sorted(self._kept.items())}

    def failures(self, limits: Limits) -> list[str]:
        """What does not reach the limits, in words."""
        noisy = [
            f"{name} has a signal-to-noise ratio of {ratio:.1f} dB (at least {limits.sqnr_db:.0f})"
            for name, ratio in self.sqnr_db.items()
            if ratio < limits.sqnr_db
        ]
        chosen = [
            f"stage {stage} keeps {share:.1%} of the reference's tokens (at least {limits.overlap:.0%})"
            for stage, share in self.overlap.items()
            if share < limits.overlap
        ]
        return (
            chosen
            + noisy
            + [
                f"{name} is missing, of another shape, or differs where the same tokens were kept"
                for name in sorted(self.unequal)
            ]
        )
