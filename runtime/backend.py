"""What a backend has to be able to do, and which there are.

An :class:`Engine` is one graph loaded on one device; any number of :class:`StreamBuffers`, each with the state of one
stream or of one batch of streams, step through it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.bundle import Bundle
from runtime.errors import BackendUnavailableError
from runtime.machine import available_cores
from runtime.manifest import GraphSpec


@dataclass(frozen=True)
class EngineReport:
    """What a graph really runs on, and what it takes there.

    Attributes:
        backend: Name that ``--backend`` takes.
        version: Version of the library.
        provider: Execution provider or device that all nodes run on.
        threads: CPU threads of one step; 0 leaves it to the library.
        precision: What it computes in.
        plan_sha256: Hash of the plan file that was loaded; empty where the graph itself is.
        largest_batch: Streams that are worth stepping together, at most; 1 where one after the other is as fast.
        budgets: The token budgets that the engine was built for; None: it takes any.
    """

    backend: str
    version: str
    provider: str
    threads: int
    precision: str = "fp32"
    plan_sha256: str = ""
    largest_batch: int = 1
    budgets: tuple[tuple[int, ...], ...] | None = None

    @property
    def on_cpu(self) -> bool:
        """Whether steps run on the CPU, in host memory."""
        return self.provider.startswith("CPU")

    @property
    def leaves_a_core(self) -> bool:
        """Whether a CPU core is free while a step runs, for work beside it."""
        return not self.on_cpu or 0 < self.threads < available_cores()

    def __str__(self) -> str:
        threads = f", {self.threads} threads" if self.threads else ""
        return f"{self.backend} {self.version} on {self.provider}{threads}"


class StreamBuffers(Protocol):
    """All memory of one stream, or of a batch of streams; allocated once.

    Attributes:
        image: uint8 [B, H, W, 3]; write the frame here before :meth:`run`.
    """

    image: NDArray[np.uint8]

    def run(self, token_budget: tuple[int, ...] | None) -> Mapping[str, NDArray[np.generic]]:
        """Run one step on ``image`` and the current state.

        Returns:
            The outputs that are not state, by name: views that the next call overwrites.

        Raises:
            StepError: The library refused or failed; the state is what it was.
        """

    def commit(self) -> None:
        """Make the state that :meth:`run` left the current one."""

    def reset(self) -> None:
        """Go back to the initial state."""

    def state(self) -> dict[str, NDArray[np.generic]]:
        """A copy of the current state, by input name."""

    def set_state(self, state: Mapping[str, NDArray[np.generic]]) -> None:
        """Overwrite the current state."""


class Engine(Protocol):
    """A graph loaded on a device."""

    report: EngineReport
    graph: GraphSpec

    def open_stream(self, batch: int = 1, usual_budget: tuple[int, ...] | None = None) -> StreamBuffers:
        """Allocate the buffers of one stream, in its initial state.

        Args:
            usual_budget: Tokens kept at each stage by most frames; a backend that can make itself faster for one
                budget does. The others stay possible; a graph without selection has none.
        """

    def close(self) -> None:
        """Give everything back; may be called twice."""


EngineFactory = Callable[[Bundle, GraphSpec, int, str | None], Engine]


def _onnxruntime(bundle: Bundle, graph: GraphSpec, threads: int, precision: str | None) -> Engine:
    from runtime.onnxruntime_backend import OnnxRuntimeEngine

    _check_precision(bundle, precision)
    if "bf16" in (bundle.manifest.precision, bundle.manifest.rest_precision):
        raise BackendUnavailableError(
            f"{bundle.folder} computes in bf16, which ONNX Runtime has not on CPUs. Take --backend openvino, or a GPU."
        )
    return OnnxRuntimeEngine(bundle, graph, threads=threads)


def _onnxruntime_cuda(*, cuda_graph: bool) -> EngineFactory:
    def load(bundle: Bundle, graph: GraphSpec, threads: int, precision: str | None) -> Engine:
        from runtime.onnxruntime_backend import OnnxRuntimeEngine

        tf32 = precision == "tf32" and bundle.manifest.precision == "fp32"
        if not tf32:
            _check_precision(bundle, precision, ", or for a graph in fp32 in tf32")
        return OnnxRuntimeEngine(
            bundle, graph, provider="CUDAExecutionProvider", threads=threads, tf32=tf32, cuda_graph=cuda_graph
        )

    return load


def _check_precision(bundle: Bundle, precision: str | None, others: str = "") -> None:
    if precision not in (None, bundle.manifest.precision):
        raise BackendUnavailableError(
            f"ONNX Runtime computes in the precision of the graph, {bundle.manifest.precision}{others}, "
            f"not in {precision}."
        )


def _openvino(bundle: Bundle, graph: GraphSpec, threads: int, precision: str | None) -> Engine:
    from runtime.openvino_backend import OpenVinoEngine

    return OpenVinoEngine(bundle, graph, threads=threads, precision=precision or "fp32")


def _tensorrt(backend: str) -> EngineFactory:
    def load(bundle: Bundle, graph: GraphSpec, threads: int, precision: str | None) -> Engine:
        from runtime.tensorrt_backend import TensorRtEngine

        if precision not in (None, bundle.manifest.precision):
            raise BackendUnavailableError(
                f"{backend} computes in the precision of the graph, {bundle.manifest.precision}, not in {precision}."
            )
        return TensorRtEngine(bundle, graph, backend=backend)

    return load


BACKENDS: dict[str, EngineFactory] = {
    "onnxruntime": _onnxruntime,
    "onnxruntime-cuda": _onnxruntime_cuda(cuda_graph=False),
    "onnxruntime-cuda-graph": _onnxruntime_cuda(cuda_graph=True),
    "openvino": _openvino,
    "tensorrt": _tensorrt("tensorrt"),
    "tensorrt-rtx": _tensorrt("tensorrt-rtx"),
}
# What a backend computes in where it can choose; the others compute in the graph's precision
PRECISIONS: dict[str, tuple[str, ...]] = {
    "onnxruntime-cuda": ("fp32", "tf32"),
    "onnxruntime-cuda-graph": ("fp32", "tf32"),
    "openvino": ("fp32", "bf16"),
}
DEFAULT_BACKEND = "onnxruntime"


def load_engine(
    bundle: Bundle,
    graph: GraphSpec | None = None,
    *,
    backend: str = DEFAULT_BACKEND,
    threads: int = 0,
    precision: str | None = None,
) -> Engine:
    """Load a graph of a bundle; never on another backend or device than the one named.

    Args:
        graph: The bundle's main graph if None.
        backend: One of :data:`BACKENDS`.
        threads: CPU threads of one step; 0 leaves it to the library.
        precision: What the backend computes in, where it can choose: see :data:`PRECISIONS`. None is the graph's
            own.

    Raises:
        BackendUnavailableError: The backend is unknown, not installed, or has not the device or the precision.
        BackendError: The graph cannot be loaded.
    """
    if backend not in BACKENDS:
        raise BackendUnavailableError(f"no backend is called {backend!r}; there are {', '.join(BACKENDS)}.")
    return BACKENDS[backend](bundle, graph or bundle.manifest.graph, threads, precision)
