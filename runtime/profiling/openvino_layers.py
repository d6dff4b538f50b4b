"""Layer times of OpenVINO, from its counters per node."""

from __future__ import annotations

from functools import partial

from runtime.bundle import Bundle
from runtime.manifest import GraphSpec
from runtime.openvino_backend import OpenVinoEngine
from runtime.profiling.layers import Budget, LayerEvent


class OpenVinoLayerTimer:
    """Compiled graphs that count each node's time, one for each budget.

    A counter is the mean over all steps of its graph, in whole microseconds. So the time of step n is n times the mean
    then, less n - 1 times the mean before, to within n microseconds; and steps of another budget must not be in it.

    Attributes:
        streams: One for each budget that has run.
    """

    def __init__(self, bundle: Bundle, graph: GraphSpec, threads: int, precision: str) -> None:
        self._load = partial(OpenVinoEngine, bundle, graph, threads=threads, precision=precision, count_layers=True)
        self.streams: dict[Budget, CountedStream] = {}
        self._steps: list[list[LayerEvent]] = []

    def step(self, budget: Budget) -> None:
        """Run one step and carry the state on."""
        if budget not in self.streams:
            self.streams[budget] = CountedStream(self._load(), budget)
        self._steps.append(self.streams[budget].step(budget))

    def events(self) -> list[list[LayerEvent]]:
        """The layers of each step."""
        for stream in self.streams.values():
            stream.close()
        return self._steps


class CountedStream:
    """One stream on an engine of its own, with what its counters had summed up to."""

    def __init__(self, engine: OpenVinoEngine, budget: Budget) -> None:
        self._engine, self._buffers = engine, engine.open_stream(usual_budget=budget)
        self._buffers.image[:] = 128
        self._totals_ms: list[float] = []
        self._count = 0

    def step(self, budget: Budget) -> list[LayerEvent]:
        """Run one step; the layers in the order in which they ran."""
        self._buffers.run(budget)
        self._buffers.commit()
        self._count += 1
        counters = self.counters()
        before = self._totals_ms or [0.0] * len(counters)
        self._totals_ms = [self._count * mean_ms for _, _, mean_ms in counters]
        return [
            LayerEvent(name, op, max(0.0, total - earlier))
            for (name, op, _), total, earlier in zip(counters, self._totals_ms, before, strict=True)
        ]

    def counters(self) -> list[tuple[str, str, float]]:
        """Name, kind and mean milliseconds of each layer."""
        return self._buffers.layer_counters()

    def close(self) -> None:
        """Give the compiled graph back."""
        self._engine.close()
