"""ONNX graph -> plan: one code path for TensorRT 10.3 to 11 and TensorRT-RTX, over the names that all of them have."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from export.engine_request import hardware_level
from runtime.engines import EngineInputs, Profile
from runtime.errors import BackendError
from runtime.manifest import GraphSpec
from runtime.tensorrt_library import TensorRt, lines

logger = logging.getLogger(__name__)

_COMPUTING = ("MATRIX_MULTIPLY", "CONVOLUTION", "QUANTIZE")  # a quantized product shows by what goes into it


@dataclass(frozen=True)
class Watch:
    """Somebody who watches a build and may end it.

    Attributes:
        report: Called with what the library does, how many of its main steps are done, and how many there are.
        stop: Ends the build at the next step when set.
    """

    report: Callable[[str, int, int], None] = lambda phase, done, total: None
    stop: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True)
class Plan:
    """A built engine.

    Attributes:
        data: The serialized engine.
        asked: Layers of the parsed graph that multiply, convolve or quantize, by the type that they give.
        timings: Kernel timings for the next build; empty from TensorRT-RTX, which takes none.
    """

    data: bytes
    asked: dict[str, int]
    timings: bytes


def build_plan(
    library: TensorRt, path: Path, graph: GraphSpec, inputs: EngineInputs, timings: bytes | None, watch: Watch
) -> Plan:
    """Parse the graph and build an engine of it: strongly typed, a profile for each budget and batch.

    Args:
        path: The ONNX file.
        timings: Kernel timings of an earlier build, or None; those of another version or GPU are left aside.

    Raises:
        BackendError: The graph is refused, or no engine is built; the message has the library's reasons. Or the build
            was stopped.
    """
    api = library.api
    library.forget()
    builder = api.Builder(library.log)
    typed = getattr(api.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # from 11 on there is no other kind
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    _parse(library, network, path)
    _check_tensors(library, network, graph, path)
    config = builder.create_builder_config()
    monitor = _configure(library, config, inputs, watch)
    if not library.is_rtx:
        _use_timings(library, config, timings or b"")
    for profile in inputs.profiles:
        config.add_optimization_profile(_profile(builder, graph, profile))
    library.forget()
    plan = builder.build_serialized_network(network, config)
    del monitor  # the library refers to it until here
    if watch.stop.is_set():
        raise BackendError(f"the build of {path} was stopped; nothing was written.")
    if plan is None:
        raise BackendError(f"{library} builds no engine from {path}:{library.reasons()}{_cure(library)}")
    measured = b"" if library.is_rtx else bytes(config.get_timing_cache().serialize())
    return Plan(bytes(plan), _computing_types(network), measured)


def _parse(library: TensorRt, network: Any, path: Path) -> None:
    parser = library.api.OnnxParser(network, library.log)
    if not parser.parse_from_file(str(path)):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        reasons = [f"node {error.node_name()!r} ({error.node_operator()}): {error.desc()}" for error in errors]
        raise BackendError(f"{library} does not take {path}:{lines(reasons)}")


def _check_tensors(library: TensorRt, network: Any, graph: GraphSpec, path: Path) -> None:
    """The parsed graph is the manifest's, and no more than the budget is read on the host."""
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    for found, specs in ((inputs, graph.inputs), (outputs, graph.outputs)):
        names, expected = [tensor.name for tensor in found], [spec.name for spec in specs]
        if names != expected:
            raise BackendError(f"{path} has the tensors {', '.join(names)}, the manifest says {', '.join(expected)}.")
    on_host = [tensor.name for tensor in inputs if tensor.is_shape_tensor]
    if set(on_host) - {"token_budget"}:
        raise BackendError(f"{library} takes {', '.join(on_host)} of {path} as shapes; only token_budget may be one.")


def _configure(library: TensorRt, config: Any, inputs: EngineInputs, watch: Watch) -> Any:
    """Set all options; what is returned has to live until the build is over."""
    api = library.api
    config.profiling_verbosity = api.ProfilingVerbosity.DETAILED
    config.clear_flag(api.BuilderFlag.TF32)  # fp32 is what the reference was computed in, and what scores need
    if inputs.workspace_bytes:
        config.set_memory_pool_limit(api.MemoryPoolType.WORKSPACE, inputs.workspace_bytes)
    if inputs.version_compatible:
        config.set_flag(api.BuilderFlag.VERSION_COMPATIBLE)
    if inputs.compatibility != "none":
        config.hardware_compatibility_level = hardware_level(api, inputs.compatibility)
    if library.is_rtx:
        config.set_flag(api.BuilderFlag.REQUIRE_USER_ALLOCATION)  # or a step could not be recorded as a CUDA graph
        config.num_compute_capabilities = len(inputs.compute_capabilities)
        for index, name in enumerate(inputs.compute_capabilities):
            config.set_compute_capability(api.ComputeCapability.__members__[name.upper()], index)
    config.progress_monitor = monitor = _monitor(api, watch)
    return monitor


def _monitor(api: Any, watch: Watch) -> Any:
    class Monitor(api.IProgressMonitor):  # type: ignore[misc]
        """The main phase counts; the phase that started last is told."""

        def __init__(self) -> None:
            super().__init__()
            self._main: str | None = None
            self._done, self._total = 0, 0

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if self._main is None and not parent_phase:
                self._main, self._done, self._total = phase_name, 0, num_steps
            watch.report(phase_name, self._done, self._total)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name == self._main:
                self._done = step + 1
                watch.report(phase_name, self._done, self._total)
            return not watch.stop.is_set()

        def phase_finish(self, phase_name: str) -> None:
            if phase_name == self._main:
                self._main = None

    return Monitor()


def _profile(builder: Any, graph: GraphSpec, wanted: Profile) -> Any:
    """One profile: every shape fixed, and the values of ``token_budget``, from which the token counts follow."""
    profile = builder.create_optimization_profile()
    for spec in graph.inputs:
        shape = spec.shape_for(wanted.batch)
        if spec.name == "token_budget":
            assert wanted.token_budget is not None
            counts = wanted.token_budget[: shape[0]]
            profile.set_shape_input(spec.name, counts, counts, counts)
        else:
            profile.set_shape(spec.name, shape, shape, shape)
    return profile


def _use_timings(library: TensorRt, config: Any, stored: bytes) -> None:
    library.forget()
    cache = config.create_timing_cache(stored)
    fits = cache is not None and config.set_timing_cache(cache, False) and not (stored and library.log.warnings)
    if not fits:
        logger.warning(
            "the kernel timings of an earlier build do not fit %s on this GPU; all are measured anew", library
        )
        config.set_timing_cache(config.create_timing_cache(b""), False)


def _computing_types(network: Any) -> dict[str, int]:
    layers = (network.get_layer(index) for index in range(network.num_layers))
    return dict(Counter(layer.get_output(0).dtype.name for layer in layers if layer.type.name in _COMPUTING))


def _cure(library: TensorRt) -> str:
    said = " ".join(library.log.errors).lower()
    if not any(words in said for words in ("outofmemory", "out of memory", "workspace")):
        return ""
    return "\nMemory ran out: give a larger --workspace, build for fewer budgets, or close what else uses the GPU."
