"""Token budgets: how many patch tokens stay at each selection stage."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from numbers import Integral, Real

from runtime.errors import TokenBudgetError

# Shares of the patch tokens that stay after stages 0..3, by mean keep ratio over the 12 blocks.
# 0.55 and 0.40 are the configurations of Video Patch Pruning (arXiv:2604.00827), 1.0 is the dense network.
SCHEDULE: dict[float, tuple[float, ...]] = {
    0.40: (0.60, 0.42, 0.294, 0.206),
    0.55: (0.70, 0.56, 0.448, 0.358),
    1.00: (1.00, 1.00, 1.00, 1.00),
}
STAGES = 4


def stage_ratios(keep_ratio: float) -> tuple[float, ...]:
    """Share of patch tokens that stays after each stage, for a mean keep ratio over all blocks.

    Linear between the rows of :data:`SCHEDULE`; below 0.40 the row of 0.40 is scaled down.

    Raises:
        TokenBudgetError: ``keep_ratio`` is not in (0, 1].

    >>> stage_ratios(0.55)
    (0.7, 0.56, 0.448, 0.358)
    >>> stage_ratios(0.2)
    (0.3, 0.21, 0.147, 0.103)
    """
    if not (isinstance(keep_ratio, Real) and 0.0 < keep_ratio <= 1.0):  # NaN fails the comparison
        raise TokenBudgetError(
            f"keep ratio is {keep_ratio}, allowed is a number in (0, 1]. Usual values are 0.40, 0.55 and 1.0 (dense)."
        )
    anchors = sorted(SCHEDULE)
    if keep_ratio <= anchors[0]:
        return tuple(ratio * (keep_ratio / anchors[0]) for ratio in SCHEDULE[anchors[0]])
    upper = next(anchor for anchor in anchors if keep_ratio <= anchor)
    lower = anchors[anchors.index(upper) - 1]
    weight = (keep_ratio - lower) / (upper - lower)
    return tuple(
        a if weight == 0.0 else b if weight == 1.0 else a + weight * (b - a)
        for a, b in zip(SCHEDULE[lower], SCHEDULE[upper], strict=True)
    )


def token_budget(patch_count: int, keep_ratio: float) -> tuple[int, ...]:
    """Tokens kept at each stage: the stage's share of ``patch_count``, rounded down, at least 1.

    Raises:
        TokenBudgetError: ``keep_ratio`` is not in (0, 1].

    >>> token_budget(2040, 0.55), token_budget(2040, 1.0), token_budget(2, 0.1)
    ((1428, 1142, 913, 730), (2040, 2040, 2040, 2040), (1, 1, 1, 1))
    """
    counts = (max(1, math.floor(patch_count * ratio)) for ratio in stage_ratios(keep_ratio))
    return tuple(accumulate(counts, min))  # rounding in the ratios must not undo the nesting


def reset_budget(budget: Sequence[int], patch_count: int) -> tuple[int, ...]:
    """Budget of a frame without a prior: stage 0 keeps every token, the later stages as before."""
    return (patch_count, *(int(count) for count in budget[1:]))


def validate_budget(budget: Sequence[int], patch_count: int, stages: int) -> tuple[int, ...]:
    """Check a budget and return it as a tuple of ints.

    Raises:
        TokenBudgetError: Another number of stages, a count outside 1..N, not an integer, or a stage that keeps
            more than the one before.
    """
    shown = ",".join(str(count) for count in budget)
    if len(budget) != stages:
        raise TokenBudgetError(
            f"token budget {shown} has {len(budget)} counts, the model selects at {stages} stages. "
            f"Give {stages} counts, for example {_example(patch_count, stages)}."
        )
    for stage, count in enumerate(budget):
        if not _is_whole(count):
            raise TokenBudgetError(f"token budget {shown}: {count} at stage {stage} is not an integer.")
        if not 1 <= count <= patch_count:
            raise TokenBudgetError(
                f"token budget {shown}: {count} at stage {stage}, allowed is 1..{patch_count} (the number of patches)."
            )
    counts = tuple(int(count) for count in budget)
    for stage in range(1, stages):
        if counts[stage] > counts[stage - 1]:
            raise TokenBudgetError(
                f"token budget {shown}: stage {stage} keeps {counts[stage]} of the {counts[stage - 1]} tokens of "
                f"stage {stage - 1}. Stages are nested: no count may be larger than the one before."
            )
    return counts


def _is_whole(count: object) -> bool:
    """An integer, or a number with an integer's value; True and False count as neither."""
    if isinstance(count, Integral):
        return not isinstance(count, bool)
    return isinstance(count, Real) and math.isfinite(count) and float(count).is_integer()


def _example(patch_count: int, stages: int) -> str:
    return ",".join(str(count) for count in token_budget(patch_count, 0.55)[:stages])
