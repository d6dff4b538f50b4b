"""Layer times of OpenVINO, from its counters per node."""

from __future__ import annotations

from runtime.bundle import Bundle
from runtime.manifest import GraphSpec
from runtime.openvino_backend import OpenVinoEngine
from runtime.profiling.layers import Budget, LayerEvent


class OpenVinoLayerTimer:
    """A compiled graph that counts each node's time."""

    def __init__(self, bundle: Bundle, graph: GraphSpec, threads: int, precision: str) -> None:
        self._engine = OpenVinoEngine(bundle, graph, threads=threads, precision=precision, count_layers=True)
        self._buffers = self._engine.open_stream()
        self._buffers.image[:] = 128
        self._steps: list[list[LayerEvent]] = []

    def step(self, budget: Budget) -> None:
        """Run one step and carry the state on."""
        self._buffers.run(budget)
        self._buffers.commit()
        self._steps.append([LayerEvent(*counter) for counter in self._buffers.layer_counters()])

    def events(self) -> list[list[LayerEvent]]:
        """The layers of each step."""
        self._engine.close()
        return self._steps
