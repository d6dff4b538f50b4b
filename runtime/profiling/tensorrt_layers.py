"""Layer times of TensorRT and TensorRT-RTX, from an ``IProfiler`` on the execution context."""

from __future__ import annotations

import json
import re

from runtime.bundle import Bundle
from runtime.manifest import GraphSpec
from runtime.profiling.layers import Budget, LayerEvent
from runtime.tensorrt_backend import TensorRtEngine

_ONNX_NAME = re.compile(r"\[ONNX Layer: ([^\]]+)\]")


class TensorRtLayerTimer:
    """A stream without CUDA graphs, which waits after each step for the times of its layers."""

    def __init__(self, bundle: Bundle, graph: GraphSpec, backend: str) -> None:
        self._engine = TensorRtEngine(bundle, graph, backend=backend, time_layers=True)
        self._layers = onnx_layers(self._engine.account())
        self._buffers = self._engine.open_stream()
        self._buffers.image[:] = 128
        self._steps: list[list[LayerEvent]] = []

    def step(self, budget: Budget) -> None:
        """Run one step and carry the state on."""
        self._buffers.run(budget)
        self._buffers.commit()
        times = self._buffers.take_layer_times()
        self._steps.append([LayerEvent(*self._layers.get(name, (name, "")), ms) for name, ms in times])

    def events(self) -> list[list[LayerEvent]]:
        """The layers of each step; closes the engine."""
        self._engine.close()
        return self._steps


def onnx_layers(account: str) -> dict[str, tuple[str, str]]:
    """For each layer of an engine by its own name: the node of the graph that it begins with, and its kind.

    A layer that was compiled from many nodes has a name of the compiler's (``__myl_Fc_myl0_3``); the nodes stand in its
    metadata. One without any keeps its own name.

    Args:
        account: The engine inspector's JSON.

    >>> onnx_layers('{"Layers": [{"Name": "a", "LayerType": "kgen", "Metadata": "[ONNX Layer: blocks.0/add_1]"}]}')
    {'a': ('blocks.0/add_1', 'kgen')}
    """
    layers = [layer for layer in json.loads(account).get("Layers", []) if isinstance(layer, dict) and "Name" in layer]
    return {layer["Name"]: (_first_node(layer), str(layer.get("LayerType", ""))) for layer in layers}


def _first_node(layer: dict[str, object]) -> str:
    found = _ONNX_NAME.search(str(layer.get("Metadata", "")))
    return found.group(1) if found else str(layer["Name"])
