"""CUDA for one GPU, device 0, through NVIDIA's own Python bindings: memory, a stream, graphs; no status is ignored."""

from __future__ import annotations

import contextlib
import ctypes
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.errors import BackendUnavailableError, DeviceError


@dataclass(frozen=True)
class Gpu:
    """The GPU that is used.

    Attributes:
        name: As its driver says it, e.g. ``NVIDIA GeForce RTX 4090``; ``Orin`` on every Jetson of that family.
        compute_capability: Major and minor number, e.g. ``sm87``.
    """

    name: str
    compute_capability: str

    def __str__(self) -> str:
        return f"{self.name} ({self.compute_capability})"


def find_gpu() -> Gpu:
    """The GPU of this machine; of several, the first that ``CUDA_VISIBLE_DEVICES`` shows.

    Raises:
        BackendUnavailableError: The bindings are not installed, or CUDA finds no GPU.
    """
    try:
        call("cudaGetDeviceCount")
        properties = call("cudaGetDeviceProperties", 0)
    except DeviceError as error:
        raise BackendUnavailableError(
            f"there is no NVIDIA GPU that CUDA can use here: {error} On a machine without one, the backends "
            "onnxruntime and openvino run on the CPU, and `build --backend tensorrt-rtx` builds for other machines."
        ) from error
    name = bytes(properties.name).split(b"\0")[0].decode(errors="replace")
    return Gpu(name, f"sm{properties.major}{properties.minor}")


def call(function: str, *arguments: Any) -> Any:
    """Call a function of the CUDA runtime by its name and return what it gives besides its status.

    Raises:
        BackendUnavailableError: The bindings are not installed.
        DeviceError: The status is not success.
    """
    runtime = _bindings()
    status, *results = getattr(runtime, function)(*arguments)
    if status.name != "cudaSuccess":
        raise DeviceError(_failure(runtime, function, arguments, status))
    return results[0] if results else None


def _bindings() -> Any:
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise BackendUnavailableError(
            f"CUDA's Python bindings are not there ({error}). Install them in the major version of your driver's "
            "CUDA, which nvidia-smi shows: pip install 'cuda-bindings==13.*', or 12.* on JetPack 6."
        ) from error
    return runtime


def _failure(runtime: Any, function: str, arguments: tuple[Any, ...], status: Any) -> str:
    runtime.cudaGetLastError()  # or the next launch would report this failure once more
    if status.name != "cudaErrorMemoryAllocation":
        _, text = runtime.cudaGetErrorString(status)
        return f"{function} failed with {status.name}: {text.decode()}."
    memory_status, free, total = runtime.cudaMemGetInfo()
    left = (
        f"{_mib(free)} of {_mib(total)} are free" if memory_status.name == "cudaSuccess" else "nobody knows how much is"
    )
    return (
        f"{function} got no {_mib(arguments[0])}: {left}. Close what else uses the GPU, open fewer streams, or build "
        "the engine for fewer budgets or a smaller batch."
    )


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"


def _release(function: str, handle: Any) -> None:
    """Free something whose owner is gone; that the device is gone as well is no news by then."""
    with contextlib.suppress(DeviceError):
        call(function, handle)


class DeviceMemory:
    """Bytes on the GPU, freed by :meth:`close` or with the object."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.address = int(call("cudaMalloc", nbytes))
        self.close = weakref.finalize(self, _release, "cudaFree", self.address)


def pinned_array(shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
    """Zeros in page-locked memory, which the GPU copies from and to by itself; freed with the last view of them."""
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    address = int(call("cudaHostAlloc", nbytes, 0))
    memory = (ctypes.c_ubyte * nbytes).from_address(address)
    weakref.finalize(memory, _release, "cudaFreeHost", address)
    array: NDArray[Any] = np.frombuffer(memoryview(memory), dtype).reshape(shape)
    array[...] = np.zeros((), dtype)
    return array


class CudaStream:
    """A queue of work on the GPU. What is enqueued runs later, in order; :meth:`synchronize` waits for it."""

    def __init__(self) -> None:
        self._handle = call("cudaStreamCreateWithFlags", _bindings().cudaStreamNonBlocking)
        self.address = int(self._handle)
        self.close = weakref.finalize(self, _release, "cudaStreamDestroy", self._handle)

    def upload(self, source: NDArray[Any], target: DeviceMemory) -> None:
        """Enqueue a copy to the GPU; ``source`` has to stay as it is until it was waited for."""
        self._copy(target.address, source.ctypes.data, source.nbytes, "cudaMemcpyHostToDevice")

    def download(self, source: DeviceMemory, target: NDArray[Any]) -> None:
        """Enqueue a copy from the GPU into a contiguous array."""
        self._copy(target.ctypes.data, source.address, target.nbytes, "cudaMemcpyDeviceToHost")

    def _copy(self, target: int, source: int, nbytes: int, kind: str) -> None:
        call("cudaMemcpyAsync", target, source, nbytes, getattr(_bindings().cudaMemcpyKind, kind), self._handle)

    def synchronize(self) -> None:
        """Wait until all is done; failures of what was enqueued come out here."""
        call("cudaStreamSynchronize", self._handle)

    def capture(self, enqueue: Callable[[], None]) -> CudaGraph:
        """Record what ``enqueue`` enqueues, without running it.

        Other threads may go on using the GPU meanwhile.
        """
        call("cudaStreamBeginCapture", self._handle, _bindings().cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
        try:
            enqueue()
        except BaseException:
            with contextlib.suppress(DeviceError):
                call("cudaGraphDestroy", call("cudaStreamEndCapture", self._handle))
            raise
        return CudaGraph(call("cudaStreamEndCapture", self._handle))

    def launch(self, graph: CudaGraph) -> None:
        """Enqueue a recorded graph."""
        call("cudaGraphLaunch", graph.executable, self._handle)


class CudaGraph:
    """Work recorded once, with all its addresses, and launched as one."""

    def __init__(self, recorded: Any) -> None:
        try:
            self.executable = call("cudaGraphInstantiate", recorded, 0)
        finally:
            call("cudaGraphDestroy", recorded)
        self.close = weakref.finalize(self, _release, "cudaGraphExecDestroy", self.executable)
