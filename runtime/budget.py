"""Token budgets: how many patch tokens stay at each selection stage."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
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
# The same means (0.413 and 0.542) for a selector that sees the picture alone and starts at block 3, as SViT and
# DynamicViT do: r, r^2, r^3 at its three stages.
LATE_SCHEDULE: dict[float, tuple[float, ...]] = {
    0.40: (1.00, 0.4246, 0.1803, 0.0766),
    0.55: (1.00, 0.5973, 0.3568, 0.2131),
    1.00: (1.00, 1.00, 1.00, 1.00),
}
STAGES = 4


def stage_ratios(keep_ratio: float, first_stage: int = 0) -> tuple[float, ...]:
    """Share of patch tokens that stays after each stage, for a mean keep ratio over all blocks.

    Linear between the rows of :data:`SCHEDULE`; below 0.40 the row of 0.40 is scaled down.

    Args:
        first_stage: 0, or 1 for a selector that leaves stage 0 out (:data:`LATE_SCHEDULE`).

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
    schedule = LATE_SCHEDULE if first_stage else SCHEDULE
    anchors = sorted(schedule)
    if keep_ratio <= anchors[0]:
        scaled = (ratio * (keep_ratio / anchors[0]) for ratio in schedule[anchors[0]][first_stage:])
        return (1.0,) * first_stage + tuple(scaled)
    upper = next(anchor for anchor in anchors if keep_ratio <= anchor)
    lower = anchors[anchors.index(upper) - 1]
    weight = (keep_ratio - lower) / (upper - lower)
    return tuple(
        a if weight == 0.0 else b if weight == 1.0 else a + weight * (b - a)
        for a, b in zip(schedule[lower], schedule[upper], strict=True)
    )


def token_budget(patch_count: int, keep_ratio: float, first_stage: int = 0, joined_tokens: int = 0) -> tuple[int, ...]:
    """Tokens kept at each stage: the stage's share of ``patch_count``, rounded down to a multiple of
    :func:`token_multiple`, at least 1. A stage that drops none keeps a ``patch_count`` of any size.

    Args:
        joined_tokens: Others that the blocks after the last stage compute with those kept there, such as queries: the
            sum of both is the multiple.

    Raises:
        TokenBudgetError: ``keep_ratio`` is not in (0, 1].

    >>> token_budget(2040, 0.55), token_budget(2040, 0.40, joined_tokens=50), token_budget(2, 0.1)
    ((1424, 1136, 912, 720), (1216, 848, 592, 414), (1, 1, 1, 1))
    """
    multiple, ratios = token_multiple(patch_count), stage_ratios(keep_ratio, first_stage)
    joined = (0,) * (len(ratios) - 1) + (joined_tokens,)
    counts = (
        patch_count if ratio == 1.0 else _rounded_down(math.floor(patch_count * ratio), others, multiple)
        for ratio, others in zip(ratios, joined, strict=True)
    )
    return tuple(accumulate(counts, min))  # rounding must not undo the nesting


def token_multiple(patch_count: int) -> int:
    """Token counts are multiples of this: the largest power of two within a hundredth of the patches, 2 to 16.

    Backends compute tokens in tiles, and share them among threads in equal parts. Attention to 598 tokens ran at 108 of
    10^9 multiply-accumulates a second in OpenVINO fp32, to 592 at 118; with 599, a prime, a step of vpp-eo-tiny took 3
    to 5 % longer than with 598 (two threads, AVX-512).

    >>> [token_multiple(patches) for patches in (60, 240, 960, 2040, 10_000)]
    [2, 2, 8, 16, 16]
    """
    return 1 << min(4, max(1, (patch_count // 100).bit_length() - 1))


def _rounded_down(share: int, others: int, multiple: int) -> int:
    """Most tokens within a share that make a multiple with the others; the share, or 1, if there are none."""
    count = (share + others) // multiple * multiple - others
    return count if count >= 1 else max(1, share)


def reset_budget(budget: Sequence[int], patch_count: int, stages: int = 1) -> tuple[int, ...]:
    """Budget of a frame without a prior: the first ``stages`` keep every token, the later ones as before."""
    return (patch_count,) * stages + tuple(int(count) for count in budget[stages:])


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


@dataclass(frozen=True)
class BudgetRule:
    """Which budgets a network takes, and which it uses when.

    Attributes:
        patch_count: Patch tokens N of one image.
        stages: Selection stages.
        first_stage: The first stage that drops tokens; the ones before it keep all.
        reset_stages: Stages that keep all on a frame without a prior: the first as published, every one where pruned
            tokens take their features from the frame before.
        joined_tokens: Others that the blocks after the last stage compute, see :func:`token_budget`.
    """

    patch_count: int
    stages: int = STAGES
    first_stage: int = 0
    reset_stages: int = 1
    joined_tokens: int = 0

    def for_ratio(self, keep_ratio: float) -> tuple[int, ...]:
        """The budget of a mean keep ratio over all blocks.

        Raises:
            TokenBudgetError: ``keep_ratio`` is not in (0, 1].
        """
        return token_budget(self.patch_count, keep_ratio, self.first_stage, self.joined_tokens)

    def at_reset(self, budget: Sequence[int]) -> tuple[int, ...]:
        """What a frame without a prior uses instead."""
        return reset_budget(budget, self.patch_count, self.reset_stages)

    @property
    def smallest(self) -> tuple[int, ...]:
        """One token wherever tokens are dropped."""
        return (self.patch_count,) * self.first_stage + (1,) * (self.stages - self.first_stage)

    @property
    def largest(self) -> tuple[int, ...]:
        """Every token at every stage."""
        return (self.patch_count,) * self.stages

    def checked(self, budget: Sequence[int]) -> tuple[int, ...]:
        """The budget as integers.

        Raises:
            TokenBudgetError: As :func:`validate_budget`; or a stage before ``first_stage`` keeps less than all.
        """
        counts = validate_budget(budget, self.patch_count, self.stages)
        if any(count < self.patch_count for count in counts[: self.first_stage]):
            raise TokenBudgetError(
                f"token budget {','.join(map(str, counts))}: this network drops no token before stage "
                f"{self.first_stage}; the counts before that have to be {self.patch_count}."
            )
        return counts


def _is_whole(count: object) -> bool:
    """An integer, or a number with an integer's value; True and False count as neither."""
    if isinstance(count, Integral):
        return not isinstance(count, bool)
    return isinstance(count, Real) and math.isfinite(count) and float(count).is_integer()


def _example(patch_count: int, stages: int) -> str:
    return ",".join(str(count) for count in token_budget(patch_count, 0.55)[:stages])
