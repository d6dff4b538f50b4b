"""The runtime loads and runs where there is neither torch nor onnx nor OpenCV, and a rule keeps it so."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCKED = ("torch", "onnx", "onnxscript", "cv2", "scipy", "safetensors", "tensorrt", "tensorrt_rtx", "cuda")
MODULES = (
    "runtime, runtime.stream, runtime.pipeline, runtime.profiling.profile, runtime.profiling.report, runtime.doctor, "
    "runtime.reference, runtime.acceptance, runtime.verified, runtime.tensorrt_backend, deploy"
)


def run_blocked(code: str, *arguments: object, blocked: tuple[str, ...] = BLOCKED) -> str:
    """Run Python in which these packages cannot be imported; warnings are errors there too."""
    lines = ["import sys", f"for name in {blocked!r}: sys.modules[name] = None", code]
    command = [sys.executable, "-W", "error", "-c", "\n".join(lines), *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_runtime_and_command_line_load_without_torch_onnx_and_opencv():
    assert "ok" in run_blocked(f"import {MODULES}; print('ok')")


def test_no_backend_is_loaded_before_it_is_used():
    run_blocked(f"import {MODULES}", blocked=(*BLOCKED, "onnxruntime", "onnxruntime.capi"))


def test_bundle_is_verified_and_streams_without_torch_onnx_and_opencv(micro_bundle):
    code = """
from pathlib import Path
import numpy as np
from runtime.backend import load_engine
from runtime.bundle import load_bundle
from runtime.reference import verify_engine
from runtime.stream import Stream
bundle = load_bundle(Path(sys.argv[1]))
engine = load_engine(bundle, threads=1)
assert verify_engine(bundle, engine).frames
picture = np.random.default_rng(0).integers(0, 256, (72, 128, 3), np.uint8)
with Stream(bundle, engine, keep_ratio=0.4) as stream:
    for t in range(3):
        print(*stream.step(picture, timestamp_s=t / 30).tokens_kept)
"""
    assert run_blocked(code, micro_bundle).split("\n") == ["60 24 16 12", "36 24 16 12", "36 24 16 12", ""]


def test_doctor_answers_where_nothing_is_installed():
    code = "from runtime.doctor import examine\nfor finding in examine(): print(finding.state, finding.what)"
    found = run_blocked(code, blocked=(*BLOCKED, "onnxruntime")).splitlines()
    assert {"missing cv2", "missing backend onnxruntime", "missing tensorrt"} <= set(found)


def test_runtime_imports_none_of_the_rooms_above_it():
    code = f"import {MODULES.replace(', deploy', '')}\nprint(*sys.modules)"
    loaded = set(run_blocked(code).split())
    assert not loaded & {"cli", "models", "export", "calib", "deploy"}


@pytest.mark.parametrize("module", ["torch", "onnx", "models", "export", "calib", "cli"])
@pytest.mark.parametrize("form", ["import {}", "from {} import x", "import {}.deep as y", "from {}.deep import x"])
@pytest.mark.parametrize("file", ["runtime/x.py", "runtime/video/x.py"])
def test_lint_rule_fires(module, form, file):
    code = f"{form.format(module)}\n"
    done = ruff(code, file)
    assert done.returncode == 1 and "TID251" in done.stdout, done.stdout + done.stderr
    assert "runtime" in done.stdout


def test_lint_rule_fires_inside_a_function_too():
    assert "TID251" in ruff("def f():\n    import torch\n", "runtime/x.py").stdout


def test_lint_rule_lets_others_pass():
    assert "TID251" not in ruff("import numpy\nimport onnxruntime\n", "runtime/x.py").stdout
    assert "TID251" not in ruff("import torch\n", "export/x.py").stdout


def ruff(code: str, file: str) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("ruff")
    command = [
        sys.executable,
        "-m",
        "ruff",
        "check",
        "--no-cache",
        "--output-format",
        "concise",
        "--stdin-filename",
        file,
        "-",
    ]
    return subprocess.run(command, cwd=ROOT, input=code, capture_output=True, text=True, timeout=60)
