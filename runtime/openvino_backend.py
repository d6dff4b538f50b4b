"""OpenVINO on x86 CPUs: the state in two sets of tensors that swap, any budget without compiling again."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from runtime.backend import EngineReport
from runtime.bundle import Bundle
from runtime.errors import BackendError, BackendUnavailableError, StepError
from runtime.machine import available_cores
from runtime.manifest import GraphSpec
from runtime.openvino_core import DEVICE, computes_in_bf16, openvino_core
from runtime.openvino_rewrites import BUDGET, fix_budget, keep_fp32, move_keys_as_rows

if TYPE_CHECKING:
    import openvino as ov

Budget = tuple[int, ...] | None  # tokens kept at each stage, as far as the graph reads them
_HINTS = {"fp32": "f32", "bf16": "bf16"}


class OpenVinoEngine:
    """One graph, compiled once for each batch that is asked for, and once more for each stream's usual budget.

    With all token counts known, a step takes a tenth less time than with counts that it has to read.

    Args:
        threads: Threads of one step; 0 takes OpenVINO's default, the number of physical cores.
        precision: ``fp32``, or ``bf16`` on a CPU that computes in it. Map-SM's product, scores and the places where
            maps are sampled stay fp32, but for what :func:`runtime.openvino_rewrites.keep_fp32` names; what they are
            made of does not.
        count_layers: Note the time of every node, see :meth:`OpenVinoBuffers.layer_counters`; slower.

    Raises:
        BackendUnavailableError: OpenVINO or the precision is not there.
        BackendError: The graph cannot be read.
    """

    def __init__(
        self,
        bundle: Bundle,
        graph: GraphSpec,
        *,
        threads: int = 0,
        precision: str = "fp32",
        count_layers: bool = False,
    ) -> None:
        self._core = openvino_core()
        if precision not in _HINTS:
            raise BackendUnavailableError(f"openvino computes in {' or '.join(_HINTS)}, not in {precision}.")
        if precision == "bf16" and not computes_in_bf16():
            raise BackendUnavailableError(
                "this CPU has no bf16 arithmetic (AMX or AVX512-BF16), OpenVINO would only imitate it. Use fp32."
            )
        self._config: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": _HINTS[precision],
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "PERF_COUNT": count_layers,
        }
        if threads:
            self._config["INFERENCE_NUM_THREADS"] = threads
        self._bundle, self.graph = bundle, graph
        number = version("openvino")
        self.report = EngineReport("openvino", number, f"{DEVICE} in {precision}", threads, precision)
        self._compiled: dict[tuple[int, Budget], ov.CompiledModel] = {}
        self.failures: list[Exception] = []  # of operators of our own, in the last step
        self._read()  # so that a graph that cannot be read is said now

    def compiled(self, batch: int, budget: Budget = None) -> ov.CompiledModel:
        """The graph compiled for a batch and one budget, or any; as it is at every call after the first."""
        if (batch, budget) not in self._compiled:
            from runtime.openvino_deformable import join_deformable_attention

            model = self._read()
            try:
                join_deformable_attention(model, self.report.threads or available_cores(), self.failures)
                move_keys_as_rows(model)
                if self._config["INFERENCE_PRECISION_HINT"] == "bf16":
                    keep_fp32(self._core, model)
                model.reshape({spec.name: list(spec.shape_for(batch)) for spec in self.graph.inputs})
                if budget is not None:
                    fix_budget(model, budget)
                self._compiled[batch, budget] = self._core.compile_model(model, DEVICE, self._config)
            except Exception as error:  # OpenVINO raises RuntimeError for whatever goes wrong
                raise self._cannot_load(error) from error
        return self._compiled[batch, budget]

    def _read(self) -> ov.Model:
        try:
            return self._core.read_model(str(self._bundle.path(self.graph)))
        except Exception as error:
            raise self._cannot_load(error) from error

    def _cannot_load(self, error: Exception) -> BackendError:
        return BackendError(f"OpenVINO cannot load {self._bundle.path(self.graph)}: {_first_lines(error)}")

    def open_stream(self, batch: int = 1, usual_budget: Budget = None) -> OpenVinoBuffers:
        """Allocate the buffers of one stream, in its initial state; compiles the graph for its usual budget.

        Raises:
            BackendError: OpenVINO cannot compile the graph.
        """
        return OpenVinoBuffers(self, self._bundle, batch, _budget_input(self.graph, usual_budget))

    def close(self) -> None:
        """Give the compiled graphs back; may be called twice."""
        self._compiled.clear()


class OpenVinoBuffers:
    """Two sets of state tensors and one of everything else; all are numpy memory that OpenVINO reads and writes.

    State that the tracker writes is one tensor, which both sets share.

    Args:
        usual: The budget that has a graph of its own; the graph for all others is compiled when the first one comes.
    """

    def __init__(self, engine: OpenVinoEngine, bundle: Bundle, batch: int, usual: Budget) -> None:
        import openvino

        self._engine, self._bundle, self._graph, self._batch = engine, bundle, engine.graph, batch
        graph = engine.graph
        self._requests: dict[Budget, ov.InferRequest] = {}  # by the budget that each is for; None takes any
        self._usual = usual
        self._last = self._request(usual)  # that ran
        carried = {pair.output: pair.input for pair in graph.carried if pair.output is not None}
        arrays = {
            spec.name: np.zeros(spec.shape_for(batch), spec.dtype)
            for spec in (*graph.inputs, *graph.outputs)
            if spec.name not in carried
        }
        second = arrays | {name: np.zeros_like(arrays[name]) for name in carried.values()}
        self._sets = arrays, second  # of the inputs; the second differs in the state that the graph writes
        tensors = [
            {name: openvino.Tensor(array, shared_memory=True) for name, array in one.items()} for one in self._sets
        ]
        # by the set that holds the current state: what goes in, and where what comes out is written
        self._bound = [
            tensors[now] | {output: tensors[1 - now][name] for output, name in carried.items()} for now in (0, 1)
        ]
        self._current = 0
        self._names = [spec.name for spec in (*graph.inputs, *graph.outputs)]
        self.image: NDArray[np.uint8] = arrays["image"]
        self._outputs = {spec.name: arrays[spec.name] for spec in graph.outputs if spec.name in arrays}
        self.reset()

    def run(self, token_budget: tuple[int, ...] | None) -> Mapping[str, NDArray[np.generic]]:
        """Run one step; see :class:`runtime.backend.StreamBuffers`."""
        arrays, counts = self._sets[0], _budget_input(self._graph, token_budget)
        if counts is not None:
            arrays[BUDGET][:] = counts
        fixed, bound = counts if counts == self._usual else None, self._bound[self._current]
        try:
            request = self._request(fixed)
            for name in self._names:
                if fixed is None or name != BUDGET:
                    request.set_tensor(name, bound[name])
            request.infer()
            if self._engine.failures:
                failures, self._engine.failures[:] = tuple(self._engine.failures), ()
                raise failures[0]
        except Exception as error:  # OpenVINO raises RuntimeError for whatever goes wrong
            raise StepError(
                f"OpenVINO failed on {self._graph.file} with budget {token_budget}: {_first_lines(error)}"
            ) from error
        self._last = request
        return self._outputs

    def _request(self, budget: Budget) -> ov.InferRequest:
        if budget not in self._requests:
            self._requests[budget] = self._engine.compiled(self._batch, budget).create_infer_request()
        return self._requests[budget]

    def layer_counters(self) -> list[tuple[str, str, float]]:
        """Name, kind and milliseconds of each node of the graph that ran last, in order: means over all its steps."""
        counted = self._last.get_profiling_info()
        return [
            (node.node_name, node.node_type, node.real_time.total_seconds() * 1e3)
            for node in counted
            if node.node_type not in ("Parameter", "Constant", "Result")  # they only hold what others compute
        ]

    def commit(self) -> None:
        """Make the state that the last step left the current one."""
        self._current = 1 - self._current

    def reset(self) -> None:
        """Go back to the initial state."""
        for pair in self._graph.state:
            row = self._bundle.initial_row(self._graph, pair.input)
            self._sets[self._current][pair.input][:] = 0 if row is None else row

    def state(self) -> dict[str, NDArray[np.generic]]:
        """A copy of the current state, by input name."""
        return {pair.input: self._sets[self._current][pair.input].copy() for pair in self._graph.state}

    def set_state(self, state: Mapping[str, NDArray[np.generic]]) -> None:
        """Overwrite the current state.

        Raises:
            ValueError: A value has another shape or dtype than its input; the values before it are written.
        """
        for name, value in state.items():
            target = self._sets[self._current][name]
            if (value.dtype, value.shape) != (target.dtype, target.shape):
                raise ValueError(
                    f"{name} is {target.dtype} {list(target.shape)}, got {value.dtype} {list(value.shape)}"
                )
            target[:] = value


def _budget_input(graph: GraphSpec, token_budget: Budget) -> Budget:
    """The part of a budget that the graph reads; None if it reads none."""
    if token_budget is None or not graph.has_budget:
        return None
    return token_budget[: graph.input(BUDGET).shape_for(1)[0]]


def _first_lines(error: Exception) -> str:
    """What OpenVINO says, without the places in its sources that it names first."""
    lines = [line for line in str(error).splitlines() if line and not line.startswith(("Exception from", "Check '"))]
    return " ".join(lines[:2]) or type(error).__name__
