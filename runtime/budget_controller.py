"""Holding a latency target: for every frame the largest token budget whose measured 95th percentile fits.

What a budget costs on this machine, now, is only known by running it. The controller watches the latencies of the
budget in use, and moves along a ladder of budgets:

- down at once, and far enough, when three of the last five frames were late (a load started, the clock fell);
- down by one when four of the last hundred were late by what a smaller budget would mend;
- up when the frames so far say that a larger budget fits with room to spare; or, after a hundred frames, by one if it
  may fit. A budget that then fails is not tried again for a while, and for twice as long after each failure.
"""

from __future__ import annotations

import logging
import math
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING

from runtime.budget import BudgetRule
from runtime.errors import TokenBudgetError

if TYPE_CHECKING:
    from runtime.backend import EngineReport
    from runtime.manifest import Manifest

logger = logging.getLogger(__name__)

Budget = tuple[int, ...]

RATIO_STEP = 0.05
SMALLEST_RATIO = 0.4  # the lowest that accuracy was measured at

_WINDOW = 100  # frames of one budget that are looked back on
_LATE_IN_WINDOW = 4  # of them: one less than 95 % allows, which leaves room for budgets that are tried and fail
_RECENT, _LATE_IN_RECENT = 5, 3
_QUICK_RISE = 20  # frames before a rise with room to spare
_SPARE = 0.9  # of the target
# Latency grows with some power of the cost: 1.0 to 1.4 measured between keep ratios 0.4 and 1 (benchmarks/results),
# less where a part of it is fixed. The largest power that is expected keeps a quick rise safe, the smallest a try bold.
_LARGEST_POWER, _SMALLEST_POWER = 2.0, 0.5
_SURE = 40  # frames that a median is taken over, and before a target is called out of reach
_FASTER = 0.75  # a machine whose median falls below this share of what it was has become another one
_FIRST_WAIT, _LONGEST_WAIT = 200, 1600  # frames before a budget that failed is tried again


@dataclass
class TargetCount:
    """How a latency target was held.

    Attributes:
        target_ms: The target, milliseconds.
        frames: Frames counted.
        missed: Those that took longer.
        missed_without_prior: Those among them that had no prior, which makes a frame slower by nature.
        changes: Changes of the budget.
        budgets: Frames with a prior, by their budget.
    """

    target_ms: float
    frames: int = 0
    missed: int = 0
    missed_without_prior: int = 0
    changes: int = 0
    budgets: Counter[Budget] = field(default_factory=Counter)

    @property
    def met(self) -> float:
        """Share of the frames that met the target; 1 before the first."""
        return 1.0 - self.missed / self.frames if self.frames else 1.0


class BudgetController:
    """Chooses the budget of each frame; see the module.

    Ask for :attr:`budget`, run the frame, give its latency to :meth:`record`.

    Args:
        budgets: To choose from, of rising cost.
        costs: What each is expected to cost, in any unit, e.g. the share of tokens that it computes.
        target_ms: Latency of a frame that 95 of 100 have to meet, milliseconds.
        start: Index of the budget to begin with.

    Raises:
        TokenBudgetError: The target is not positive, or there is nothing to choose from.
    """

    def __init__(self, budgets: Sequence[Budget], costs: Sequence[float], target_ms: float, start: int = 0) -> None:
        if not (math.isfinite(target_ms) and target_ms > 0):
            raise TokenBudgetError(f"latency target is {target_ms} ms, allowed is a number above 0.")
        if not budgets or len(budgets) != len(costs) or any(a >= b for a, b in pairwise(costs)):
            raise TokenBudgetError(f"{len(budgets)} budgets with costs {list(costs)}: they have to be of rising cost.")
        self._budgets, self._costs, self._target_ms = list(budgets), list(costs), target_ms
        self._level = start
        self._latencies: deque[float] = deque(maxlen=_WINDOW)  # at this level, since it was entered
        self._usual_ms: float | None = None  # median of the first of them
        self._ceiling = len(self._budgets)  # not to be reached before ``_retry_at``
        self._frame = self._retry_at = 0
        self._proven = -1  # the level that a rise began at, as long as the new one is on trial
        self._waits: Counter[int] = Counter()  # by level
        self._is_out_of_reach = False
        self.count = TargetCount(target_ms)

    @property
    def budget(self) -> Budget:
        """What the next frame with a prior may use."""
        return self._budgets[self._level]

    @property
    def budgets(self) -> tuple[Budget, ...]:
        """All that it may choose."""
        return tuple(self._budgets)

    def tally(self, latency_ms: float, budget: Budget | None) -> bool:
        """Count one frame, without a prior if ``budget`` is None; True if it missed the target."""
        is_missed = latency_ms > self._target_ms
        self.count.frames += 1
        self.count.missed += is_missed
        if budget is None:
            self.count.missed_without_prior += is_missed
        else:
            self.count.budgets[budget] += 1
        return is_missed

    def record(self, latency_ms: float) -> None:
        """Learn from one latency at :attr:`budget`; leave out frames without a prior, which have another."""
        self._frame += 1
        self._latencies.append(latency_ms)
        self._notice_a_faster_machine()
        if (slow_ms := self._shifted_ms()) is not None:
            self._fall(self._largest_within(slow_ms, _SPARE * self._target_ms, power=1.0, below=self._level))
        elif self._mendable() >= _LATE_IN_WINDOW:
            self._fall(self._level - 1)
        elif (level := self._level_to_rise_to()) > self._level:
            self._proven = self._level
            self._enter(level)
        self._warn_once()

    def _late(self, latencies: Sequence[float]) -> int:
        return sum(latency > self._target_ms for latency in latencies)

    def _shifted_ms(self) -> float | None:
        """The usual latency of the last frames, if most of them were late."""
        recent = list(self._latencies)[-_RECENT:]
        late = [latency for latency in recent if latency > self._target_ms]
        return median(late) if len(late) >= _LATE_IN_RECENT else None

    def _mendable(self) -> int:
        """Late frames that the smallest budget would have brought in time; the others are not the budget's fault."""
        return sum(self._target_ms < latency <= self._mend_limit_ms for latency in self._latencies)

    @property
    def _mend_limit_ms(self) -> float:
        return self._target_ms * self._costs[self._level] / self._costs[0]

    def _level_to_rise_to(self) -> int:
        seen = len(self._latencies)
        if seen < _QUICK_RISE or self._late(self._latencies) > max(1, seen // 20):
            return self._level
        limit = len(self._budgets) if self._frame >= self._retry_at else self._ceiling
        p95_ms = percentile_95([latency for latency in self._latencies if latency <= self._mend_limit_ms])
        quick = self._largest_within(p95_ms, _SPARE * self._target_ms, power=_LARGEST_POWER, below=limit)
        is_next_worth_a_try = seen == _WINDOW and self._level + 1 < limit
        if quick <= self._level and is_next_worth_a_try:
            return self._largest_within(p95_ms, self._target_ms, power=_SMALLEST_POWER, below=self._level + 2)
        return quick

    def _largest_within(self, latency_ms: float, limit_ms: float, *, power: float, below: int) -> int:
        """The largest level under ``below`` that is expected to take no longer than ``limit_ms``, else 0."""
        own = self._costs[self._level]
        fitting = (level for level in range(below) if latency_ms * (self._costs[level] / own) ** power <= limit_ms)
        return max(fitting, default=0)

    def _fall(self, level: int) -> None:
        if self._level == 0:
            return
        self._waits[self._level] = min(max(2 * self._waits[self._level], _FIRST_WAIT), _LONGEST_WAIT)
        self._ceiling, self._retry_at = self._level, self._frame + self._waits[self._level]
        is_on_trial = len(self._latencies) < _WINDOW
        self._enter(max(level, self._proven) if is_on_trial else level)
        self._proven = -1

    def _enter(self, level: int) -> None:
        logger.debug("frame %d: budget %s -> %s", self._frame, self.budget, self._budgets[level])
        self._level = level
        self.count.changes += 1
        self._latencies.clear()
        self._usual_ms = None

    def _notice_a_faster_machine(self) -> None:
        """What failed on a slower machine may be tried again."""
        if len(self._latencies) < _SURE:
            return
        now_ms = median(list(self._latencies)[-_SURE:])
        if self._usual_ms is not None and now_ms < _FASTER * self._usual_ms:
            self._retry_at = self._frame
            self._waits.clear()
            self._usual_ms = None
        self._usual_ms = self._usual_ms or now_ms

    def _warn_once(self) -> None:
        seen = len(self._latencies)
        if self._level or self._is_out_of_reach or seen < _SURE or self._late(self._latencies) <= max(2, seen // 20):
            return
        self._is_out_of_reach = True
        logger.warning(
            "the latency target of %g ms is out of reach: with the smallest budget, %s tokens, 95 of 100 frames take "
            "up to %.1f ms. The stream goes on with it. Allow fewer tokens, more time, or a smaller picture.",
            self._target_ms,
            ",".join(map(str, self.budget)),
            percentile_95(self._latencies),
        )


def percentile_95(values: Sequence[float]) -> float:
    """The smallest value that 95 of 100 do not exceed; infinite if there is none.

    >>> percentile_95(range(1, 101)), percentile_95([7.0])
    (95, 7.0)
    """
    ranked = sorted(values)
    return ranked[math.ceil(0.95 * len(ranked)) - 1] if ranked else math.inf


def budget_ladder(rule: BudgetRule, smallest_ratio: float, largest_ratio: float = 1.0) -> list[Budget]:
    """Budgets from one mean keep ratio to another in steps of :data:`RATIO_STEP`; those that are equal appear once.

    Raises:
        TokenBudgetError: A ratio is outside (0, 1], or the smallest is above the largest.
    """
    rule.for_ratio(smallest_ratio), rule.for_ratio(largest_ratio)  # both are checked before any step is counted
    if smallest_ratio > largest_ratio:
        raise TokenBudgetError(
            f"the smallest keep ratio is {smallest_ratio}, above the largest of {largest_ratio}. Exchange them."
        )
    steps = math.floor((largest_ratio - smallest_ratio) / RATIO_STEP + 1e-9)
    ratios = [min(smallest_ratio + step * RATIO_STEP, largest_ratio) for step in range(steps + 1)]
    return list(dict.fromkeys(rule.for_ratio(ratio) for ratio in [*ratios, largest_ratio]))


def controller_for(
    manifest: Manifest,
    report: EngineReport,
    target_ms: float,
    smallest_ratio: float | None = None,
    largest_ratio: float | None = None,
) -> BudgetController:
    """The controller of a model on an engine; it begins at the bundle's default preset.

    Args:
        manifest: The model's.
        report: The engine's: between the two ratios it takes any budget, or those that it was built for.
        target_ms: Latency that 95 of 100 frames have to meet, milliseconds.
        smallest_ratio: Mean keep ratio that is not gone below; None takes :data:`SMALLEST_RATIO`.
        largest_ratio: The largest; None takes 1.

    Raises:
        TokenBudgetError: The target or a ratio is out of range, or the graph or the engine leaves no choice.
    """
    if manifest.graph.selection != "budget":
        raise TokenBudgetError(
            f"{manifest.graph.file} was exported with selection {manifest.graph.selection!r}, which takes no token "
            "budget, so no latency target can be held. Export with --selection budget."
        )
    rule = manifest.budget_rule
    smallest = SMALLEST_RATIO if smallest_ratio is None else smallest_ratio
    budgets = budget_ladder(rule, smallest, 1.0 if largest_ratio is None else largest_ratio)
    if report.budgets is not None:
        low, high = manifest.mean_share(budgets[0]), manifest.mean_share(budgets[-1])
        budgets = [budget for budget in report.budgets if low <= manifest.mean_share(budget) <= high]
        if not budgets:
            raise TokenBudgetError(
                f"none of the budgets that this engine was built for lies within keep ratios {smallest} to "
                f"{largest_ratio or 1.0}. Build it for one, or move the limits."
            )
    costs = {budget: manifest.mean_share(budget) for budget in budgets}
    rising = sorted({cost: budget for budget, cost in costs.items()}.items())
    default = manifest.mean_share(manifest.presets[manifest.default_preset])
    start = sum(cost <= default for cost, _ in rising) - 1
    return BudgetController([budget for _, budget in rising], [cost for cost, _ in rising], target_ms, max(start, 0))
