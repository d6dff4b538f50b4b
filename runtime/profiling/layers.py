"""How long each layer of a graph takes, in a run of its own: looking at every layer makes the step slower.

A backend takes part by an entry in :data:`LAYER_TIMERS`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Protocol

from runtime.bundle import Bundle
from runtime.manifest import GraphSpec
from runtime.profiling.parts import parts_in_order

Budget = tuple[int, ...] | None


@dataclass(frozen=True)
class Layer:
    """One layer as the backend runs it, after its own fusions.

    Attributes:
        name: As the backend calls it; begins with ``MODULE/`` where the name of a node has survived.
        op: Kind of operator, in the backend's words.
        part: See :func:`runtime.profiling.parts.part_of`.
        ms: Median over the measured steps, milliseconds.
    """

    name: str
    op: str
    part: str
    ms: float


@dataclass(frozen=True)
class LayerEvent:
    """One layer in one step."""

    name: str
    op: str
    ms: float


class LayerTimer(Protocol):
    """Loads a graph so that it notes the time of each layer, and runs it step by step.

    Made with ``(bundle, graph, threads, precision)``. On a GPU it runs without a CUDA graph and waits after each step.
    """

    def step(self, budget: Budget) -> None:
        """Run one step of a stream that has a prior, and carry the state on."""

    def events(self) -> list[list[LayerEvent]]:
        """For each step since the timer was made, its layers in the order in which they ran; may be called once."""


LayerTimerFactory = Callable[[Bundle, GraphSpec, int, str | None], LayerTimer]


def _onnxruntime(provider: str) -> LayerTimerFactory:
    def make(bundle: Bundle, graph: GraphSpec, threads: int, precision: str | None) -> LayerTimer:
        from runtime.profiling.onnxruntime_layers import OnnxRuntimeLayerTimer

        return OnnxRuntimeLayerTimer(bundle, graph, threads, provider)

    return make


def _openvino(bundle: Bundle, graph: GraphSpec, threads: int, precision: str | None) -> LayerTimer:
    from runtime.profiling.openvino_layers import OpenVinoLayerTimer

    return OpenVinoLayerTimer(bundle, graph, threads, precision or "fp32")


def _tensorrt(backend: str) -> LayerTimerFactory:
    def make(bundle: Bundle, graph: GraphSpec, threads: int, precision: str | None) -> LayerTimer:
        from runtime.profiling.tensorrt_layers import TensorRtLayerTimer

        return TensorRtLayerTimer(bundle, graph, backend)

    return make


LAYER_TIMERS: dict[str, LayerTimerFactory] = {
    "onnxruntime": _onnxruntime("CPUExecutionProvider"),
    "onnxruntime-cuda": _onnxruntime("CUDAExecutionProvider"),
    "openvino": _openvino,
    "tensorrt": _tensorrt("tensorrt"),
    "tensorrt-rtx": _tensorrt("tensorrt-rtx"),
}


@dataclass(frozen=True)
class LayerRow:
    """A graph at a budget that is to be measured layer by layer."""

    graph: GraphSpec
    budget: Budget


def measure_layers(
    bundle: Bundle,
    rows: Mapping[str, LayerRow],
    *,
    backend: str,
    threads: int = 0,
    precision: str | None = None,
    steps: int = 10,
    warm_up: int = 3,
    on_step: Callable[[], None] = lambda: None,
) -> dict[str, list[Layer]]:
    """Time the layers of each row; rows take turns step by step.

    Returns:
        The layers of each row in the order in which they ran; empty if the backend cannot time layers.
    """
    if backend not in LAYER_TIMERS:
        return {}
    timers = {row.graph.file: row.graph for row in rows.values()}
    opened = {file: LAYER_TIMERS[backend](bundle, graph, threads, precision) for file, graph in timers.items()}
    ran: dict[str, list[str]] = {file: [] for file in opened}  # which row each step of a timer belongs to
    for _ in range(warm_up + steps):
        for name, row in rows.items():
            opened[row.graph.file].step(row.budget)
            ran[row.graph.file].append(name)
            on_step()
    taken: dict[str, list[list[LayerEvent]]] = defaultdict(list)
    for file, timer in opened.items():
        for name, events in zip(ran[file], timer.events(), strict=True):
            taken[name].append(events)
    return {name: _medians(taken[name][warm_up:]) for name in rows}


def _medians(steps: Sequence[Sequence[LayerEvent]]) -> list[Layer]:
    """Median time of each layer; the layers are those of the first step, all run the same graph."""
    times: dict[str, list[float]] = defaultdict(list)
    for events in steps:
        for name, event in zip(_unique(event.name for event in events), events, strict=True):
            times[name].append(event.ms)
    first = steps[0]
    parts = parts_in_order(event.name for event in first)
    names = _unique(event.name for event in first)
    return [
        Layer(event.name, event.op, part, round(median(times[name]), 4))
        for name, event, part in zip(names, first, parts, strict=True)
    ]


def _unique(names: Iterable[str]) -> list[str]:
    """Names with a number behind each repetition; ONNX Runtime may give the same name to several nodes."""
    seen: dict[str, int] = defaultdict(int)
    unique = []
    for name in names:
        seen[name] += 1
        unique.append(name if seen[name] == 1 else f"{name} #{seen[name]}")
    return unique
