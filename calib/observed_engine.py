"""The bundle's graph as an engine that shows what goes into its linear layers while a stream runs through it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import ValueInfoProto

from calib.graph_index import GraphIndex
from calib.linear_layers import LinearLayer, linear_layers
from runtime.backend import EngineReport
from runtime.bundle import Bundle
from runtime.errors import StepError

Arrays = Mapping[str, NDArray[np.generic]]


class ObservedEngine:
    """An engine for :class:`runtime.stream.Stream` on ONNX Runtime's CPU provider.

    Args:
        on_step: Called after each step with what went into the graph, all outputs, and the inputs of the linear layers
            by the name of their tensor.
        threads: 0 takes the number of physical cores.

    Attributes:
        layers: The linear layers.
    """

    def __init__(self, bundle: Bundle, on_step: Callable[[Arrays, Arrays, Arrays], None], threads: int = 0) -> None:
        self.bundle, self.graph, self.on_step = bundle, bundle.manifest.graph, on_step
        model = onnx.load(bundle.path(self.graph))
        self.layers: list[LinearLayer] = linear_layers(GraphIndex(model), self.graph)
        own = {spec.name for spec in (*self.graph.inputs, *self.graph.outputs)}
        self.observed = [name for name in dict.fromkeys(layer.input for layer in self.layers) if name not in own]
        model.graph.output.extend(ValueInfoProto(name=name) for name in self.observed)
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        self.session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        self.report = EngineReport("onnxruntime", ort.__version__, "CPUExecutionProvider", threads)

    def open_stream(self, batch: int = 1, usual_budget: tuple[int, ...] | None = None) -> ObservedBuffers:
        """The buffers of one stream, in its initial state."""
        return ObservedBuffers(self, batch)

    def close(self) -> None:
        """Nothing to give back."""


class ObservedBuffers:
    """The state of one stream; see :class:`runtime.backend.StreamBuffers`."""

    def __init__(self, engine: ObservedEngine, batch: int) -> None:
        self._engine, self._spec = engine, engine.graph
        self._feeds = {spec.name: np.zeros(spec.shape_for(batch), spec.dtype) for spec in self._spec.inputs}
        self._next: dict[str, NDArray[np.generic]] = {}
        self.image: NDArray[np.uint8] = self._feeds["image"]
        self.reset()

    def run(self, token_budget: tuple[int, ...] | None) -> dict[str, NDArray[np.generic]]:
        """Run one step on ``image`` and the current state."""
        if token_budget is not None and "token_budget" in self._feeds:
            self._feeds["token_budget"][:] = token_budget[: len(self._feeds["token_budget"])]
        names = [spec.name for spec in self._spec.outputs]
        try:
            values = self._engine.session.run([*names, *self._engine.observed], self._feeds)
        except Exception as error:  # ONNX Runtime raises classes of its own without a common base
            raise StepError(f"ONNX Runtime failed on {self._spec.file} with budget {token_budget}: {error}") from error
        outputs = dict(zip(names, values, strict=False))
        inner = dict(zip(self._engine.observed, values[len(names) :], strict=True))
        self._engine.on_step(self._feeds, outputs, self._feeds | outputs | inner)
        self._next = {pair.input: outputs.pop(pair.output or "") for pair in self._spec.carried}
        return outputs

    def commit(self) -> None:
        """Make the state that the last step left the current one."""
        self._feeds.update(self._next)

    def reset(self) -> None:
        """Go back to the initial state."""
        for pair in self._spec.state:
            row = self._engine.bundle.initial_row(self._spec, pair.input)
            self._feeds[pair.input] = np.zeros_like(self._feeds[pair.input])
            if row is not None:
                self._feeds[pair.input][:] = row

    def state(self) -> dict[str, NDArray[np.generic]]:
        """A copy of the current state, by input name."""
        return {pair.input: self._feeds[pair.input].copy() for pair in self._spec.state}

    def set_state(self, state: Arrays) -> None:
        """Overwrite the current state."""
        self._feeds.update({name: np.array(value) for name, value in state.items()})
