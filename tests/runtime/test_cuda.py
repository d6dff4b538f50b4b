"""What is asked of CUDA's bindings is there, and every status that is not success is an error that says what to do."""

from __future__ import annotations

import gc
import re
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from fake_cuda import FakeCuda, Status

import runtime.cuda
from runtime.cuda import CudaStream, DeviceMemory, Gpu, call, find_gpu, pinned_array
from runtime.errors import BackendUnavailableError, DeviceError

SOURCE = Path(runtime.cuda.__file__).read_text()


@pytest.fixture
def cuda(monkeypatch) -> FakeCuda:
    fake, bindings = FakeCuda("Orin", (8, 7)), ModuleType("cuda.bindings")
    bindings.runtime = fake
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    return fake


def test_the_real_bindings_have_every_function_with_as_many_arguments():
    """And so the fake, which takes the same arguments, is no looser than they are."""
    bindings = pytest.importorskip("cuda.bindings.runtime")
    used = set(re.findall(r"\bcuda[A-Z]\w+", SOURCE)) - {"cudaSuccess", "cudaErrorMemoryAllocation"}
    constants = {
        name for name in used if not callable(getattr(FakeCuda(), name, None)) or "Mode" in name or "Kind" in name
    }
    places = [bindings, bindings.cudaMemcpyKind, bindings.cudaStreamCaptureMode, bindings.cudaError_t]
    for name in constants:
        assert any(hasattr(place, name) for place in places), name
    for name in used - constants:
        signature = getattr(bindings, name).__doc__.strip().splitlines()[0]
        arguments = re.fullmatch(rf"{name}\((.*)\)", signature)
        assert arguments is not None, signature
        expected = FakeCuda.__dict__[name].__code__.co_argcount - 1
        assert len([part for part in arguments[1].split(",") if part.strip()]) == expected, signature
    assert "cudaGraphLaunch" in used and "cudaStreamNonBlocking" in constants


def test_gpu_has_the_name_and_generation_that_the_driver_says(cuda):
    assert find_gpu() == Gpu("Orin", "sm87") and str(find_gpu()) == "Orin (sm87)"


def test_without_a_driver_there_is_no_gpu():
    """On a machine that has one, this asks the fake."""
    cuda = FakeCuda()
    cuda.gpu = None
    bindings = ModuleType("cuda.bindings")
    bindings.runtime = cuda
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "cuda.bindings", bindings)
        with pytest.raises(BackendUnavailableError, match=r"cudaErrorInsufficientDriver(.|\n)*openvino"):
            find_gpu()


def test_failure_names_the_function_and_the_status_and_is_taken_off_the_device(cuda):
    stream = CudaStream()
    cuda.fail["cudaStreamSynchronize"] = 0, Status.cudaErrorIllegalAddress
    with pytest.raises(DeviceError, match="cudaStreamSynchronize failed with cudaErrorIllegalAddress: text of"):
        stream.synchronize()
    assert cuda.calls["cudaGetLastError"] == 1
    stream.synchronize()


def test_copies_run_when_they_are_waited_for(cuda):
    stream, memory = CudaStream(), DeviceMemory(12)
    source, target = np.arange(3, dtype=np.float32), pinned_array((3,), "float32")
    assert target.tolist() == [0, 0, 0]
    stream.upload(source, memory)
    stream.download(memory, target)
    assert target.tolist() == [0, 0, 0]
    stream.synchronize()
    assert target.tolist() == [0, 1, 2]


def test_everything_is_freed_once(cuda):
    stream, memory, array = CudaStream(), DeviceMemory(24), pinned_array((3,), "int64")
    graph = stream.capture(partial(stream.download, memory, array))
    view = array[1:]
    del array
    gc.collect()
    assert cuda.alive() == 4, "the stream, the graph, and two pieces of memory"
    memory.close()
    memory.close()
    del memory, view, graph, stream
    gc.collect()
    assert cuda.alive() == 0
    assert cuda.calls["cudaFree"] == cuda.calls["cudaFreeHost"] == cuda.calls["cudaStreamDestroy"] == 1


def test_a_recording_that_fails_is_ended(cuda):
    stream, memory = CudaStream(), DeviceMemory(8)
    with pytest.raises(DeviceError, match="CaptureUnsupported"):
        stream.capture(lambda: stream.upload(np.zeros(1, np.int64), memory))  # memory that is not page-locked
    stream.synchronize()
    assert not cuda.graphs


def test_call_gives_what_comes_besides_the_status(cuda):
    assert call("cudaGetDeviceCount") == 1 and call("cudaGetLastError") is None
