"""The doctor: one line for each thing, and no illness that ends the examination."""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest

from runtime import doctor
from runtime.cuda import Gpu
from runtime.doctor import Finding, examine
from runtime.errors import BackendUnavailableError

BACKENDS = ["backend onnxruntime", "backend onnxruntime-cuda", "backend openvino", "tensorrt", "tensorrt_rtx"]


def findings() -> dict[str, Finding]:
    found = list(examine())
    assert all(finding.state in ("ok", "missing", "problem") and finding.detail for finding in found)
    return {finding.what: finding for finding in found}


def installed(monkeypatch, **versions: str | None) -> None:
    """Pretend that packages have these versions; None is not installed."""
    real = doctor.version

    def version(name: str) -> str:
        asked = name.replace("-", "_")
        if asked not in versions:
            return real(name)
        if versions[asked] is None:
            raise doctor.PackageNotFoundError(name)
        return versions[asked]

    monkeypatch.setattr(doctor, "version", version)


class Broken:
    """A package that is found and does not load."""

    def __init__(self, name: str, error: Exception) -> None:
        self._name, self._error = name, error

    def find_spec(self, name, path=None, target=None):
        return ModuleSpec(name, self) if name == self._name else None

    def create_module(self, spec):
        raise self._error

    def exec_module(self, module) -> None:
        raise AssertionError


def break_package(monkeypatch, name: str, error: Exception) -> None:
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(name, error), *sys.meta_path])


def test_every_backend_has_a_line():
    found = findings()
    assert set(BACKENDS) <= set(found)
    assert {"machine", "numpy", "av", "pydantic", "cv2", "torch", "onnx"} <= set(found)
    assert found["numpy"].state == "ok" and "Python" in found["machine"].detail


def test_cpu_backend_is_tried_and_not_only_looked_up():
    onnxruntime = pytest.importorskip("onnxruntime")
    finding = findings()["backend onnxruntime"]
    assert finding == Finding(
        "ok", "backend onnxruntime", f"{onnxruntime.__version__}, CPUExecutionProvider loads and runs"
    )


def test_provider_that_is_listed_but_falls_back_is_a_problem(monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime")

    class Session(onnxruntime.InferenceSession):
        def __init__(self, model, options, providers) -> None:
            super().__init__(model, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    found = findings()
    assert found["backend onnxruntime"].state == "ok"
    assert found["backend onnxruntime-cuda"].state == "problem" and "no GPU" in found["backend onnxruntime-cuda"].detail


def test_provider_that_raises_is_a_problem(monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime")

    def fail(*args, **kwargs):
        raise RuntimeError("libcudnn.so.9 is missing\nand much more")

    monkeypatch.setattr(onnxruntime, "InferenceSession", fail)
    finding = findings()["backend onnxruntime"]
    assert finding.state == "problem" and finding.detail.endswith("libcudnn.so.9 is missing")


def test_provider_that_is_not_built_in_is_missing(monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    finding = findings()["backend onnxruntime-cuda"]
    assert finding.state == "missing" and "pip install '.[gpu]'" in finding.detail


def test_both_onnxruntime_packages_are_a_problem(monkeypatch):
    installed(monkeypatch, onnxruntime="1.23.0", onnxruntime_gpu="1.22.0")
    finding = findings()["onnxruntime"]
    assert finding.state == "problem"
    for word in ("onnxruntime 1.23.0", "onnxruntime-gpu 1.22.0", "Remove both"):
        assert word in finding.detail


@pytest.mark.parametrize("versions", [("1.23.0", None), (None, "1.23.0")])
def test_one_onnxruntime_package_is_no_problem(monkeypatch, versions):
    installed(monkeypatch, onnxruntime=versions[0], onnxruntime_gpu=versions[1])
    assert "onnxruntime" not in findings()


def test_without_onnxruntime_both_its_backends_are_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    found = findings()
    assert "pip install '.[cpu]'" in found["backend onnxruntime"].detail
    assert "pip install '.[gpu]'" in found["backend onnxruntime-cuda"].detail
    assert {found[name].state for name in BACKENDS[:2]} == {"missing"}


def test_openvino_is_tried_and_says_whether_the_cpu_has_bf16(monkeypatch):
    openvino = pytest.importorskip("openvino")
    finding = findings()["backend openvino"]
    assert finding.state == "ok" and finding.detail.startswith(openvino.__version__.split("-")[0])
    monkeypatch.setattr(openvino.Core, "get_property", lambda *_: ["FP32"])
    assert findings()["backend openvino"].detail.endswith("fp32 on the CPU")
    monkeypatch.setitem(sys.modules, "openvino", None)
    missing = findings()["backend openvino"]
    assert missing.state == "missing" and "pip install '.[openvino]'" in missing.detail


def test_gpu_is_told_as_cuda_sees_it(monkeypatch):
    def none() -> None:
        raise BackendUnavailableError("there is no NVIDIA GPU")

    installed(monkeypatch, cuda_bindings="12.9.10")
    monkeypatch.setattr(doctor, "find_gpu", lambda: Gpu("Orin", "sm87"))
    assert findings()["cuda"] == Finding("ok", "cuda", "bindings 12.9.10, Orin (sm87)")
    monkeypatch.setattr(doctor, "find_gpu", none)
    assert findings()["cuda"] == Finding("missing", "cuda", "there is no NVIDIA GPU")
    installed(monkeypatch, cuda_bindings=None)
    assert "pip install '.[tensorrt]'" in findings()["cuda"].detail


def test_package_that_is_not_installed_says_how_to_get_it(monkeypatch):
    installed(monkeypatch, torch=None, av=None)
    found = findings()
    assert found["torch"].state == found["av"].state == "missing"
    assert "pip install '.[export]'" in found["torch"].detail and "pip install ." in found["av"].detail


@pytest.mark.parametrize("name", ["cv2", "tensorrt", "tensorrt_rtx"])
@pytest.mark.parametrize("error", [ImportError("libGL.so.1"), OSError("libnvinfer.so.10")], ids=["import", "os"])
def test_package_that_does_not_load_is_a_problem(monkeypatch, name, error):
    """OpenCV without libGL, TensorRT's bindings without its libraries."""
    break_package(monkeypatch, name, error)
    finding = findings()[name]
    assert finding.state == "problem" and str(error) in finding.detail


def test_package_that_is_not_there_is_missing(monkeypatch):
    real = importlib.util.find_spec
    absent = ("cv2", "tensorrt", "tensorrt_rtx")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else real(name))
    found = findings()
    assert {found[name].state for name in absent} == {"missing"}


def test_tensorrt_that_loads_is_told_with_its_version(monkeypatch):
    module = ModuleType("tensorrt")
    module.__version__, module.__spec__ = "10.3.0", ModuleSpec("tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    assert findings()["tensorrt"].detail.startswith("10.3.0")
