"""Bundle -> engines in its folder ``engines``, each with a record of what it was built from.

Neither torch nor onnx is needed here, and TensorRT-RTX builds without a GPU.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from pathlib import Path

from export.engine_layers import differences, layer_types
from export.engine_plan import Watch, build_plan
from export.engine_request import EngineRequest, engine_inputs
from runtime.bundle import Bundle
from runtime.cuda import Gpu, find_gpu
from runtime.engines import (
    EngineInputs,
    EngineRecord,
    layers_path,
    plan_is_whole,
    plan_path,
    read_record,
    record_path,
)
from runtime.errors import BackendUnavailableError, EngineMismatchError
from runtime.manifest import GraphSpec
from runtime.tensorrt_backend import load_plan, read_layers
from runtime.tensorrt_library import TensorRt, import_tensorrt
from runtime.video.output_file import OutputFile, writing


@dataclass(frozen=True)
class BuiltEngine:
    """An engine on disk.

    Attributes:
        plan: Its file.
        record: What it was built from.
        reused: It was there already, from the same inputs.
        differences: Where the types of its layers are not those that the graph asks for; None if it was not read back,
            because no GPU is here that runs it.
    """

    plan: Path
    record: EngineRecord
    reused: bool
    differences: list[str] | None


def build_engines(
    bundle: Bundle, backend: str, request: EngineRequest, *, force: bool = False, watch: Watch | None = None
) -> list[BuiltEngine]:
    """Build the bundle's graph, and its baseline if it has one; an engine with the same inputs stays as it is.

    What was there before is replaced only when the new engine is whole.

    Args:
        backend: ``tensorrt`` or ``tensorrt-rtx``.
        force: Build even so.

    Raises:
        TokenBudgetError: There is no budget, or one that the model or TensorRT does not take.
        BackendUnavailableError: The library is not there; or TensorRT's GPU is not.
        BackendError: The library refuses the graph or what is asked of it, memory ran out, or the build was stopped.
    """
    library = import_tensorrt(backend)
    gpu = _gpu(library)
    graphs = [graph for graph in (bundle.manifest.graph, bundle.manifest.baseline) if graph is not None]
    checked = [(graph, engine_inputs(bundle, graph, request, library, gpu)) for graph in graphs]
    return [_build(bundle, library, gpu, graph, inputs, force, watch or Watch()) for graph, inputs in checked]


def _gpu(library: TensorRt) -> Gpu | None:
    """The GPU here; TensorRT-RTX does without one."""
    try:
        return find_gpu()
    except BackendUnavailableError:
        if not library.is_rtx:
            raise
        return None


def _build(
    bundle: Bundle,
    library: TensorRt,
    gpu: Gpu | None,
    graph: GraphSpec,
    inputs: EngineInputs,
    force: bool,
    watch: Watch,
) -> BuiltEngine:
    plan = plan_path(bundle, inputs)
    record = None if force else _record_of_same(plan, inputs)
    reused = record is not None
    if record is None:
        record = _build_plan(bundle, library, graph, inputs, plan, watch)
    found = None
    if gpu is not None and record.why_not(library.version, gpu) is None:
        record, found = _read_back(library, plan, record)
    return BuiltEngine(plan, record, reused, found)


def _record_of_same(plan: Path, inputs: EngineInputs) -> EngineRecord | None:
    """The record of a whole engine that was built from these inputs."""
    try:
        record = read_record(plan)
    except EngineMismatchError:
        return None
    return record if record.inputs() == inputs and plan_is_whole(plan, record) else None


def _build_plan(
    bundle: Bundle, library: TensorRt, graph: GraphSpec, inputs: EngineInputs, plan: Path, watch: Watch
) -> EngineRecord:
    with writing(plan):
        plan.parent.mkdir(exist_ok=True)
    cache = None if library.is_rtx else plan.with_name(f"timing{plan.name.removeprefix(Path(graph.file).stem)}.cache")
    started = time.monotonic()
    timings = cache.read_bytes() if cache is not None and cache.is_file() else None
    built = build_plan(library, bundle.path(graph), graph, inputs, timings, watch)
    record = EngineRecord(
        **inputs.model_dump(),
        plan_sha256=hashlib.sha256(built.data).hexdigest(),
        plan_bytes=len(built.data),
        build_s=round(time.monotonic() - started, 2),
        asked=built.asked,
    )
    layers_path(plan).unlink(missing_ok=True)
    for path, data in ((plan, built.data), (record_path(plan), _as_json(record)), (cache, built.timings)):
        if path is not None:
            _write(path, data)
    return record


def _read_back(library: TensorRt, plan: Path, record: EngineRecord) -> tuple[EngineRecord, list[str]]:
    """Load the engine, keep what the library tells of its layers, and compare their types with what was asked."""
    if record.found is None or not layers_path(plan).is_file():
        told = read_layers(library, load_plan(library, plan, record))
        _write(layers_path(plan), told.encode())
        record = record.model_copy(update={"found": layer_types(told)})
        _write(record_path(plan), _as_json(record))
    return record, differences(record.asked, record.found or {})


def _as_json(record: EngineRecord) -> bytes:
    return f"{record.model_dump_json(indent=2)}\n".encode()


def _write(path: Path, data: bytes) -> None:
    """Write a file that is whole or not there.

    Raises:
        SinkError: The disk is full, or the folder may not be written to.
    """
    file = OutputFile(path)
    try:
        with writing(path):
            file.partial.write_bytes(data)
        file.commit()
    finally:
        file.discard()
