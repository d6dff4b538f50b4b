"""One stream on a TensorRT engine: memory allocated once, state swapped on the GPU, one CUDA graph for each budget.

Only the image goes up and the results come down.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.bundle import Bundle
from runtime.cuda import CudaGraph, CudaStream, DeviceMemory, pinned_array
from runtime.engines import EngineRecord
from runtime.errors import BackendError, StepError, TokenBudgetError
from runtime.manifest import GraphSpec, TensorSpec
from runtime.tensorrt_library import TensorRt

logger = logging.getLogger(__name__)


class TensorRtBuffers:
    """The memory of one stream and the steps that run on it; see :class:`runtime.backend.StreamBuffers`.

    All memory goes back with :meth:`close`, or when the object is dropped. Several of these may run at the same time,
    in threads of their own; one of them runs one step at a time.

    Attributes:
        graphs_allowed: Steps are launched as CUDA graphs once warm; False after one could not be recorded.

    Args:
        time_layers: Note the time of every layer; there are no CUDA graphs then, and every step is waited for.
    """

    def __init__(
        self,
        library: TensorRt,
        engine: Any,
        bundle: Bundle,
        graph: GraphSpec,
        record: EngineRecord,
        batch: int,
        *,
        time_layers: bool = False,
    ) -> None:
        self._library, self._engine, self._bundle, self._graph = library, engine, bundle, graph
        self._record, self._batch = record, batch
        entries = graph.input("token_budget").shape_for(1)[0] if graph.has_budget else 0
        self._entries = slice(entries)
        self._profiles = {
            profile.token_budget[self._entries] if profile.token_budget and entries else None: index
            for index, profile in enumerate(record.profiles)
            if profile.batch == batch
        }
        self._memory = _Memory(graph, batch, max(map(self._scratch_bytes, self._profiles.values())))
        self._steps: dict[tuple[int, int], _Step] = {}
        self._profiler = _layer_profiler(library.api) if time_layers else None
        self.graphs_allowed = graph.selection != "threshold" and not time_layers  # threshold: counts come out of data
        self.image: NDArray[np.uint8] = self._memory.host["image"]
        self.reset()

    def _scratch_bytes(self, profile: int) -> int:
        return int(self._engine.get_device_memory_size_for_profile_v2(profile))

    def run(self, token_budget: tuple[int, ...] | None) -> Mapping[str, NDArray[np.generic]]:
        """Run one step on ``image`` and the current state.

        The first step of a budget on each state set runs kernel by kernel, the second is recorded as a CUDA graph, and
        that is launched from then on.

        Raises:
            TokenBudgetError: The engine was not built for this budget.
            StepError: TensorRT or CUDA failed; the state is what it was.
        """
        counts = token_budget[self._entries] if token_budget and self._graph.has_budget else None
        if counts not in self._profiles:
            raise TokenBudgetError(self._other_budget(token_budget))
        self._library.forget()
        try:
            step = self._step(counts)
            if self.graphs_allowed:
                self.graphs_allowed = step.record()
            step.enqueue()
            self._memory.stream.synchronize()
        except BackendError as error:
            said = self._library.reasons() if self._library.log.errors else ""
            raise StepError(
                f"{self._library} failed on {self._graph.file} with budget {token_budget}: {error}{said}"
            ) from error
        return self._memory.outputs

    def _step(self, counts: tuple[int, ...] | None) -> _Step:
        key = self._profiles[counts], self._memory.current
        if key not in self._steps:
            context = self._new_context(key[0])
            self._steps[key] = _Step(context, self._memory, self._graph, self._batch, counts)
        return self._steps[key]

    def _new_context(self, profile: int) -> Any:
        """An execution context for one profile, with the stream's scratch memory."""
        api, memory = self._library.api, self._memory
        strategy = api.ExecutionContextAllocationStrategy.USER_MANAGED
        if self._library.is_rtx:  # all shapes are fixed, so kernels are compiled for them, and before they first run
            config = self._engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            config.dynamic_shapes_kernel_specialization_strategy = api.DynamicShapesKernelSpecializationStrategy.EAGER
            context = self._engine.create_execution_context(config)
        else:
            context = self._engine.create_execution_context(strategy)
        if context is None:
            raise BackendError(f"no execution context for profile {profile}.")
        _accepted(context.set_optimization_profile_async(profile, memory.stream.address), "profile", profile)
        memory.stream.synchronize()
        context.set_device_memory(memory.scratch.address, memory.scratch.nbytes)
        if self._profiler is not None:
            context.profiler = self._profiler
        return context

    def _other_budget(self, token_budget: tuple[int, ...] | None) -> str:
        built = ", ".join(
            f"{','.join(map(str, profile.token_budget))} ({profile.name})"
            for profile in self._record.profiles
            if profile.token_budget is not None and profile.batch == self._batch
        )
        asked = ",".join(map(str, token_budget or ()))
        return (
            f"token budget {asked or 'none'}: the engine was built for {built or 'a graph without selection'}. Use one "
            f"of these, or build it anew: deploy.py build {self._bundle.folder} --backend {self._library.backend}"
            + (f" --token-budget {asked}" if asked else "")
        )

    def take_layer_times(self) -> list[tuple[str, float]]:
        """Name and milliseconds of each layer that ran since the last call; none without ``time_layers``."""
        if self._profiler is None:
            return []
        times: list[tuple[str, float]] = self._profiler.times_ms
        self._profiler.times_ms = []
        return times

    def transfers_ms(self) -> tuple[float, float]:
        """Time to move the image up and the results down, milliseconds; both are moved once more for this.

        Raises:
            DeviceError: A copy failed.
        """
        memory = self._memory
        tensors, marks = memory.bound[memory.current], [time.perf_counter()]
        memory.stream.upload(memory.host["image"], tensors["image"])
        memory.stream.synchronize()
        marks.append(time.perf_counter())
        for name, array in memory.outputs.items():
            memory.stream.download(tensors[name], array)
        memory.stream.synchronize()
        marks.append(time.perf_counter())
        return (marks[1] - marks[0]) * 1e3, (marks[2] - marks[1]) * 1e3

    def commit(self) -> None:
        """Make the state that the last step left the current one."""
        self._memory.current = 1 - self._memory.current

    def reset(self) -> None:
        """Go back to the initial state.

        Raises:
            DeviceError: The copy to the GPU failed.
        """
        state = {}
        for pair in self._graph.state:
            spec, row = self._graph.input(pair.input), self._bundle.initial_row(self._graph, pair.input)
            state[pair.input] = np.zeros(spec.shape_for(self._batch), spec.dtype)
            if row is not None:
                state[pair.input][:] = row
        self.set_state(state)

    def state(self) -> dict[str, NDArray[np.generic]]:
        """A copy of the current state, by input name.

        Raises:
            DeviceError: The copy from the GPU failed.
        """
        return {pair.input: self._memory.read_state(pair.input) for pair in self._graph.state}

    def set_state(self, state: Mapping[str, NDArray[np.generic]]) -> None:
        """Overwrite the current state.

        Raises:
            ValueError: A value has another shape or dtype than its input; nothing is written.
            DeviceError: The copy to the GPU failed.
        """
        values = {name: np.ascontiguousarray(value) for name, value in state.items()}
        for name, value in values.items():
            spec = self._graph.input(name)
            want = spec.dtype, spec.shape_for(self._batch)
            if (value.dtype.name, value.shape) != want:
                raise ValueError(f"{name} is {want[0]} {list(want[1])}, got {value.dtype} {list(value.shape)}")
        self._memory.write_state(values)

    def close(self) -> None:
        """Give all memory back, the last allocated first; may be called twice."""
        for step in reversed(self._steps.values()):
            step.close()
        self._steps.clear()
        self._memory.close()


class _Memory:
    """Two sets of state on the GPU and one of everything else; image and results in page-locked memory too.

    State that the tracker writes is one tensor, which both sets share.

    Attributes:
        host: Image and results on the host, by name.
        outputs: The results among them.
        bound: Memory of every tensor but ``token_budget``, by name: first as it is while set 0 holds the state.
        current: Which set holds the state.
    """

    def __init__(self, graph: GraphSpec, batch: int, scratch_bytes: int) -> None:
        self._specs = {spec.name: spec for spec in (*graph.inputs, *graph.outputs)}
        self._batch = batch
        self.stream = CudaStream()
        states = [pair.input for pair in graph.state]
        carried = {pair.output: pair.input for pair in graph.carried if pair.output is not None}
        elsewhere = {*states, *carried, "token_budget"}
        self.host = {
            name: pinned_array(self._shape(name), spec.dtype)
            for name, spec in self._specs.items()
            if name not in elsewhere
        }
        self.outputs = {spec.name: self.host[spec.name] for spec in graph.outputs if spec.name in self.host}
        first = {name: self._allocate(name) for name in (*self.host, *states)}
        second = first | {name: self._allocate(name) for name in carried.values()}
        self.bound = tuple(
            now | {output: after[name] for output, name in carried.items()}
            for now, after in ((first, second), (second, first))
        )
        self.scratch = DeviceMemory(max(scratch_bytes, 1))
        self.current = 0

    def _shape(self, name: str) -> tuple[int, ...]:
        return self._specs[name].shape_for(self._batch)

    def _allocate(self, name: str) -> DeviceMemory:
        return DeviceMemory(math.prod(self._shape(name)) * np.dtype(self._specs[name].dtype).itemsize)

    def read_state(self, name: str) -> NDArray[np.generic]:
        copy: NDArray[np.generic] = np.empty(self._shape(name), self._specs[name].dtype)
        self.stream.download(self.bound[self.current][name], copy)
        self.stream.synchronize()
        return copy

    def write_state(self, values: Mapping[str, NDArray[np.generic]]) -> None:
        for name, value in values.items():
            self.stream.upload(value, self.bound[self.current][name])
        self.stream.synchronize()  # so that the values may change again

    def close(self) -> None:
        self.scratch.close()
        for memory in reversed({id(memory): memory for one in self.bound for memory in one.values()}.values()):
            memory.close()
        self.stream.close()


class _Step:
    """One budget on one of the two state sets: a context in which everything is set, and the graph recorded from it.

    It has a context of its own, because a recorded graph is good only as long as its context stays as it was.
    """

    def __init__(
        self, context: Any, memory: _Memory, graph: GraphSpec, batch: int, counts: tuple[int, ...] | None
    ) -> None:
        self._context, self._memory = context, memory
        self._tensors = memory.bound[memory.current]
        self._counts = None if counts is None else np.array(counts, np.int64)
        self._graph: CudaGraph | None = None
        self._ran = False
        for spec in graph.inputs:
            shape = spec.shape_for(batch)
            _accepted(context.set_input_shape(spec.name, shape), f"shape of {spec.name}", list(shape))
        for spec in (*graph.inputs, *graph.outputs):
            address = self._address(spec.name)
            _accepted(context.set_tensor_address(spec.name, address), f"address of {spec.name}", hex(address))
        if missing := context.infer_shapes():
            raise BackendError(f"the engine still lacks {', '.join(missing)}.")
        for spec in graph.outputs:
            _check_shape(spec, batch, tuple(context.get_tensor_shape(spec.name)))

    def _address(self, name: str) -> int:
        if name == "token_budget" and self._counts is not None:
            return self._counts.ctypes.data  # on the host: its values are read when a step is enqueued
        return self._tensors[name].address

    def enqueue(self) -> None:
        """Image up, engine, results down."""
        if self._graph is not None:
            self._memory.stream.launch(self._graph)
        else:
            self._enqueue_parts()
        self._ran = True

    def _enqueue_parts(self) -> None:
        memory = self._memory
        memory.stream.upload(memory.host["image"], self._tensors["image"])
        if not self._context.execute_async_v3(memory.stream.address):
            raise BackendError("it does not enqueue the step.")
        for name, array in memory.outputs.items():
            memory.stream.download(self._tensors[name], array)

    def record(self) -> bool:
        """Record the graph once the step has run; False, with a warning, where that is not possible."""
        if self._graph is not None or not self._ran:
            return True
        capturable = getattr(self._context, "is_stream_capturable", None)  # TensorRT-RTX alone can tell
        try:
            if capturable is not None and not capturable(self._memory.stream.address):
                raise BackendError("the library says that this engine cannot be recorded")
            self._graph = self._memory.stream.capture(self._enqueue_parts)
        except BackendError as error:
            logger.warning("no CUDA graph, so every kernel is launched by itself, which is slower: %s", error)
            return False
        return True

    def close(self) -> None:
        if self._graph is not None:
            self._graph.close()
        self._graph = self._context = None


def _layer_profiler(api: Any) -> Any:
    """A profiler that collects what the library reports after each step."""

    class LayerProfiler(api.IProfiler):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.times_ms: list[tuple[str, float]] = []

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.times_ms.append((layer_name, float(ms)))

    return LayerProfiler()


def _accepted(answer: bool, what: str, value: object) -> None:
    if not answer:
        raise BackendError(f"it refuses {value} as {what}.")


def _check_shape(spec: TensorSpec, batch: int, shape: tuple[int, ...]) -> None:
    if shape != spec.shape_for(batch):
        raise BackendError(f"{spec.name} comes out as {list(shape)}, not {list(spec.shape_for(batch))}.")
