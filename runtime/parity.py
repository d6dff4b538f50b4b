"""How two implementations of one step are compared: what was kept first, then values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.errors import ExportMismatchError

TIE_MARGIN = 1e-5  # of the largest score: closer to the deciding score than this, two implementations may differ


@dataclass(frozen=True)
class FrameParity:
    """Agreement on one frame.

    Attributes:
        differences: Relative difference ``max|a - b| / max|b|`` of each tensor.
        near_ties: Tokens chosen differently, each with a score within the margin of the deciding one.
    """

    differences: dict[str, float]
    near_ties: int

    @property
    def worst(self) -> float:
        """The largest relative difference."""
        return max(self.differences.values(), default=0.0)


def relative_difference(got: NDArray[np.generic], want: NDArray[np.generic]) -> float:
    """``max|got - want| / max|want|`` over the finite values; infinite where NaN or infinity is not met by the same."""
    a, b = got.astype(np.float64), want.astype(np.float64)
    finite = np.isfinite(b)
    if not np.isfinite(a[finite]).all() or not np.array_equal(a[~finite], b[~finite], equal_nan=True):
        return float("inf")
    a, b = a[finite], b[finite]
    largest = np.abs(b).max(initial=0.0)
    difference = np.abs(a - b).max(initial=0.0)
    return float(difference / largest) if largest > 0 else float(difference)


def undecided(scores: NDArray[np.float32], kept: int | None) -> NDArray[np.bool_]:
    """Tokens [N] whose score lies within the margin of the one that decides.

    Args:
        scores: float [N], NaN for tokens that the stage did not choose from, infinite for those that it had to keep.
        kept: Tokens that the stage keeps; None if it keeps all scores of 0 and more.
    """
    valid = np.sort(scores[~np.isnan(scores)])[::-1]
    if len(valid) == 0 or (kept is not None and kept >= len(valid)):
        return np.zeros(scores.shape, bool)
    deciding = valid[kept - 1] if kept is not None else np.float32(0)
    if np.isinf(deciding):  # only what had to be kept was
        return np.zeros(scores.shape, bool)
    near: NDArray[np.bool_] = np.abs(scores - deciding) <= TIE_MARGIN * np.abs(valid[np.isfinite(valid)]).max()
    return near


def count_near_ties(
    got: NDArray[np.int64],
    want: NDArray[np.int64],
    scores: Sequence[NDArray[np.float32]],
    budget: Sequence[int],
    tied_match: bool = False,
) -> int:
    """Tokens of one image that two implementations kept for another number of stages.

    At the first stage with a difference every token that differs has to be a near-tie. What follows from that choice
    is excused: the later stages scored other tokens.

    Args:
        got: kept stages int64 [N]; ``want`` likewise.
        scores: Per stage, the reference's scores [N]; NaN where the stage had no token to choose.
        budget: Tokens kept at each stage; stages beyond its length keep scores of 0 and more.
        tied_match: Map-SM found two keys equally similar to some token, so its scores are open themselves.

    Raises:
        ExportMismatchError: A token differs that is no near-tie.
    """
    different = np.flatnonzero(got != want)
    if len(different) == 0 or tied_match:
        return len(different)
    stage = int(np.minimum(got, want)[different].min())
    here = different[np.minimum(got, want)[different] == stage]
    open_tokens = undecided(scores[stage], budget[stage] if stage < len(budget) else None)
    wrong = here[~open_tokens[here]]
    if len(wrong):
        raise ExportMismatchError(
            f"{len(wrong)} tokens are chosen differently at stage {stage} although their scores are no near-ties; "
            f"the first is token {wrong[0]}, kept for {got[wrong[0]]} stages instead of {want[wrong[0]]}. "
            "Look at the state that went in, then at the scores."
        )
    return len(different)


def compare_frame(
    got: Mapping[str, NDArray[np.generic]],
    want: Mapping[str, NDArray[np.generic]],
    scores: Sequence[NDArray[np.float32]],
    budget: Sequence[int],
    tolerance: float,
    tied_match: bool = False,
    explained: Mapping[str, float] | None = None,
) -> FrameParity:
    """Compare one frame of a batch of one.

    Args:
        got, want: Outputs and next state by name.
        scores: The reference's scores [1, N] of each stage.
        budget: Tokens kept at each stage, by score.
        tolerance: Largest relative difference of floating-point tensors; others have to be equal.
        tied_match: See :func:`count_near_ties`.
        explained: What is allowed beyond the tolerance, by name: how far near-ties inside the network move a tensor.

    Raises:
        ExportMismatchError: Another choice of tokens, or a value beyond the tolerance.
    """
    ties = 0
    if "kept_stages" in got:
        kept = got["kept_stages"][0].astype(np.int64), want["kept_stages"][0].astype(np.int64)
        ties = count_near_ties(*kept, [stage[0] for stage in scores], budget, tied_match)
    differences = {}
    for name, expected in want.items():
        if name in ("kept_stages", "tokens_kept"):
            continue
        if name not in got:
            raise ExportMismatchError(f"{name} is missing; there are {', '.join(got)}")
        if got[name].shape != expected.shape:
            raise ExportMismatchError(f"{name} has shape {got[name].shape}, expected {expected.shape}")
        difference = relative_difference(got[name], expected)
        differences[name] = difference
        allowed = tolerance + (explained or {}).get(name, 0.0) if np.issubdtype(expected.dtype, np.floating) else 0.0
        if difference > allowed:
            raise ExportMismatchError(
                f"{name} differs by {difference:.1e} of its largest value (allowed {allowed:.0e}). "
                "The kept tokens agree, so look at the arithmetic after the gather."
            )
    return FrameParity(differences, ties)
