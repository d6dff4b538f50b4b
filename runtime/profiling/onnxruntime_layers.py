"""Layer times of ONNX Runtime, from its own profiler."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from runtime.bundle import Bundle
from runtime.manifest import GraphSpec
from runtime.onnxruntime_backend import OnnxRuntimeEngine
from runtime.profiling.layers import Budget, LayerEvent

_KERNEL = "_kernel_time"
_RUN = "model_run"


class OnnxRuntimeLayerTimer:
    """A session that writes every kernel's time to a file; on a GPU that is the time to enqueue it, not to run it."""

    def __init__(self, bundle: Bundle, graph: GraphSpec, threads: int, provider: str) -> None:
        self._folder = TemporaryDirectory(prefix="layers-")
        self._engine = OnnxRuntimeEngine(
            bundle, graph, provider=provider, threads=threads, profile_to=Path(self._folder.name) / "run"
        )
        self._buffers = self._engine.open_stream()
        self._buffers.image[:] = 128

    def step(self, budget: Budget) -> None:
        """Run one step and carry the state on."""
        self._buffers.run(budget)
        self._buffers.commit()

    def events(self) -> list[list[LayerEvent]]:
        """The layers of each step; ends the session."""
        file = Path(self._engine.end_profiling())
        content = json.loads(file.read_text(encoding="utf-8"))
        self._engine.close()
        self._folder.cleanup()
        return split_steps(content)


def split_steps(content: list[dict[str, Any]]) -> list[list[LayerEvent]]:
    """The kernels of a profile in ONNX Runtime's format, by the run that they lie in.

    Raises:
        ValueError: A kernel lies outside every run.
    """
    runs = sorted((event["ts"], event["ts"] + event["dur"]) for event in content if event["name"] == _RUN)
    steps: list[list[LayerEvent]] = [[] for _ in runs]
    kernels = sorted((event for event in content if event["name"].endswith(_KERNEL)), key=lambda event: event["ts"])
    current = 0
    for event in kernels:
        while current < len(runs) and event["ts"] > runs[current][1]:
            current += 1
        if current == len(runs) or event["ts"] < runs[current][0]:
            raise ValueError(f"{event['name']} at {event['ts']} us lies in no {_RUN}")
        name = event["name"].removesuffix(_KERNEL)
        steps[current].append(LayerEvent(name, event["args"]["op_name"], event["dur"] / 1e3))
    return steps
