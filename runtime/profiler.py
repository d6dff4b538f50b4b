"""How long a bundle takes: the whole step, per token budget, against the dense network in the same run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.backend import Engine, StreamBuffers, load_engine
from runtime.budget import BudgetRule
from runtime.bundle import Bundle
from runtime.stream import Stream
from runtime.video.frame import Frame

BLOCK = 5  # measured steps of a row before the next row's turn


@dataclass(frozen=True)
class LatencyRow:
    """Step latency at one budget.

    Attributes:
        name: ``dense`` for the graph without selection, else ``keep`` with the preset's name.
        token_budget: Tokens kept at each stage; None for the dense graph.
        p50_ms, p90_ms, p99_ms: Percentiles of the step: image in host memory to results in host memory.
        speed_up: Dense median over this median, both from this run; None where there is no dense graph.
    """

    name: str
    token_budget: tuple[int, ...] | None
    p50_ms: float
    p90_ms: float
    p99_ms: float
    speed_up: float | None


@dataclass(frozen=True)
class Profile:
    """Everything that one profile run measured.

    Attributes:
        engine: What it ran on.
        image_size: (height, width), pixels.
        steps: Measured steps per row; ``warm_up`` more ran before.
        rows: One per budget.
        stages_ms: Median of each part of the pipeline at the default budget, milliseconds.
    """

    engine: str
    image_size: tuple[int, int]
    steps: int
    warm_up: int
    rows: tuple[LatencyRow, ...]
    stages_ms: dict[str, float]

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


def profile_bundle(
    bundle: Bundle,
    *,
    backend: str,
    threads: int = 0,
    precision: str | None = None,
    steps: int = 30,
    warm_up: int = 5,
    presets: Sequence[str] | None = None,
    frames: Iterator[Frame] | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> Profile:
    """Measure all presets and the dense graph, taking turns, so that a drifting machine touches all alike.

    Args:
        threads: CPU threads of one step; 0 leaves it to the library.
        precision: See :func:`runtime.backend.load_engine`.
        steps: Measured steps per row.
        presets: Names of the bundle's presets; all if None.
        frames: Where to take frames for the pipeline's parts; smooth noise if None.
        on_step: Called after every step, for a progress bar; ``total_steps`` times.
    """
    manifest = bundle.manifest
    chosen = {name: manifest.presets[name] for name in presets or manifest.presets}
    engine = load_engine(bundle, backend=backend, threads=threads, precision=precision)
    tasks: dict[str, Callable[[], object]] = {}
    if manifest.baseline is not None:
        dense = load_engine(
            bundle, manifest.baseline, backend=backend, threads=threads, precision=precision
        ).open_stream()
        tasks["dense"] = stepper(dense, None, manifest.budget_rule)
    for name, budget in chosen.items():
        tasks[f"keep {name}"] = stepper(engine.open_stream(), budget, manifest.budget_rule)
    times = measure_in_turn(tasks, steps, warm_up, on_step)
    base = float(np.median(times["dense"])) if "dense" in times else None
    budgets = {"dense": None, **{f"keep {name}": budget for name, budget in chosen.items()}}
    rows = tuple(_row(name, budgets[name], values, base) for name, values in times.items())
    stages = _pipeline_stages(bundle, engine, frames or _noise_frames(), steps)
    return Profile(str(engine.report), manifest.image_size, steps, warm_up, rows, stages)


def total_steps(bundle: Bundle, steps: int, warm_up: int, presets: Sequence[str] | None = None) -> int:
    """How often :func:`profile_bundle` calls ``on_step``."""
    rows = len(presets or bundle.manifest.presets) + (bundle.manifest.baseline is not None)
    return rows * (steps + warm_up)


def stepper(buffers: StreamBuffers, budget: tuple[int, ...] | None, rule: BudgetRule) -> Callable[[], object]:
    """One step of a stream that has a prior."""
    rng = np.random.default_rng(0)
    buffers.image[:] = rng.integers(0, 256, buffers.image.shape, np.uint8)
    buffers.run(None if budget is None else rule.at_reset(budget))
    buffers.commit()

    def step() -> None:
        buffers.run(budget)
        buffers.commit()

    return step


def measure_in_turn(
    tasks: dict[str, Callable[[], object]], steps: int, warm_up: int, on_step: Callable[[], None]
) -> dict[str, NDArray[np.float64]]:
    """Rows take turns in blocks; the first step of a block finds the caches as another row left them: not counted."""
    times: dict[str, list[float]] = {name: [] for name in tasks}
    blocks = [warm_up] + [min(BLOCK, steps - start) for start in range(0, steps, BLOCK)]
    for number, size in enumerate(blocks):
        for name, task in tasks.items():
            task()
            for _ in range(size):
                started = time.perf_counter()
                task()
                if number > 0:
                    times[name].append((time.perf_counter() - started) * 1e3)
                on_step()
    return {name: np.array(values) for name, values in times.items()}


def _row(name: str, budget: tuple[int, ...] | None, times: NDArray[np.float64], base: float | None) -> LatencyRow:
    p50, p90, p99 = (round(float(value), 3) for value in np.percentile(times, (50, 90, 99)))
    return LatencyRow(name, budget, p50, p90, p99, None if base is None else round(base / p50, 3))


def _pipeline_stages(bundle: Bundle, engine: Engine, frames: Iterator[Frame], steps: int) -> dict[str, float]:
    """Median milliseconds of decode, preprocess, infer and post, at the default budget."""
    parts: dict[str, list[float]] = {"decode": [], "preprocess": [], "infer": [], "post": []}
    with Stream(bundle, engine) as stream:
        for _ in range(steps):
            clock = [time.perf_counter()]
            frame = next(frames, None)
            if frame is None:
                break
            clock.append(time.perf_counter())
            result = stream.step(frame)
            clock.append(time.perf_counter())
            parts["decode"].append((clock[1] - clock[0]) * 1e3)
            parts["preprocess"].append(result.preprocess_ms)
            parts["infer"].append(result.step_ms)
            parts["post"].append((clock[2] - clock[1]) * 1e3 - result.preprocess_ms - result.step_ms)
    return {name: round(float(np.median(values)), 3) for name, values in parts.items() if values}


def _noise_frames(height: int = 720, width: int = 1280) -> Iterator[Frame]:
    """One random picture again and again, with a running clock: nothing to decode, and no scene cut."""
    picture = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    index = 0
    while True:
        yield Frame(picture, index, index / 30.0)
        index += 1
