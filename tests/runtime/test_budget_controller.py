"""The controller against machines made up by hypothesis, on a clock of their own; no test looks at a real one."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from runtime.budget import BudgetRule
from runtime.budget_controller import BudgetController, budget_ladder, percentile_95
from runtime.errors import TokenBudgetError

PATCHES = 2040
RULE = BudgetRule(PATCHES)
LADDER = budget_ladder(RULE, 0.4)
STATIC = [RULE.for_ratio(ratio) for ratio in (0.4, 0.55, 0.7, 1.0)]  # what an engine was built for
DENSE_MS = 300.0
FRAME_RATE = 30.0


def share(budget: tuple[int, ...]) -> float:
    """Mean share of tokens over 12 blocks, the first of which is dense."""
    return (1 + sum(blocks * count / PATCHES for blocks, count in zip((2, 3, 3, 3), budget, strict=True))) / 12


@dataclass
class Machine:
    """Latencies of a device that nobody has seen: ``fixed`` part, growth with the tokens, noise, rare long frames."""

    fixed: float = 0.1
    power: float = 1.2
    noise: float = 0.03
    hiccups: float = 0.0
    seed: int = 0
    slowness: Callable[[float], float] = lambda time_s: 1.0
    time_s: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self._random = np.random.default_rng(self.seed)

    def usual_ms(self, budget: tuple[int, ...]) -> float:
        return DENSE_MS * (self.fixed + (1 - self.fixed) * share(budget) ** self.power)

    def p95_ms(self, budget: tuple[int, ...]) -> float:
        return self.usual_ms(budget) * math.exp(1.645 * self.noise)

    def run(self, budget: tuple[int, ...]) -> float:
        latency_ms = self.usual_ms(budget) * self.slowness(self.time_s)
        latency_ms *= math.exp(self.noise * self._random.standard_normal())
        if self._random.random() < self.hiccups:
            latency_ms *= 1 + 10 * self._random.pareto(1.5)  # a tail without a variance
        self.time_s += max(latency_ms / 1e3, 1 / FRAME_RATE)
        return latency_ms


@dataclass
class Run:
    levels: list[int]
    latencies_ms: list[float]
    times_s: list[float]
    controller: BudgetController

    def met(self, first: int = 50, last: int | None = None) -> float:
        return float(np.mean(np.array(self.latencies_ms[first:last]) <= self.controller.count.target_ms))

    def changes(self, first: int = 0) -> int:
        return sum(a != b for a, b in pairwise(self.levels[first:]))


def simulate(machine: Machine, target_ms: float, frames: int, budgets=LADDER, start: int = 3) -> Run:
    controller = BudgetController(budgets, [share(budget) for budget in budgets], target_ms, start)
    run = Run([], [], [], controller)
    for _ in range(frames):
        budget = controller.budget
        run.levels.append(list(budgets).index(budget))
        run.times_s.append(machine.time_s)
        run.latencies_ms.append(machine.run(budget))
        controller.tally(run.latencies_ms[-1], budget)
        controller.record(run.latencies_ms[-1])
    return run


machines = st.builds(
    Machine,
    fixed=st.floats(0.0, 0.5),
    power=st.floats(0.9, 1.5),
    noise=st.floats(0.0, 0.15),
    hiccups=st.floats(0.0, 0.015),
    seed=st.integers(0, 2**32 - 1),
)
starts = st.integers(0, len(STATIC) - 1)
ladders = st.sampled_from([LADDER, STATIC])


# --- a steady machine -----------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, derandomize=True)
@given(machines, st.floats(0.95, 2.5), ladders, starts)
def test_target_within_reach_is_met_on_95_of_100_frames(machine, generosity, budgets, start):
    target_ms = machine.p95_ms(budgets[0]) * 1.1 * max(generosity, 1.0)
    run = simulate(machine, target_ms, 1500, budgets, start)
    assert run.met() >= 0.95


@settings(max_examples=60, deadline=None, derandomize=True)
@given(machines, st.floats(0.2, 3.0), ladders, starts)
def test_steady_machine_is_left_alone_in_the_end(machine, reach, budgets, start):
    """Each budget that fails is tried again after ever longer: 7 changes in 1000 frames at most, once settled."""
    run = simulate(machine, reach * machine.p95_ms(budgets[0]), 3000, budgets, start)
    assert run.changes(1000) <= 14
    assert run.controller.count.changes == run.changes()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.builds(Machine, fixed=st.floats(0, 0.3), power=st.floats(0.9, 1.5), noise=st.floats(0, 0.02)),
    st.floats(1.05, 2.5),
    ladders,
    starts,
)
def test_quiet_machine_gets_the_largest_budget_that_fits(machine, generosity, budgets, start):
    target_ms = generosity * machine.p95_ms(budgets[0])
    p95s_ms = [machine.p95_ms(budget) for budget in budgets]
    best = max(level for level, p95_ms in enumerate(p95s_ms) if p95_ms <= target_ms)
    assume(all(abs(p95_ms / target_ms - 1) > 0.02 for p95_ms in p95s_ms))  # either answer would be right
    run = simulate(machine, target_ms, 1600, budgets, start)
    assert np.median(run.levels[1000:]) == best


@pytest.mark.parametrize("budgets", [LADDER, STATIC], ids=["free", "static"])
def test_target_between_two_budgets_settles_between_them(budgets):
    machine = Machine()
    target_ms = 0.5 * (machine.p95_ms(RULE.for_ratio(0.4)) + machine.p95_ms(RULE.for_ratio(0.7)))
    run = simulate(machine, target_ms, 400, budgets, start=len(budgets) - 1)
    assert run.met() >= 0.95
    settled = {budgets[level] for level in run.levels[200:]}
    assert RULE.for_ratio(0.4) <= min(settled) and max(settled) < RULE.for_ratio(0.7)


def test_rare_long_frames_that_no_budget_would_mend_do_not_cost_tokens():
    """Four of a hundred frames take twenty times as long, whatever the budget."""
    machine, target_ms = Machine(noise=0.01), 200.0
    random, run = machine.run, np.random.default_rng(5)
    machine.run = lambda budget: random(budget) * (20 if run.random() < 0.04 else 1)  # type: ignore[method-assign]
    best = max(level for level, budget in enumerate(LADDER) if machine.p95_ms(budget) <= target_ms)
    assert np.median(simulate(machine, target_ms, 1500).levels[500:]) == best


# --- a machine that changes -----------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.builds(Machine, fixed=st.floats(0, 0.2), power=st.floats(1.0, 1.4), noise=st.floats(0, 0.05)),
    st.floats(1.4, 1.9),
)
def test_throttling_is_answered_within_a_second_and_then_held(machine, factor):
    """The clock falls at 60 s; a smaller budget follows within a second, or three frames where those take longer."""
    machine.slowness = lambda time_s: factor if time_s >= 60 else 1.0
    target_ms = 0.95 * machine.p95_ms(LADDER[-2])
    assume(factor * machine.p95_ms(LADDER[0]) < 0.85 * target_ms)
    run = simulate(machine, target_ms, 1500)
    (hit,) = [i for i, (a, b) in enumerate(pairwise(run.times_s)) if a < 60 <= b]
    first_slow, before = hit + 1, run.levels[hit]
    assume(factor * machine.usual_ms(LADDER[before]) > 1.1 * target_ms)
    reacted = next(i for i in range(first_slow, len(run.levels)) if run.levels[i] < before)
    assert run.times_s[reacted] - run.times_s[first_slow] <= 1.0 or reacted - first_slow <= 3
    assert run.met(first_slow + 50) >= 0.95


@pytest.mark.parametrize("budgets", [LADDER, STATIC], ids=["free", "static"])
def test_load_in_the_middle_costs_less_than_5_of_100_frames(budgets):
    machine = Machine(noise=0.05, slowness=lambda time_s: 1.6 if 25 < time_s < 50 else 1.0)
    run = simulate(machine, 220.0, 500, budgets)
    assert run.times_s[-1] > 55
    assert run.met() >= 0.95


def test_budget_comes_back_after_the_load():
    machine = Machine(slowness=lambda time_s: 1.7 if 20 < time_s < 40 else 1.0)
    run = simulate(machine, 220.0, 800)
    levels = np.array(run.levels)
    times_s = np.array(run.times_s)
    before, during = (
        np.median(levels[(times_s > 10) & (times_s < 20)]),
        np.median(levels[(times_s > 25) & (times_s < 40)]),
    )
    assert during < before
    assert np.median(levels[times_s > 60]) >= before - 1


@settings(max_examples=40, deadline=None, derandomize=True)
@given(machines, st.lists(st.tuples(st.floats(0, 60), st.floats(0.5, 4.0)), max_size=5), st.floats(0.1, 3.0))
def test_only_budgets_of_the_ladder_are_chosen_whatever_happens(machine, steps, reach):
    """Never below the minimum, never above the maximum; and all frames are counted."""

    def slowness(time_s: float) -> float:
        return math.prod(factor for start_s, factor in steps if time_s >= start_s)

    machine.slowness = slowness
    budgets = budget_ladder(RULE, 0.5, 0.8)
    run = simulate(machine, reach * machine.p95_ms(budgets[0]), 600, budgets)
    count = run.controller.count
    assert set(count.budgets) <= set(budgets) and sum(count.budgets.values()) == count.frames == 600
    assert count.missed == sum(latency > count.target_ms for latency in run.latencies_ms)
    assert count.met == pytest.approx(run.met(0))


# --- out of reach ---------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None, derandomize=True)
@given(machines, st.floats(0.05, 0.9), ladders, starts)
def test_target_out_of_reach_is_said_once_within_100_frames(machine, reach, budgets, start):
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("runtime.budget_controller")
    log.addHandler(handler)
    try:
        target_ms = reach * machine.usual_ms(budgets[0]) * math.exp(-2 * machine.noise)
        run = simulate(machine, target_ms, 100, budgets, start)
        assert len(said) == 1 and f"{target_ms:g} ms is out of reach" in said[0]
        assert ",".join(map(str, budgets[0])) in said[0]
        for _ in range(400):
            run.controller.record(machine.run(run.controller.budget))
    finally:
        log.removeHandler(handler)
    assert len(said) == 1
    assert run.controller.budget == budgets[0]


def test_target_within_reach_is_not_called_out_of_reach(caplog):
    machine = Machine(hiccups=0.01)
    simulate(machine, 1.2 * machine.p95_ms(LADDER[0]), 2000)
    assert not caplog.records


# --- what it takes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target_ms", [0.0, -1.0, math.nan, math.inf])
def test_target_has_to_be_a_positive_time(target_ms):
    with pytest.raises(TokenBudgetError, match="allowed is a number above 0"):
        BudgetController(LADDER, [share(budget) for budget in LADDER], target_ms)


@pytest.mark.parametrize("costs", [[], [1.0], [2.0, 1.0], [1.0, 1.0]])
def test_budgets_have_to_be_of_rising_cost(costs):
    with pytest.raises(TokenBudgetError, match="rising cost"):
        BudgetController(STATIC[:2], costs, 100.0)


@given(st.integers(1, 3000), st.floats(0.01, 1.0), st.floats(0.01, 1.0))
def test_ladder_rises_from_the_smallest_to_the_largest_ratio(patches, one, other):
    smallest, largest = sorted((one, other))
    rule = BudgetRule(patches)
    ladder = budget_ladder(rule, smallest, largest)
    assert ladder[0] == rule.for_ratio(smallest) and ladder[-1] == rule.for_ratio(largest)
    assert all(a != b and all(x <= y for x, y in zip(a, b, strict=True)) for a, b in pairwise(ladder))
    assert len(ladder) <= 22


@pytest.mark.parametrize(("smallest", "largest"), [(0.0, 1.0), (0.4, 1.1), (0.6, 0.5), (math.nan, 1.0)])
def test_ladder_refuses_ratios_that_make_none(smallest, largest):
    with pytest.raises(TokenBudgetError):
        budget_ladder(RULE, smallest, largest)


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=300))
def test_percentile_is_met_by_95_of_100_and_no_smaller_one_is(values):
    p95 = percentile_95(values)
    assert p95 in values
    assert sum(value <= p95 for value in values) >= 0.95 * len(values)
    assert sum(value < p95 for value in values) < 0.95 * len(values)
