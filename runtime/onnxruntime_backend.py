"""ONNX Runtime: the state in two buffer sets that swap, everything bound once, nothing allocated per frame."""

from __future__ import annotations

import contextlib
import itertools
import logging
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from runtime.backend import EngineReport
from runtime.bundle import Bundle
from runtime.errors import BackendError, BackendUnavailableError, StepError
from runtime.machine import available_cores
from runtime.manifest import GraphSpec, TensorSpec
from runtime.onnxruntime_deformable import Operators, StreamResults, joined_file, operator_library

if TYPE_CHECKING:
    import onnxruntime as ort

logger = logging.getLogger(__name__)

_CPU, _CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
_INSTALL = {
    _CPU: "Install it: pip install onnxruntime",
    _CUDA: "Install it: pip install onnxruntime-gpu (and remove onnxruntime, whose files it shares), on a machine "
    "with an NVIDIA GPU, its driver, CUDA 13 and cuDNN 9.",
}

# Measured with ONNX Runtime 1.31, fp32, one thread: vpp-rovis (LayerNorm over 10710 tokens of 256) takes 3.2 s without
# this fusion and 3.6 s with it; vpp-eo-tiny takes the same either way.
_SLOWER = {_CPU: ["SkipLayerNormFusion"]}

_MOST_BINDINGS = 64  # two for each budget; with more, the oldest goes

# On a CPU a frame of a batch takes as long as one alone (benchmarks/results/cameras-vpp-eo-tiny.json). For GPUs, which
# one picture of this size does not fill, 8 is not measured.
_LARGEST_BATCH = {_CPU: 1, _CUDA: 8}


class OnnxRuntimeEngine:
    """One graph in one ``InferenceSession``.

    Args:
        provider: Execution provider by its full name. It has to be there, and what it leaves to the CPU beside the
            arithmetic of shapes is told by a warning and in :attr:`report`.
        threads: Threads within an operator; 0 takes ONNX Runtime's default, the number of physical cores.
        tf32: Let CUDA round the factors of matrix products to 10 bits of mantissa, as it does by default.
        cuda_graph: Capture a CUDA graph of every budget when it is first used, and replay it from then on.
        profile_to: Beginning of a file name: note the time of every kernel there, see :meth:`end_profiling`.

    Raises:
        BackendUnavailableError: ONNX Runtime or the provider is not there.
        BackendError: The graph cannot be loaded, or not be captured as CUDA graphs.
    """

    def __init__(
        self,
        bundle: Bundle,
        graph: GraphSpec,
        *,
        provider: str = _CPU,
        threads: int = 0,
        tf32: bool = False,
        cuda_graph: bool = False,
        profile_to: Path | None = None,
    ) -> None:
        ort = _import_onnxruntime(provider)
        options = _session_options(ort, threads, fp8=bundle.manifest.precision == "fp8")
        flags = {"use_tf32": str(int(tf32)), "enable_cuda_graph": str(int(cuda_graph))} if provider == _CUDA else {}
        if profile_to is not None:
            options.enable_profiling, options.profile_file_prefix = True, str(profile_to)
        try:
            with contextlib.redirect_stdout(sys.stderr):  # it prints what goes wrong there, among our results
                if provider == _CUDA:
                    preload_cuda(ort)
                self._session, self._operators = _open_session(ort, bundle.path(graph), options, provider, flags)
        except Exception as error:  # ONNX Runtime raises classes of its own without a common base
            raise _load_error(bundle, graph, provider, cuda_graph, error) from error
        if provider not in self._session.get_providers():
            raise BackendUnavailableError(f"{provider} is listed but could not be loaded here. {_INSTALL[provider]}")
        self.graph = graph
        on_cpu = "" if provider == _CPU else _left_to_cpu(self._session)
        if on_cpu:
            logger.warning("%s leaves to the CPU: %s. Expect it to be slow.", provider, on_cpu)
        where = f"{provider} ({on_cpu} on the CPU)" if on_cpu else provider
        precision = "tf32" if tf32 and bundle.manifest.precision == "fp32" else bundle.manifest.precision
        self.report = EngineReport(
            "onnxruntime", ort.__version__, where, threads, precision, largest_batch=_LARGEST_BATCH[provider]
        )
        self._bundle, self._provider = bundle, provider
        self._graph_ids = itertools.count(1) if cuda_graph else None

    def open_stream(self, batch: int = 1, usual_budget: tuple[int, ...] | None = None) -> OnnxRuntimeBuffers:
        """Allocate the buffers of one stream, in its initial state; all budgets are alike to a session."""
        device = "cuda" if self._provider == _CUDA else None
        results = None if self._operators is None else StreamResults(self._operators, batch)
        return OnnxRuntimeBuffers(self._session, self._bundle, self.graph, batch, device, self._graph_ids, results)

    def end_profiling(self) -> str:
        """Finish the file of an engine that was made with ``profile_to``; its path."""
        return str(self._session.end_profiling())

    def close(self) -> None:
        """Give the session back; may be called twice."""
        self._session = None


class OnnxRuntimeBuffers:
    """Two sets of state tensors and one of everything else, bound both ways round, for every budget.

    State that the tracker writes is one tensor, which both sets share.

    On the CPU all tensors are numpy memory that ONNX Runtime reads and writes in place. On a device all are in its
    memory: the state stays there, the image is copied to its tensor before a step, the results to numpy memory after
    it. (A binding copies a tensor from another device once, when it is bound, and a CUDA graph not even then.)

    Args:
        device: ``cuda``; None for numpy memory alone.
        graph_ids: Numbers for CUDA graphs; one for each budget and set, because a captured graph has the addresses and
            the token counts that it was captured with. None captures nothing.
        results: Where operators of our own write; None if there are none.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        bundle: Bundle,
        graph: GraphSpec,
        batch: int,
        device: str | None = None,
        graph_ids: Iterator[int] | None = None,
        results: StreamResults | None = None,
    ) -> None:
        self._session, self._bundle, self._graph = session, bundle, graph
        self._batch, self._device, self._graph_ids, self._results = batch, device, graph_ids, results
        state_inputs = {pair.input for pair in graph.state}
        state_outputs = {pair.output for pair in graph.carried}
        self._host = {
            spec.name: np.zeros(spec.shape_for(batch), spec.dtype)
            for spec in (*graph.inputs, *graph.outputs)
            if spec.name not in state_inputs | state_outputs | {"token_budget"}
        }
        self._shared = {name: self._tensor(array) for name, array in self._host.items()}
        beside = {} if results is None else results.inputs
        self._beside = {name: self._tensor(array) for name, array in beside.items()}
        of_host = {pair.input: self._state_tensor(graph.input(pair.input)) for pair in graph.state}  # in both sets
        carried = [pair.input for pair in graph.carried]
        self._sets = [of_host, of_host | {name: self._state_tensor(graph.input(name)) for name in carried}]
        self._bindings: dict[tuple[tuple[int, ...] | None, int], _Binding] = {}
        self._current = 0
        self.image: NDArray[np.uint8] = self._host["image"]
        self._outputs = {spec.name: self._host[spec.name] for spec in graph.outputs if spec.name in self._host}
        self.reset()

    def _tensor(self, array: NDArray[np.generic]) -> ort.OrtValue:
        """A tensor over the array's own memory, or on the device with the same content."""
        import onnxruntime as ort

        if self._device is None:
            return ort.OrtValue.ortvalue_from_numpy(array)
        tensor = ort.OrtValue.ortvalue_from_shape_and_type(array.shape, array.dtype.type, self._device, 0)
        tensor.update_inplace(array)
        return tensor

    def _state_tensor(self, spec: TensorSpec) -> ort.OrtValue:
        return self._tensor(np.zeros(spec.shape_for(self._batch), spec.dtype))

    def _binding(self, token_budget: tuple[int, ...] | None) -> _Binding:
        """What is bound for a budget when the current set goes in."""
        key = token_budget, self._current
        if key not in self._bindings:
            if len(self._bindings) == _MOST_BINDINGS:
                self._release(next(iter(self._bindings)))
            self._bindings[key] = self._bind(token_budget)
        return self._bindings[key]

    def _bind(self, token_budget: tuple[int, ...] | None) -> _Binding:
        import onnxruntime as ort

        source, target = self._sets[self._current], self._sets[1 - self._current]
        binding, counts, options, graph_id = self._session.io_binding(), None, None, None
        for spec in self._graph.inputs:
            if spec.name == "token_budget":  # on the CPU whatever the device: shapes are computed there
                row = np.array((token_budget or ())[: spec.shape_for(1)[0]], spec.dtype)
                counts = ort.OrtValue.ortvalue_from_numpy(row)
                binding.bind_ortvalue_input(spec.name, counts)
            else:
                binding.bind_ortvalue_input(spec.name, self._shared.get(spec.name) or source[spec.name])
        for beside, tensor in self._beside.items():
            binding.bind_ortvalue_input(beside, tensor)
        state_of = {pair.output: pair.input for pair in self._graph.carried}
        for spec in self._graph.outputs:
            name = state_of.get(spec.name)
            binding.bind_ortvalue_output(spec.name, target[name] if name else self._shared[spec.name])
        if self._graph_ids is not None:
            graph_id, options = next(self._graph_ids), ort.RunOptions()
            options.add_run_config_entry("gpu_graph_id", str(graph_id))
        return _Binding(binding, counts, options, graph_id)

    def _release(self, key: tuple[tuple[int, ...] | None, int]) -> None:
        graph_id = self._bindings.pop(key).graph_id
        if graph_id is not None and hasattr(self._session, "release_captured_graph"):
            self._session.release_captured_graph(graph_id)

    def run(self, token_budget: tuple[int, ...] | None) -> Mapping[str, NDArray[np.generic]]:
        """Run one step; see :class:`runtime.backend.StreamBuffers`."""
        try:
            bound = self._binding(token_budget if self._graph.has_budget else None)
            if self._device is not None:
                self._shared["image"].update_inplace(self.image)
            step = partial(self._session.run_with_iobinding, bound.binding, bound.options)
            if self._results is None:
                step()
            else:
                self._results.run(step)
            if self._device is not None:
                bound.binding.synchronize_outputs()
                for name, array in self._outputs.items():
                    np.copyto(array, self._shared[name].numpy())
        except Exception as error:  # ONNX Runtime raises classes of its own without a common base
            raise StepError(f"ONNX Runtime failed on {self._graph.file} with budget {token_budget}: {error}") from error
        return self._outputs

    def commit(self) -> None:
        """Make the state that the last step left the current one."""
        self._current = 1 - self._current

    def reset(self) -> None:
        """Go back to the initial state."""
        for pair in self._graph.state:
            spec = self._graph.input(pair.input)
            row = self._bundle.initial_row(self._graph, pair.input)
            value = np.zeros(spec.shape_for(self._batch), spec.dtype)
            if row is not None:
                value[:] = row
            self._write(pair.input, value)

    def state(self) -> dict[str, NDArray[np.generic]]:
        """A copy of the current state, by input name."""
        return {name: np.array(value.numpy()) for name, value in self._sets[self._current].items()}

    def set_state(self, state: Mapping[str, NDArray[np.generic]]) -> None:
        """Overwrite the current state.

        Raises:
            ValueError: A value has another shape or dtype than its input; the values before it are written.
        """
        for name, value in state.items():
            self._write(name, np.ascontiguousarray(value))

    def _write(self, name: str, value: NDArray[np.generic]) -> None:
        spec = self._graph.input(name)
        want = spec.dtype, spec.shape_for(self._batch)
        if (value.dtype.name, value.shape) != want:  # ONNX Runtime would copy the bytes of another dtype
            raise ValueError(f"{name} is {want[0]} {list(want[1])}, got {value.dtype} {list(value.shape)}")
        self._sets[self._current][name].update_inplace(value)


@dataclass(frozen=True)
class _Binding:
    """All tensors of a step, for one budget and one set of state.

    Attributes:
        counts: The budget's tensor, which has to outlive the binding.
        options: Name the CUDA graph ``graph_id``; None where none is captured.
    """

    binding: Any
    counts: ort.OrtValue | None
    options: ort.RunOptions | None
    graph_id: int | None


def preload_cuda(ort: Any) -> None:
    """Load CUDA and cuDNN from where pip puts them, if they are there; ONNX Runtime does not look there by itself."""
    if hasattr(ort, "preload_dlls"):  # since 1.21
        ort.preload_dlls()


def _session_options(ort: Any, threads: int, *, fp8: bool) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # A thread that sleeps between two operators takes tens of microseconds to wake, hundreds of times in a step; one
    # that spins on after the step takes a core from decoding, scaling and drawing. (Versions that do not know the
    # second setting spin for longer, within the step.)
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_session_config_entry("session.intra_op.spin_duration_us", "100")
    if fp8:  # 1.31 fuses FP8 into an integer product, and then refuses that
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")  # for _left_to_cpu
    return options


# Operators of which ONNX Runtime puts those on the CPU that compute shapes, on purpose: they take a few integers that
# are wanted there. session.disable_cpu_ep_fallback would refuse a graph for them.
_SHAPE_ARITHMETIC = frozenset({
    "Add", "Cast", "Concat", "ConstantOfShape", "Div", "Equal", "Expand", "Gather", "Max", "Min", "Mod", "Mul", "Range",
    "ReduceProd", "Reshape", "Shape", "Size", "Slice", "Split", "Squeeze", "Sub", "Unsqueeze", "Where",
})  # fmt: skip


def _left_to_cpu(session: Any) -> str:
    """Operators that run on the CPU in a session of another provider, in words; empty if there are none.

    An ONNX Runtime that keeps no record of it (before 1.24) has to be trusted.
    """
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return ""
    parts = [part for part in session.get_provider_graph_assignment_info() if part.ep_name == _CPU]
    found = Counter(node.op_type for part in parts for node in part.get_nodes())
    return ", ".join(f"{count} {name}" for name, count in sorted(found.items()) if name not in _SHAPE_ARITHMETIC)


def _open_session(
    ort: Any, path: Path, options: Any, provider: str, flags: Mapping[str, str]
) -> tuple[Any, Operators | None]:
    """A session of a graph, and the operators of our own in it; None if there are none."""
    settings = {"providers": [(provider, flags)], "disabled_optimizers": _SLOWER.get(provider, [])}
    if provider != _CPU:
        return ort.InferenceSession(str(path), options, **settings), None
    with joined_file(path, options.intra_op_num_threads or available_cores()) as (joined, operators):
        if operators is not None:
            options.register_custom_ops_library(operator_library())
        return ort.InferenceSession(str(joined), options, **settings), operators


def _import_onnxruntime(provider: str) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendUnavailableError(f"ONNX Runtime is not installed. {_INSTALL[provider]}") from error
    if provider not in onnxruntime.get_available_providers():
        raise BackendUnavailableError(
            f"this ONNX Runtime ({onnxruntime.__version__}) has no {provider}, "
            f"only {', '.join(onnxruntime.get_available_providers())}. {_INSTALL[provider]}"
        )
    return onnxruntime


def _load_error(bundle: Bundle, graph: GraphSpec, provider: str, cuda_graph: bool, error: Exception) -> BackendError:
    path, reason = bundle.path(graph), str(error).splitlines()[0]
    if "CUDA Graph" in reason and cuda_graph:
        return BackendError(
            f"ONNX Runtime cannot capture {path} as a CUDA graph: {reason}. Use --backend onnxruntime-cuda, which "
            "launches the kernels one by one."
        )
    if provider != _CPU:
        return BackendUnavailableError(f"{provider} cannot run {path}: {reason}. {_INSTALL[provider]}")
    return BackendError(f"ONNX Runtime cannot load {path}: {reason}")
