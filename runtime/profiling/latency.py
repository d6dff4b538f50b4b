"""How long a step takes at each budget; all rows of one run take turns, so that a drifting machine touches all."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from runtime.backend import Engine
from runtime.budget import BudgetRule

BLOCK = 5  # measured steps of a row before the next row's turn
STABLE = 0.03  # warm once the median of a block differs by less from that of the block before, in every row
WARM_UP_BLOCKS = 6  # then measuring starts, stable or not

Task = Callable[[], object]


@dataclass(frozen=True)
class Distribution:
    """How a time varies, milliseconds.

    Attributes:
        p50, p90, p99, max: Percentiles and the longest.
        jitter: Mean change from one step to the next.
    """

    p50: float
    p90: float
    p99: float
    max: float
    jitter: float

    @classmethod
    def of(cls, times: NDArray[np.float64]) -> Distribution:
        """Of at least one time.

        >>> Distribution.of(np.array([2.0, 4.0, 3.0]))
        Distribution(p50=3.0, p90=3.8, p99=3.98, max=4.0, jitter=1.5)
        """
        jitter = float(np.abs(np.diff(times)).mean()) if len(times) > 1 else 0.0
        percentiles = (float(value) for value in np.percentile(times, (50, 90, 99, 100)))
        return cls(*(round(value, 3) for value in (*percentiles, jitter)))


@dataclass
class Turns:
    """What :func:`measure_in_turn` saw.

    Attributes:
        times_ms: By row, in the order in which the steps ran, milliseconds.
        started_s: When each of them started, seconds on the clock of ``time.perf_counter``.
        warm_up: Steps of each row before that.
        stable: Whether the warm-up ended because the times no longer changed.
    """

    times_ms: dict[str, list[float]] = field(default_factory=dict)
    started_s: dict[str, list[float]] = field(default_factory=dict)
    warm_up: int = 0
    stable: bool = False


def stepper(engine: Engine, budget: tuple[int, ...] | None, rule: BudgetRule, batch: int = 1) -> Task:
    """One step of a new stream of this budget, or of a batch of them, that has a prior."""
    buffers = engine.open_stream(batch, budget)
    rng = np.random.default_rng(0)
    buffers.image[:] = rng.integers(0, 256, buffers.image.shape, np.uint8)
    buffers.run(None if budget is None else rule.at_reset(budget))
    buffers.commit()

    def step() -> None:
        buffers.run(budget)
        buffers.commit()

    return step


def measure_in_turn(tasks: Mapping[str, Task], steps: int, warm_up: int | None, on_step: Task) -> Turns:
    """Run every task in blocks, in turn.

    Args:
        steps: Measured steps of each task.
        warm_up: Steps of each before that; None: until their times are stable, see :data:`STABLE`.
        on_step: Called after each step.
    """
    turns = Turns({name: [] for name in tasks}, {name: [] for name in tasks})
    _warm_up(tasks, warm_up, on_step, turns)
    for start in range(0, steps, BLOCK):
        for name, task in tasks.items():
            started, times = run_block(task, min(BLOCK, steps - start), on_step)
            turns.started_s[name] += started
            turns.times_ms[name] += times
    return turns


def run_block(task: Task, steps: int, on_step: Task) -> tuple[list[float], list[float]]:
    """Starts (seconds) and times (milliseconds) of some steps.

    One step more runs first, which finds the caches as another row left them: it is not counted.
    """
    started, times = [], []
    task()
    for _ in range(steps):
        started.append(time.perf_counter())
        task()
        times.append((time.perf_counter() - started[-1]) * 1e3)
        on_step()
    return started, times


def _warm_up(tasks: Mapping[str, Task], warm_up: int | None, on_step: Task, turns: Turns) -> None:
    sizes = [BLOCK] * WARM_UP_BLOCKS if warm_up is None else [warm_up] * (warm_up > 0)
    before: dict[str, float] = {}
    for size in sizes:
        medians = {name: float(np.median(run_block(task, size, on_step)[1])) for name, task in tasks.items()}
        turns.warm_up += size
        turns.stable = bool(before) and all(abs(medians[name] / before[name] - 1) < STABLE for name in medians)
        if turns.stable:
            return
        before = medians
