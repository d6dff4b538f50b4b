"""Layer by layer: where a backend's values leave those of ONNX Runtime without optimisations.

polygraphy marks every tensor of the graph as an output and runs the marked graph on both. With all tensors wanted a
backend can fuse little, so an error that only a fusion makes does not show here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.agreement import sqnr_db
from runtime.backend import load_engine
from runtime.bundle import Bundle
from runtime.errors import BackendUnavailableError, DeployError
from runtime.manifest import GraphSpec
from runtime.openvino_backend import OpenVinoEngine
from runtime.parity import relative_difference
from runtime.reference import Case, cases, inputs, read_reference

COMPARED = ("onnxruntime", "onnxruntime-cuda", "openvino")


@dataclass(frozen=True)
class LayerAgreement:
    """One tensor between two layers.

    Attributes:
        tensor: Its name in the graph.
        node, op_type: What makes it.
        sqnr_db: Signal-to-noise ratio against ONNX Runtime, decibels; infinite if equal, of integers as of numbers.
    """

    tensor: str
    node: str
    op_type: str
    sqnr_db: float


def compare_layers(
    bundle: Bundle,
    backend: str,
    *,
    precision: str | None = None,
    threads: int = 0,
    frame: int = 1,
    dense: bool = False,
) -> list[LayerAgreement]:
    """Compare every tensor of the bundle's graph at one frame of the reference clip, at the default preset.

    Args:
        backend: One of :data:`COMPARED`; ``onnxruntime`` is compared with its own optimisations.
        precision: As for :func:`runtime.backend.load_engine`.
        frame: Index in the clip; frame 0 has no prior.
        dense: Take the dense graph of the bundle. In the other one a TopK that ranks two tokens the other way round
            swaps their rows in all that follows.

    Returns:
        The tensors in the order of the graph.

    Raises:
        BackendUnavailableError: polygraphy or the backend is not there.
        DeployError: The backend cannot be run layer by layer, or there is no such frame or no dense graph.
    """
    if backend not in COMPARED:
        raise DeployError(
            f"{backend} cannot be run layer by layer from here, only {', '.join(COMPARED)}. For TensorRT run "
            "polygraphy on the device; docs/verify.md has the command."
        )
    polygraphy, graph = _import_polygraphy(), bundle.manifest.baseline if dense else bundle.manifest.graph
    if graph is None:
        raise DeployError(f"{bundle.folder} has no dense graph. Export it again without --no-baseline.")
    fed = inputs(*_frame(bundle, frame), graph)
    load_engine(bundle, backend=backend, threads=threads, precision=precision).close()  # its errors are clearer
    with TemporaryDirectory() as folder:
        marked = Path(folder) / "marked.onnx"
        makers = _mark_all(polygraphy, bundle.path(graph), marked)
        runners = [
            polygraphy.OnnxrtRunner(lambda: _session(marked, "CPUExecutionProvider", threads, optimised=False)),
            _runner(polygraphy, replace(bundle, folder=marked.parent), graph, backend, threads, precision),
        ]
        (_, (want,)), (_, (got,)) = polygraphy.Comparator.run(runners, data_loader=[fed]).items()
        return [LayerAgreement(name, *makers[name], _ratio(got[name], want[name])) for name in makers if name in got]


def _frame(bundle: Bundle, frame: int) -> tuple[dict[str, NDArray[np.generic]], Case]:
    reference = read_reference(bundle)
    frames = cases(bundle, reference, bundle.manifest.default_preset)
    if not 0 <= frame < len(frames):
        raise DeployError(f"the reference clip has frames 0 to {len(frames) - 1}, not {frame}.")
    return reference, frames[frame]


def _import_polygraphy() -> SimpleNamespace:
    """What is used of polygraphy, made silent."""
    try:
        import onnx_graphsurgeon  # noqa: F401  polygraphy imports it when it is needed, and would install it
        from polygraphy import constants, logger
        from polygraphy.backend.base import BaseRunner
        from polygraphy.backend.onnx import modify_outputs, onnx_from_path, save_onnx
        from polygraphy.backend.onnxrt import OnnxrtRunner
        from polygraphy.common import TensorMetadata
        from polygraphy.comparator import Comparator
    except ImportError as error:
        raise BackendUnavailableError(
            f"comparing layer by layer needs {error.name}. Install it: pip install '.[layers]'"
        ) from error
    logger.G_LOGGER.module_severity = logger.G_LOGGER.ERROR
    return SimpleNamespace(
        BaseRunner=BaseRunner,
        Comparator=Comparator,
        OnnxrtRunner=OnnxrtRunner,
        TensorMetadata=TensorMetadata,
        MARK_ALL=constants.MARK_ALL,
        modify_outputs=modify_outputs,
        onnx_from_path=onnx_from_path,
        save_onnx=save_onnx,
    )


def _mark_all(polygraphy: SimpleNamespace, source: Path, target: Path) -> dict[str, tuple[str, str]]:
    """Write the graph with every tensor as an output.

    Returns:
        Name and type of the node that makes each tensor, in the order of the graph.
    """
    model = polygraphy.modify_outputs(polygraphy.onnx_from_path(str(source)), outputs=polygraphy.MARK_ALL)
    polygraphy.save_onnx(model, str(target))
    return {name: (node.name, node.op_type) for node in model.graph.node for name in node.output if name}


def _session(path: Path, provider: str, threads: int, *, optimised: bool = True) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    if not optimised:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(str(path), options, providers=[provider])


def _runner(
    polygraphy: SimpleNamespace, marked: Bundle, graph: GraphSpec, backend: str, threads: int, precision: str | None
) -> Any:
    graph = graph.model_copy(update={"file": "marked.onnx"})
    if backend == "openvino":
        engine = OpenVinoEngine(marked, graph, threads=threads, precision=precision or "fp32")
        return _openvino_runner(polygraphy, engine)
    provider: Any = "CPUExecutionProvider"
    if backend == "onnxruntime-cuda":
        provider = ("CUDAExecutionProvider", {"use_tf32": str(int(precision == "tf32"))})
    return polygraphy.OnnxrtRunner(lambda: _session(marked.path(graph), provider, threads))


def _openvino_runner(polygraphy: SimpleNamespace, engine: OpenVinoEngine) -> Any:
    """polygraphy has no runner for OpenVINO."""

    class OpenVinoRunner(polygraphy.BaseRunner):  # type: ignore[name-defined, misc]
        def get_input_metadata_impl(self) -> Any:
            metadata = polygraphy.TensorMetadata()
            for spec in engine.graph.inputs:
                metadata.add(spec.name, np.dtype(spec.dtype), spec.shape_for(1))
            return metadata

        def infer_impl(self, feed_dict: Mapping[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
            started = time.perf_counter()
            results = engine.compiled(1)(dict(feed_dict))
            self.inference_time = time.perf_counter() - started
            return {name: np.array(value) for port, value in results.items() for name in port.get_names()}

    return OpenVinoRunner(prefix="openvino-runner")


def _ratio(got: NDArray[np.generic], want: NDArray[np.generic]) -> float:
    """Signal-to-noise ratio of two arrays; minus infinity where their shapes, or what is not finite, differ."""
    if got.shape != want.shape or not np.isfinite(relative_difference(got, want)):
        return -math.inf
    finite = np.isfinite(want)
    a, b = got[finite].astype(np.float64), want[finite].astype(np.float64)
    return sqnr_db(float(b @ b), float((a - b) @ (a - b)))
