"""One profile of a bundle: every measurement in its own run, with the mode of measuring beside it."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from runtime.backend import Engine, load_engine
from runtime.bundle import Bundle
from runtime.machine import cpu_name
from runtime.memory import peak_memory_mib
from runtime.profiling.ceiling import Ceiling, measure_ceiling
from runtime.profiling.device_sensors import Sensor, SensorLog, find_sensors
from runtime.profiling.latency import BLOCK, WARM_UP_BLOCKS, Distribution, Task, Turns, measure_in_turn, stepper
from runtime.profiling.layers import Layer, LayerRow, measure_layers
from runtime.profiling.part_table import Part, parts_of_network
from runtime.profiling.pipeline_stages import pipeline_stages
from runtime.stream import default_budget
from runtime.video.frame import Frame

LAYER_STEPS, LAYER_WARM_UP = 10, 3


@dataclass(frozen=True)
class LatencyRow:
    """Step latency at one budget and batch.

    Attributes:
        name: ``dense`` for the graph without selection, else ``keep`` with the preset's name; with the batch if that
            is not 1.
        preset: Name of the preset; None for the dense graph.
        token_budget: Tokens kept at each stage; None for the dense graph.
        batch: Pictures of one step.
        p50_ms, p90_ms, p99_ms, max_ms: Of the step: image in host memory to results in host memory.
        jitter_ms: Mean change from one step to the next.
        speed_up: Dense median of that batch over this median, from the same run; None where there is no dense graph.
        giga_macs: Multiply-accumulates of one picture, in 10^9; None where the bundle does not tell.
        promise: Dense multiply-accumulates over these: the speed-up if cost followed work.
        power_w: Mean power of the whole device meanwhile; None where it does not tell.
        millijoules: That times the median, for one picture.
        times_ms: Every measured step, in order.
        at_s: When each of them started, seconds after the first of any row.
    """

    name: str
    preset: str | None
    token_budget: tuple[int, ...] | None
    batch: int
    p50_ms: float
    p90_ms: float
    p99_ms: float
    max_ms: float
    jitter_ms: float
    speed_up: float | None
    giga_macs: float | None
    promise: float | None
    power_w: float | None
    millijoules: float | None
    times_ms: tuple[float, ...]
    at_s: tuple[float, ...]

    @property
    def kept_promise(self) -> float | None:
        """Measured speed-up over the promised one."""
        return None if self.speed_up is None or self.promise is None else self.speed_up / self.promise


@dataclass(frozen=True)
class Reading:
    """Mean and largest value of a sensor while steps were measured."""

    kind: str
    name: str
    mean: float
    max: float


@dataclass(frozen=True)
class Profile:
    """Everything that one profile run measured.

    Attributes:
        bundle: Name of the folder.
        model: Name of the network.
        default: Name of the default preset; of an engine that has not got it, of the row with the nearest work.
        engine: What it ran on.
        machine: Processor, cores, system.
        measured_at: Local time.
        image_size: (height, width), pixels.
        mode: How was measured, one sentence each.
        steps: Measured steps per row; ``warm_up`` more ran before, until the times were ``stable`` or long enough.
        rows: One per budget and batch.
        stages_ms: Median of each stage of the pipeline at the default budget, milliseconds; None: cannot be told apart.
        layers: Layers by name of the row, in the order in which they ran; empty where they were not measured.
        parts: The same, by part of the network, with what they should cost.
        ceiling: Highest rates of this machine; None where they were not measured.
        readings: What the device told; empty where it tells nothing.
        memory_mib: Peak of this process's resident memory, of all that was measured together; None: not told.
    """

    bundle: str
    model: str
    default: str
    engine: str
    machine: str
    measured_at: str
    image_size: tuple[int, int]
    mode: tuple[str, ...]
    steps: int
    warm_up: int
    stable: bool
    rows: tuple[LatencyRow, ...]
    stages_ms: dict[str, float | None]
    layers: dict[str, tuple[Layer, ...]]
    parts: tuple[Part, ...]
    ceiling: Ceiling | None
    readings: tuple[Reading, ...]
    memory_mib: float | None

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class ProfileRequest:
    """What to measure.

    Attributes:
        backend, threads, precision: See :func:`runtime.backend.load_engine`.
        steps: Measured steps of each row.
        warm_up: Steps of each row before that; None: until the times are stable.
        presets: Names of the bundle's presets; if None, all that the engine can run.
        batches: Pictures of one step.
        layers: Also time every layer, in runs of their own, and the machine's ceilings.
    """

    backend: str = "onnxruntime"
    threads: int = 0
    precision: str | None = None
    steps: int = 30
    warm_up: int | None = None
    presets: Sequence[str] | None = None
    batches: Sequence[int] = (1,)
    layers: bool = True


@dataclass(frozen=True)
class _Row:
    name: str
    preset: str | None
    budget: tuple[int, ...] | None
    batch: int


def profile_bundle(
    bundle: Bundle,
    request: ProfileRequest,
    frames: Iterator[Frame] | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> Profile:
    """Measure all presets and the dense graph, taking turns, so that a drifting machine touches all alike.

    Args:
        frames: Where to take frames for the pipeline's stages; noise in memory if None.
        on_step: Called after every step, for a progress bar; at most ``total_steps`` times.
    """
    engines = _engines(bundle, request)
    engine = engines[bundle.manifest.graph.file]
    rows = _rows(bundle, request, engine.report.budgets)
    tasks = {row.name: _task(bundle, engines, row) for row in rows}
    with SensorLog(find_sensors()) as log:
        turns = measure_in_turn(tasks, request.steps, request.warm_up, on_step)
    stages = pipeline_stages(bundle, engine, frames, request.steps)
    layers = _layers(bundle, request, rows, on_step) if request.layers else {}
    return Profile(
        bundle=bundle.folder.name,
        model=bundle.manifest.origin.model,
        default=_default(bundle, engine, rows),
        engine=str(engine.report),
        machine=machine(),
        measured_at=time.strftime("%Y-%m-%d %H:%M"),
        image_size=bundle.manifest.image_size,
        mode=_mode(engine, request, turns),
        steps=request.steps,
        warm_up=turns.warm_up,
        stable=turns.stable,
        rows=_latency_rows(bundle, rows, turns, log),
        stages_ms=stages,
        layers=layers,
        parts=parts_of_network(bundle.manifest, {row.name: row.preset or "dense" for row in rows}, layers),
        ceiling=measure_ceiling(request.backend, request.threads, request.precision) if request.layers else None,
        readings=tuple(_readings(log)),
        memory_mib=peak_memory_mib(os.getpid()),
    )


def total_steps(bundle: Bundle, request: ProfileRequest) -> int:
    """How often :func:`profile_bundle` calls ``on_step`` at most; less often where the times are stable early."""
    rows = _rows(bundle, request)
    warm_up = BLOCK * WARM_UP_BLOCKS if request.warm_up is None else request.warm_up
    layer_rows = len([row for row in rows if row.batch == 1]) if request.layers else 0
    return len(rows) * (request.steps + warm_up) + layer_rows * (LAYER_STEPS + LAYER_WARM_UP)


def machine() -> str:
    """Processor, cores and system, in words."""
    system = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    return f"{cpu_name()}, {os.cpu_count()} CPUs, {system}"


def _rows(bundle: Bundle, request: ProfileRequest, built: Sequence[tuple[int, ...]] | None = None) -> list[_Row]:
    """One row for each batch and graph or preset; ``built``: the budgets of an engine that has only some."""
    manifest, rows = bundle.manifest, []
    able = [name for name, budget in manifest.presets.items() if built is None or budget in built]
    names = request.presets or able or list(manifest.presets)  # of an engine with none of them the first step tells
    for batch in request.batches:
        suffix = "" if batch == 1 else f", batch {batch}"
        if manifest.baseline is not None:
            rows.append(_Row(f"dense{suffix}", None, None, batch))
        for name in names:
            rows.append(_Row(f"keep {name}{suffix}", name, manifest.presets[name], batch))
    return rows


def _engines(bundle: Bundle, request: ProfileRequest) -> dict[str, Engine]:
    """The bundle's graphs by file name, loaded."""
    graphs = [graph for graph in (bundle.manifest.graph, bundle.manifest.baseline) if graph is not None]
    settings = {"backend": request.backend, "threads": request.threads, "precision": request.precision}
    return {graph.file: load_engine(bundle, graph, **settings) for graph in graphs}  # type: ignore[arg-type]


def _default(bundle: Bundle, engine: Engine, rows: Sequence[_Row]) -> str:
    """The preset among the rows that does about the work of a frame where nothing was asked for."""
    manifest, share = bundle.manifest, bundle.manifest.mean_share
    wanted = share(default_budget(manifest, engine.report))
    names = [row.preset for row in rows if row.preset is not None]
    return min(names, key=lambda name: abs(share(manifest.presets[name]) - wanted), default=manifest.default_preset)


def _task(bundle: Bundle, engines: dict[str, Engine], row: _Row) -> Task:
    manifest = bundle.manifest
    graph = manifest.graph if row.preset is not None or manifest.baseline is None else manifest.baseline
    return stepper(engines[graph.file], row.budget, manifest.budget_rule, row.batch)


def _layers(
    bundle: Bundle, request: ProfileRequest, rows: Sequence[_Row], on_step: Callable[[], None]
) -> dict[str, tuple[Layer, ...]]:
    manifest = bundle.manifest
    chosen = {
        row.name: LayerRow(manifest.graph if row.preset or manifest.baseline is None else manifest.baseline, row.budget)
        for row in rows
        if row.batch == 1
    }
    measured = measure_layers(
        bundle, chosen, backend=request.backend, threads=request.threads, precision=request.precision,
        steps=LAYER_STEPS, warm_up=LAYER_WARM_UP, on_step=on_step,
    )  # fmt: skip
    return {name: tuple(layers) for name, layers in measured.items()}


def _latency_rows(bundle: Bundle, rows: Sequence[_Row], turns: Turns, log: SensorLog) -> tuple[LatencyRow, ...]:
    start = min(turns.started_s[row.name][0] for row in rows)
    dense = {row.batch: Distribution.of(np.array(turns.times_ms[row.name])).p50 for row in rows if row.preset is None}
    return tuple(_latency_row(bundle, row, turns, dense.get(row.batch), start, log) for row in rows)


def _latency_row(
    bundle: Bundle, row: _Row, turns: Turns, dense_ms: float | None, start: float, log: SensorLog
) -> LatencyRow:
    times, started = turns.times_ms[row.name], turns.started_s[row.name]
    spread = Distribution.of(np.array(times))
    macs = bundle.manifest.giga_macs
    own, whole = macs.get(row.preset or "dense"), macs.get("dense")
    power = _power(log, started)
    return LatencyRow(
        name=row.name,
        preset=row.preset,
        token_budget=row.budget,
        batch=row.batch,
        p50_ms=spread.p50,
        p90_ms=spread.p90,
        p99_ms=spread.p99,
        max_ms=spread.max,
        jitter_ms=spread.jitter,
        speed_up=None if dense_ms is None else round(dense_ms / spread.p50, 3),
        giga_macs=own,
        promise=None if own is None or whole is None else round(whole / own, 3),
        power_w=power,
        millijoules=None if power is None else round(power * spread.p50 / row.batch, 2),
        times_ms=tuple(round(value, 3) for value in times),
        at_s=tuple(round(value - start, 4) for value in started),
    )


def _power(log: SensorLog, started_s: Sequence[float]) -> float | None:
    """Mean power of all whole devices together during these steps."""
    values = [log.values(sensor, started_s) for sensor in log.sensors if sensor.kind == "power_w" and sensor.total]
    return round(sum(float(np.mean(each)) for each in values), 3) if values and all(values) else None


def _readings(log: SensorLog) -> Iterator[Reading]:
    for sensor in log.sensors:
        if values := log.values(sensor):
            yield _reading(sensor, values)


def _reading(sensor: Sensor, values: Sequence[float]) -> Reading:
    return Reading(sensor.kind, sensor.name, round(float(np.mean(values)), 2), round(max(values), 2))


def _mode(engine: Engine, request: ProfileRequest, turns: Turns) -> tuple[str, ...]:
    report = engine.report
    warm = "until stable" if turns.stable else "not stable at the end" if request.warm_up is None else "as asked"
    return (
        f"Steps: from the image in host memory to the results there; {request.steps} of each row after "
        f"{turns.warm_up} to warm up ({warm}); rows take turns in blocks of {BLOCK}.",
        "Transfers: none, the backend works in host memory."
        if report.on_cpu
        else "Transfers: image up and results down, included.",
        f"CUDA graph: {'used' if getattr(engine, 'cuda_graph', False) else 'not used'}.",
        f"Threads of one step: {report.threads or 'as the library chooses'}; clocks and power mode: as they were, "
        "nothing was locked.",
        "Layers: in a run of their own, which is slower; without a CUDA graph." if request.layers else "Layers: no.",
        "Pipeline: one frame after the other in one thread, nothing overlaps.",
    )
