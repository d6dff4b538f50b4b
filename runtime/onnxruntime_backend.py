"""ONNX Runtime: the state in two buffer sets that swap, everything bound once, nothing allocated per frame."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from runtime.backend import EngineReport
from runtime.bundle import Bundle
from runtime.errors import BackendError, BackendUnavailableError, StepError
from runtime.manifest import GraphSpec, TensorSpec

if TYPE_CHECKING:
    import onnxruntime as ort

_CPU, _CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
_INSTALL = {
    _CPU: "Install it: pip install onnxruntime",
    _CUDA: "Install it: pip install onnxruntime-gpu (and remove onnxruntime, whose files it shares), on a machine "
    "with an NVIDIA GPU, its driver, CUDA 13 and cuDNN 9.",
}

# Measured with ONNX Runtime 1.31, fp32, one thread: vpp-rovis (LayerNorm over 10710 tokens of 256) takes 3.2 s without
# this fusion and 3.6 s with it; vpp-eo-tiny takes the same either way.
_SLOWER = {_CPU: ["SkipLayerNormFusion"]}


class OnnxRuntimeEngine:
    """One graph in one ``InferenceSession``.

    Args:
        provider: Execution provider by its full name. It alone may run the graph: what it does not take is an error,
            not a silent move to the CPU.
        threads: Threads within an operator; 0 takes ONNX Runtime's default, the number of physical cores.
        profile_to: Beginning of a file name: note the time of every kernel there, see :meth:`end_profiling`.

    Raises:
        BackendUnavailableError: ONNX Runtime or the provider is not there.
        BackendError: The graph cannot be loaded.
    """

    def __init__(
        self,
        bundle: Bundle,
        graph: GraphSpec,
        *,
        provider: str = _CPU,
        threads: int = 0,
        profile_to: Path | None = None,
    ) -> None:
        ort = _import_onnxruntime(provider)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        # Threads that spin while they wait take the cores from decoding, scaling and drawing. Measured with 2 threads
        # on 2 cores: the bare step is as fast without, and `run` reaches 0.94 to 0.97 of it instead of 0.92.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if profile_to is not None:
            options.enable_profiling, options.profile_file_prefix = True, str(profile_to)
        if provider != _CPU:
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        try:
            self._session = ort.InferenceSession(
                str(bundle.path(graph)), options, providers=[provider], disabled_optimizers=_SLOWER.get(provider, [])
            )
        except Exception as error:  # ONNX Runtime raises classes of its own without a common base
            raise _load_error(bundle, graph, provider, error) from error
        if provider not in self._session.get_providers():
            raise BackendUnavailableError(f"{provider} is listed but could not be loaded here. {_INSTALL[provider]}")
        self.graph = graph
        self.report = EngineReport("onnxruntime", ort.__version__, provider, threads)
        self._bundle = bundle

    def open_stream(self, batch: int = 1) -> OnnxRuntimeBuffers:
        """Allocate the buffers of one stream, in its initial state."""
        device = "cuda" if self.report.provider == _CUDA else "cpu"
        return OnnxRuntimeBuffers(self._session, self._bundle, self.graph, batch, device)

    def end_profiling(self) -> str:
        """Finish the file of an engine that was made with ``profile_to``; its path."""
        return str(self._session.end_profiling())

    def close(self) -> None:
        """Give the session back; may be called twice."""
        self._session = None


class OnnxRuntimeBuffers:
    """Two sets of state tensors and one of everything else, bound both ways round.

    State that the tracker writes is one tensor, which both sets share.

    On the CPU all tensors are numpy memory that ONNX Runtime reads and writes in place. On a GPU the state stays in
    device memory, and only the image goes up and the results come down.
    """

    def __init__(
        self, session: ort.InferenceSession, bundle: Bundle, graph: GraphSpec, batch: int, device: str
    ) -> None:
        self._session, self._bundle, self._graph = session, bundle, graph
        self._batch, self._device = batch, device
        state_inputs = {pair.input for pair in graph.state}
        state_outputs = {pair.output for pair in graph.carried}
        self._host = {
            spec.name: np.zeros(spec.shape_for(batch), spec.dtype)
            for spec in (*graph.inputs, *graph.outputs)
            if spec.name not in state_inputs | state_outputs
        }
        self._shared = {name: _on_cpu(array) for name, array in self._host.items()}
        of_host = {pair.input: self._state_tensor(graph.input(pair.input)) for pair in graph.state}  # in both sets
        carried = [pair.input for pair in graph.carried]
        self._sets = [of_host, of_host | {name: self._state_tensor(graph.input(name)) for name in carried}]
        self._bindings = [self._bind(current, 1 - current) for current in (0, 1)]
        self._current = 0
        self.image: NDArray[np.uint8] = self._host["image"]
        self._outputs = {spec.name: self._host[spec.name] for spec in graph.outputs if spec.name in self._host}
        self.reset()

    def _state_tensor(self, spec: TensorSpec) -> ort.OrtValue:
        import onnxruntime as ort

        zeros = np.zeros(spec.shape_for(self._batch), spec.dtype)
        return _on_cpu(zeros) if self._device == "cpu" else ort.OrtValue.ortvalue_from_numpy(zeros, self._device, 0)

    def _bind(self, source: int, target: int) -> Any:
        binding = self._session.io_binding()
        for spec in self._graph.inputs:
            binding.bind_ortvalue_input(spec.name, self._shared.get(spec.name) or self._sets[source][spec.name])
        state_of = {pair.output: pair.input for pair in self._graph.carried}
        for spec in self._graph.outputs:
            name = state_of.get(spec.name)
            binding.bind_ortvalue_output(spec.name, self._sets[target][name] if name else self._shared[spec.name])
        return binding

    def run(self, token_budget: tuple[int, ...] | None) -> Mapping[str, NDArray[np.generic]]:
        """Run one step; see :class:`runtime.backend.StreamBuffers`."""
        if token_budget is not None and "token_budget" in self._host:
            self._host["token_budget"][:] = token_budget[: len(self._host["token_budget"])]
        binding = self._bindings[self._current]
        try:
            if self._device != "cpu":
                binding.synchronize_inputs()
            self._session.run_with_iobinding(binding)
            if self._device != "cpu":
                binding.synchronize_outputs()
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


def _on_cpu(array: NDArray[np.generic]) -> ort.OrtValue:
    """A tensor over the array's own memory."""
    import onnxruntime as ort

    return ort.OrtValue.ortvalue_from_numpy(array)


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


def _load_error(bundle: Bundle, graph: GraphSpec, provider: str, error: Exception) -> BackendError:
    reason = str(error).splitlines()[0]
    if provider != _CPU:
        return BackendUnavailableError(f"{provider} cannot run {bundle.path(graph)}: {reason}. {_INSTALL[provider]}")
    return BackendError(f"ONNX Runtime cannot load {bundle.path(graph)}: {reason}")
