"""TensorRT and TensorRT-RTX: an engine that ``build`` made, loaded once for any number of streams.

Nothing here imports either library; both have the same names.
"""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

from runtime.backend import EngineReport
from runtime.bundle import Bundle
from runtime.cuda import find_gpu
from runtime.engines import EngineRecord, choose_engine
from runtime.errors import BackendError, EngineMismatchError
from runtime.manifest import GraphSpec, TensorSpec
from runtime.tensorrt_buffers import TensorRtBuffers
from runtime.tensorrt_library import TensorRt, import_tensorrt

_TYPES = {
    "float32": "FLOAT",
    "float16": "HALF",
    "bfloat16": "BF16",
    "int64": "INT64",
    "bool": "BOOL",
    "uint8": "UINT8",
}


class TensorRtEngine:
    """An engine on the GPU of this machine; streams share its weights.

    Args:
        backend: ``tensorrt`` or ``tensorrt-rtx``.
        time_layers: Note the time of every layer, see :meth:`TensorRtBuffers.take_layer_times`; slower.

    Raises:
        BackendUnavailableError: The library, CUDA's bindings or the GPU is not there.
        EngineMismatchError: No engine of the bundle covers this GPU, library version and graph.
        BackendError: The library does not load the plan, for want of memory perhaps; the message has its reasons.
    """

    def __init__(
        self, bundle: Bundle, graph: GraphSpec, *, backend: str = "tensorrt", time_layers: bool = False
    ) -> None:
        self._library = import_tensorrt(backend)
        gpu = find_gpu()  # before the library is touched: without a driver it may end the process
        plan, self.record = choose_engine(bundle, graph, backend, self._library.version, gpu)
        self._engine = load_plan(self._library, plan, self.record)
        _check_tensors(self._library, self._engine, graph, plan)
        self._bundle, self.graph, self._times_layers = bundle, graph, time_layers
        self._open: weakref.WeakSet[TensorRtBuffers] = weakref.WeakSet()
        self.report = EngineReport(
            backend,
            self._library.version,
            str(gpu),
            0,
            self.record.precision,
            self.record.plan_sha256,
            self.record.largest_batch,
            self.record.budgets,
        )

    def open_stream(self, batch: int = 1, usual_budget: tuple[int, ...] | None = None) -> TensorRtBuffers:
        """Allocate the buffers of one stream, in its initial state; every budget has a profile of its own anyway.

        Raises:
            BackendError: The engine is closed, or was not built for this batch.
            DeviceError: There is not enough memory on the GPU; nothing stays allocated.
        """
        batches = sorted({profile.batch for profile in self.record.profiles})
        if batch not in batches:
            raise BackendError(
                f"the engine was built for a batch of {' or '.join(map(str, batches))}, not of {batch}. Build it "
                f"again: deploy.py build {self._bundle.folder} --backend {self.report.backend} --batch {batch}"
            )
        if self._engine is None:
            raise BackendError(f"the engine of {self._bundle.folder} is closed.")
        buffers = TensorRtBuffers(
            self._library, self._engine, self._bundle, self.graph, self.record, batch, time_layers=self._times_layers
        )
        self._open.add(buffers)
        return buffers

    @property
    def cuda_graph(self) -> bool:
        """Whether the open streams launch their steps as CUDA graphs, once warm."""
        return all(buffers.graphs_allowed for buffers in self._open)

    def account(self) -> str:
        """The library's own account of the layers, as JSON; see :func:`read_layers`."""
        return read_layers(self._library, self._engine)

    def close(self) -> None:
        """Give the streams' buffers and the engine back; may be called twice."""
        for buffers in list(self._open):
            buffers.close()
        self._engine = None


def load_plan(library: TensorRt, plan: Path, record: EngineRecord) -> Any:
    """The library's engine object of a plan; a GPU has to be there.

    Raises:
        BackendError: The library refuses it or has not enough memory; the message has its reasons.
    """
    library.forget()
    runtime = library.api.Runtime(library.log)
    if record.version_compatible:
        runtime.engine_host_code_allowed = True  # the plan brings the runtime of the version that built it
    engine = runtime.deserialize_cuda_engine(plan.read_bytes())
    if engine is None:
        raise BackendError(
            f"{library} does not load {plan}:{library.reasons()}\nIf memory is short, close what else uses the GPU or "
            f"build for fewer budgets; otherwise build it again: deploy.py build {plan.parent.parent} --force"
        )
    return engine


def read_layers(library: TensorRt, engine: Any) -> str:
    """The library's own account of an engine's layers, as JSON.

    Raises:
        BackendError: It gives none.
    """
    library.forget()
    inspector = engine.create_engine_inspector()
    told = inspector.get_engine_information(library.api.LayerInformationFormat.JSON)
    if not told:
        raise BackendError(f"{library} tells nothing of the engine's layers:{library.reasons()}")
    return str(told)


def _check_tensors(library: TensorRt, engine: Any, graph: GraphSpec, plan: Path) -> None:
    """The engine has the graph's tensors, and reads the budget on the host."""
    there = {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}
    specs = {spec.name: spec for spec in (*graph.inputs, *graph.outputs)}
    wrong = [f"{name} is missing" for name in specs.keys() - there]
    wrong += [f"{name} is not in {graph.file}" for name in there - specs.keys()]
    for name in specs.keys() & there:
        wrong += _wrong_tensor(library.api, engine, specs[name])
    if wrong:
        raise EngineMismatchError(f"{plan} is no engine of {graph.file}: {'; '.join(sorted(wrong))}. Build it again.")


def _wrong_tensor(api: Any, engine: Any, spec: TensorSpec) -> list[str]:
    got = engine.get_tensor_dtype(spec.name).name
    on_host = engine.get_tensor_location(spec.name) == api.TensorLocation.HOST
    wrong = [] if got == _TYPES[spec.dtype] else [f"{spec.name} is {got}, not {_TYPES[spec.dtype]}"]
    if on_host != (spec.name == "token_budget"):
        wrong.append(f"{spec.name} is read on the {'host' if on_host else 'GPU'}")
    return wrong
