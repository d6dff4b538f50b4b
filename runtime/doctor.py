"""What is installed, and what it can really do on this machine."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

from runtime.cuda import find_gpu
from runtime.errors import BackendUnavailableError
from runtime.onnxruntime_backend import preload_cuda
from runtime.openvino_core import computes_in_bf16, openvino_core


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        state: ``ok``, ``missing`` (could be installed) or ``problem`` (installed, and does not work).
        what: The thing.
        detail: Its version and abilities, or what to do.
    """

    state: Literal["ok", "missing", "problem"]
    what: str
    detail: str


def examine() -> Iterator[Finding]:
    """Look at the machine, the base packages, the backends, and the packages for export."""
    cores = os.cpu_count() or 1
    yield Finding(
        "ok", "machine", f"{platform.machine()}, {cores} CPUs, {platform.system()}, Python {sys.version.split()[0]}"
    )
    yield from (_package(name, "") for name in ("numpy", "av", "pydantic", "pillow", "pycocotools"))
    yield from _onnxruntime()
    yield _openvino()
    for name in ("numba", "onnxruntime-extensions"):
        yield _package(name, "only vpp-rovis is faster with it: pip install '.[deformable]'")
    yield _gpu()
    yield from (_tensorrt(name) for name in ("tensorrt", "tensorrt_rtx"))
    yield _opencv()
    for name in ("torch", "onnx", "onnxscript", "safetensors"):
        yield _package(name, "only export needs it: pip install '.[export]'")
    for name in ("polygraphy", "onnx-graphsurgeon"):
        yield _package(name, "only verify --layers needs it: pip install '.[layers]'")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _package(name: str, cure: str) -> Finding:
    found = _version(name)
    if found is not None:
        return Finding("ok", name, found)
    return Finding("missing", name, cure or "the program needs it: pip install .")


def _onnxruntime() -> Iterator[Finding]:
    cpu, gpu = _version("onnxruntime"), _version("onnxruntime-gpu")
    if cpu and gpu:
        yield Finding(
            "problem", "onnxruntime", f"onnxruntime {cpu} and onnxruntime-gpu {gpu} overwrite each other's files. "
            "Remove both, then install the one that you want."
        )  # fmt: skip
    try:
        import onnxruntime
    except ImportError as error:
        yield Finding("missing", "backend onnxruntime", f"{error}. pip install '.[cpu]'")
        yield Finding("missing", "backend onnxruntime-cuda", f"{error}. pip install '.[gpu]'")
        return
    for name, provider in (("onnxruntime", "CPUExecutionProvider"), ("onnxruntime-cuda", "CUDAExecutionProvider")):
        yield _try_provider(onnxruntime, name, provider)


def _try_provider(onnxruntime, name: str, provider: str) -> Finding:  # type: ignore[no-untyped-def]
    """Load a one-node graph: a provider that is listed may still not load."""
    if provider not in onnxruntime.get_available_providers():
        return Finding("missing", f"backend {name}", f"this ONNX Runtime has no {provider}; pip install '.[gpu]'")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        with contextlib.redirect_stdout(sys.stderr):  # ONNX Runtime prints what fails
            if provider == "CUDAExecutionProvider":
                preload_cuda(onnxruntime)
            session = onnxruntime.InferenceSession(_IDENTITY, options, providers=[provider])
    except Exception as error:  # ONNX Runtime raises classes of its own without a common base
        return Finding("problem", f"backend {name}", f"{provider} is listed but fails: {str(error).splitlines()[0]}")
    if provider not in session.get_providers():
        return Finding(
            "problem", f"backend {name}", f"{provider} is listed but cannot be loaded: no GPU, driver or CUDA"
        )
    return Finding("ok", f"backend {name}", f"{onnxruntime.__version__}, {provider} loads and runs")


def _openvino() -> Finding:
    """Run a one-node graph, and say whether this CPU computes in bf16."""
    try:
        core = openvino_core()
    except BackendUnavailableError as error:
        return Finding("missing", "backend openvino", str(error))
    try:
        core.compile_model(core.read_model(_IDENTITY), "CPU").create_infer_request().infer()
        bf16 = computes_in_bf16()
    except Exception as error:  # OpenVINO raises RuntimeError for whatever goes wrong
        return Finding("problem", "backend openvino", f"installed, but fails: {str(error).splitlines()[0]}")
    number = _version("openvino")
    return Finding("ok", "backend openvino", f"{number}, fp32{' and bf16' if bf16 else ''} on the CPU")


def _gpu() -> Finding:
    """The GPU that TensorRT would use, as CUDA's bindings see it."""
    if _version("cuda-bindings") is None:
        return Finding("missing", "cuda", "engines need it to run: pip install '.[tensorrt]' or '.[tensorrt-rtx]'")
    try:
        return Finding("ok", "cuda", f"bindings {_version('cuda-bindings')}, {find_gpu()}")
    except BackendUnavailableError as error:
        return Finding("missing", "cuda", str(error))


def _tensorrt(module: str) -> Finding:
    if importlib.util.find_spec(module) is None:
        return Finding("missing", module, "not installed; engines are not needed to run on ONNX Runtime")
    try:
        found = importlib.import_module(module)
    except Exception as error:  # TensorRT's bindings raise OSError where its libraries are not found
        return Finding("problem", module, f"installed, but does not load: {error}")
    return Finding("ok", module, f"{found.__version__}: graphs can be parsed and engines built")


def _opencv() -> Finding:
    if importlib.util.find_spec("cv2") is None:
        return Finding("missing", "cv2", "only webcams by number, GStreamer pipelines and the live window need it")
    try:
        import cv2
    except Exception as error:  # libGL is missing, or numpy has another major version
        return Finding("problem", "cv2", f"installed, but does not load: {error}")
    gstreamer = any("GStreamer" in line and "YES" in line for line in cv2.getBuildInformation().splitlines())
    return Finding("ok", "cv2", f"{cv2.__version__}, GStreamer {'yes' if gstreamer else 'no'}")


# Identity on float32 [1], IR version 8, opset 13, as the bytes of a serialized ONNX model
_IDENTITY = bytes.fromhex(
    "08083a370a100a017812017922084964656e746974791201675a0f0a0178120a0a08080112040a020801620f0a0179120a0a"
    "08080112040a02080142040a00100d"
)
