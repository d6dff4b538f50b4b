"""CUDA's runtime bindings on ordinary memory: what is enqueued runs when it is waited for, and nothing is forgiven.

Addresses are real addresses of this process. A copy has to stay inside what is allocated at the moment it runs, and
memory that is not page-locked may not be copied while a graph is recorded.
"""

from __future__ import annotations

import ctypes
import enum
import inspect
import itertools
from collections import Counter
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import numpy as np

Status = enum.IntEnum(
    "cudaError_t",
    {
        "cudaSuccess": 0,
        "cudaErrorInvalidValue": 1,
        "cudaErrorMemoryAllocation": 2,
        "cudaErrorInsufficientDriver": 35,
        "cudaErrorIllegalAddress": 700,
        "cudaErrorStreamCaptureUnsupported": 900,
        "cudaErrorStreamCaptureInvalidated": 901,
    },
)


class FakeStream:
    """Work that waits, and the recording if there is one."""

    def __init__(self) -> None:
        self.waiting: list[Callable[[], None]] = []
        self.recording: list[Callable[[], None]] | None = None

    def enqueue(self, work: Callable[[], None]) -> None:
        (self.waiting if self.recording is None else self.recording).append(work)


class FakeCuda(ModuleType):
    """``cuda.bindings.runtime`` with one GPU.

    Attributes:
        calls: How often each function was called.
        fail: Status that a function gives next, by its name; ``(skip, status)`` lets some calls pass before.
        device, pinned: Live allocations, bytes by address.
        limit: Bytes that fit on the GPU.
    """

    def __init__(self, name: str = "NVIDIA GeForce RTX 4090", capability: tuple[int, int] = (8, 9)) -> None:
        super().__init__("cuda.bindings.runtime")
        self.calls: Counter[str] = Counter()
        self.fail: dict[str, tuple[int, Status]] = {}
        self.device: dict[int, np.ndarray] = {}
        self.pinned: dict[int, np.ndarray] = {}
        self.limit = 2**40
        self.streams: dict[int, FakeStream] = {}
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.gpu: tuple[str, tuple[int, int]] | None = (name, capability)
        self._handles = itertools.count(1)
        self.cudaError_t = Status
        self.cudaStreamNonBlocking = 1
        kinds = ["HostToHost", "HostToDevice", "DeviceToHost", "DeviceToDevice"]
        self.cudaMemcpyKind = enum.IntEnum("cudaMemcpyKind", [f"cudaMemcpy{kind}" for kind in kinds], start=0)
        modes = ["Global", "ThreadLocal", "Relaxed"]
        self.cudaStreamCaptureMode = enum.IntEnum(
            "cudaStreamCaptureMode", [f"cudaStreamCaptureMode{mode}" for mode in modes], start=0
        )

    def __getattribute__(self, name: str):
        value = super().__getattribute__(name)
        is_function = name.startswith("cuda") and name[4].isupper() and inspect.ismethod(value)
        return self._counted(name, value) if is_function else value

    def _counted(self, name: str, function: Callable[..., tuple]) -> Callable[..., tuple]:
        def call(*arguments):
            self.calls[name] += 1
            skip, status = self.fail.get(name, (0, Status.cudaSuccess))
            if name in self.fail:
                if skip == 0:
                    del self.fail[name]
                    if name == "cudaStreamEndCapture":  # a recording that went wrong is over all the same
                        self.streams[int(arguments[0])].recording = None
                    return (status, None)
                self.fail[name] = skip - 1, status
            return function(*arguments)

        return call

    def alive(self) -> int:
        """Everything that was made and not given back."""
        return len(self.device) + len(self.pinned) + len(self.streams) + len(self.graphs)

    # The GPU

    def cudaGetDeviceCount(self):
        return (Status.cudaSuccess, 1) if self.gpu else (Status.cudaErrorInsufficientDriver, None)

    def cudaGetDeviceProperties(self, device):
        name, (major, minor) = self.gpu
        return Status.cudaSuccess, SimpleNamespace(name=name.encode() + b"\0\0", major=major, minor=minor)

    def cudaGetErrorString(self, error):
        return Status.cudaSuccess, f"text of {error.name}".encode()

    def cudaGetLastError(self):
        return (Status.cudaSuccess,)

    def cudaMemGetInfo(self):
        return Status.cudaSuccess, self.limit - self._used(), self.limit

    # Memory

    def _used(self) -> int:
        return sum(memory.nbytes for memory in self.device.values())

    def cudaMalloc(self, size):
        if any(stream.recording is not None for stream in self.streams.values()):
            return Status.cudaErrorStreamCaptureUnsupported, None
        if self._used() + size > self.limit:
            return Status.cudaErrorMemoryAllocation, None
        return Status.cudaSuccess, self._keep(self.device, size)

    def cudaHostAlloc(self, size, flags):
        return Status.cudaSuccess, self._keep(self.pinned, size)

    def _keep(self, where: dict[int, np.ndarray], size: int) -> int:
        memory = np.full(size, 0xA5, np.uint8)  # nobody may count on zeros
        where[memory.ctypes.data] = memory
        return memory.ctypes.data

    def cudaFree(self, devPtr):
        return (Status.cudaSuccess if self.device.pop(devPtr, None) is not None else Status.cudaErrorInvalidValue,)

    def cudaFreeHost(self, ptr):
        return (Status.cudaSuccess if self.pinned.pop(ptr, None) is not None else Status.cudaErrorInvalidValue,)

    def inside(self, address: int, size: int, *where: dict[int, np.ndarray]) -> bool:
        """Whether these bytes are allocated."""
        return any(
            start <= address and address + size <= start + memory.nbytes
            for kind in where
            for start, memory in kind.items()
        )

    def cudaMemcpyAsync(self, dst, src, count, kind, stream):
        up = kind == self.cudaMemcpyKind.cudaMemcpyHostToDevice
        device, host = (dst, src) if up else (src, dst)
        queue = self.streams[int(stream)]
        if not self.inside(device, count, self.device):
            return (Status.cudaErrorInvalidValue,)
        if queue.recording is not None and not self.inside(host, count, self.pinned):
            return (Status.cudaErrorStreamCaptureUnsupported,)

        def copy() -> None:
            assert self.inside(device, count, self.device), "copied after it was freed"
            ctypes.memmove(dst, src, count)

        queue.enqueue(copy)
        return (Status.cudaSuccess,)

    # Streams and graphs

    def _new(self, where: dict, thing) -> int:
        handle = next(self._handles)
        where[handle] = thing
        return handle

    def cudaStreamCreateWithFlags(self, flags):
        return Status.cudaSuccess, self._new(self.streams, FakeStream())

    def cudaStreamDestroy(self, stream):
        self.streams.pop(int(stream))
        return (Status.cudaSuccess,)

    def cudaStreamSynchronize(self, stream):
        queue = self.streams[int(stream)]
        if queue.recording is not None:
            return (Status.cudaErrorStreamCaptureUnsupported,)
        waiting, queue.waiting = queue.waiting, []
        for work in waiting:
            work()
        return (Status.cudaSuccess,)

    def cudaStreamBeginCapture(self, stream, mode):
        self.streams[int(stream)].recording = []
        return (Status.cudaSuccess,)

    def cudaStreamEndCapture(self, stream):
        queue = self.streams[int(stream)]
        recorded, queue.recording = queue.recording, None
        return Status.cudaSuccess, self._new(self.graphs, recorded)

    def cudaGraphInstantiate(self, graph, flags):
        return Status.cudaSuccess, self._new(self.graphs, self.graphs[graph])

    def cudaGraphDestroy(self, graph):
        self.graphs.pop(graph)
        return (Status.cudaSuccess,)

    def cudaGraphExecDestroy(self, graphExec):
        self.graphs.pop(graphExec)
        return (Status.cudaSuccess,)

    def cudaGraphLaunch(self, graphExec, stream):
        for work in self.graphs[graphExec]:
            self.streams[int(stream)].enqueue(work)
        return (Status.cudaSuccess,)
