"""The OpenVINO backend: the same answers as ONNX Runtime, in fp32 to rounding, with memory that is allocated once."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from runtime.backend import load_engine
from runtime.budget_controller import controller_for
from runtime.bundle import load_bundle
from runtime.errors import BackendError, BackendUnavailableError, StepError
from runtime.openvino_core import computes_in_bf16
from runtime.parity import relative_difference
from runtime.reference import verify_engine
from runtime.stream import Stream

ov = pytest.importorskip("openvino")
pytestmark = pytest.mark.slow

ALL = (60, 60, 60, 60)
BUDGETS = [(60, 32, 26, 20), (42, 32, 26, 20), (36, 25, 17, 12), (1, 1, 1, 1), ALL, (42, 32, 26, 20)]
has_bf16 = pytest.mark.skipif(not computes_in_bf16(), reason="this CPU has no bf16")


@pytest.fixture(scope="module")
def engine(micro):
    return load_engine(micro, backend="openvino", threads=1)


def assert_close(got, want, tolerance: float = 1e-4) -> None:
    assert set(got) == set(want)
    for name, value in want.items():
        assert (got[name].dtype, got[name].shape) == (value.dtype, value.shape), name
        limit = tolerance if value.dtype.kind == "f" else 0.0
        assert relative_difference(got[name], value) <= limit, name


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("which", "usual"), [("graph", None), ("graph", BUDGETS[1]), ("baseline", None)])
def test_equals_onnx_runtime_frame_by_frame(micro, drifting_frames, which, usual, batch):
    """Each frame from ONNX Runtime's state, under changing budgets, also where one of them has a graph of its own."""
    graph = getattr(micro.manifest, which)
    one = load_engine(micro, graph, backend="openvino", threads=1).open_stream(batch, usual)
    other = load_engine(micro, graph, threads=1).open_stream(batch)
    clips = [list(drifting_frames(len(BUDGETS), seed=seed)) for seed in range(batch)]
    assert_close(one.state(), other.state(), 0.0)
    for t, budget in enumerate(BUDGETS):
        one.set_state(other.state())
        one.image[:] = other.image[:] = np.stack([clip[t] for clip in clips])
        used = budget if graph.has_budget else None
        assert_close(one.run(used), other.run(used))
        one.commit()
        other.commit()
        assert_close(one.state(), other.state())


@pytest.mark.parametrize("usual", [None, (60,)])
def test_threshold_graph_runs_with_counts_from_the_data(threshold_bundle, drifting_frames, usual):
    bundle = load_bundle(threshold_bundle)
    one = load_engine(bundle, backend="openvino", threads=1).open_stream(usual_budget=usual)
    other = load_engine(bundle, threads=1).open_stream()
    for frame in drifting_frames(4):
        one.set_state(other.state())
        one.image[0] = other.image[0] = frame
        assert_close(one.run((60,)), other.run((60,)))
        one.commit()
        other.commit()


def test_verify_passes(micro, engine):
    assert max(verify_engine(micro, engine).worst.values()) < 1e-4


def test_stream_carries_its_own_prior_and_reset_forgets_it(micro, engine, drifting_frames):
    frames = list(drifting_frames(4))

    def kept(stream, pictures, start=0.0):
        return [stream.step(picture, timestamp_s=start + t / 30).kept_stages for t, picture in enumerate(pictures)]

    with Stream(micro, engine) as one, Stream(micro, engine) as other:
        together = [
            [stream.step(picture, timestamp_s=t / 30).kept_stages for stream in (one, other)]
            for t, picture in enumerate(frames)
        ]
        one.reset()
        again = kept(one, frames, start=1.0)
    for (a, b), c in zip(together, again, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, c)


def test_only_a_stream_of_one_budget_gets_a_graph_of_its_own(micro, drifting_frames):
    engine = load_engine(micro, backend="openvino", threads=1)
    usual = micro.manifest.presets[micro.manifest.default_preset]
    with Stream(micro, engine) as stream:
        assert set(stream.buffers._requests) == {usual}
        for frame in drifting_frames(2):
            stream.step(frame)  # the first without a prior, so with another budget
        assert set(stream.buffers._requests) == {None, usual}
        names = {port.any_name for port in engine.compiled(1, usual).inputs}
        assert names == {port.any_name for port in engine.compiled(1).inputs} - {"token_budget"}
        assert all(port.partial_shape.is_static for port in engine.compiled(1, usual).outputs)
    with Stream(micro, engine, controller=controller_for(micro.manifest, engine.report, 50.0)) as stream:
        assert set(stream.buffers._requests) == {None}


def test_step_that_is_not_committed_leaves_the_state(engine, drifting_frames):
    buffers = engine.open_stream()
    before = buffers.state()
    buffers.image[0] = next(iter(drifting_frames(1)))
    buffers.run(ALL)
    assert_close(buffers.state(), before, 0.0)
    buffers.commit()
    assert any(not np.array_equal(value, before[name]) for name, value in buffers.state().items())
    buffers.reset()
    assert_close(buffers.state(), before, 0.0)


def test_outputs_and_image_are_the_same_memory_all_the_time(engine, drifting_frames):
    buffers = engine.open_stream()
    seen = set()
    for frame in drifting_frames(4):
        buffers.image[0] = frame
        seen.add(tuple(value.ctypes.data for value in buffers.run(ALL).values()))
        buffers.commit()
    assert len(seen) == 1


def test_state_of_another_shape_or_dtype_is_refused(engine):
    buffers = engine.open_stream()
    state = buffers.state()
    with pytest.raises(ValueError, match=r"prior\.keys is float32 \[1, 60, 48\], got float64"):
        buffers.set_state({"prior.keys": state["prior.keys"].astype(np.float64)})
    with pytest.raises(ValueError, match=r"got float32 \[1, 59, 48\]"):
        buffers.set_state({"prior.keys": state["prior.keys"][:, 1:]})


def test_failed_step_is_a_step_error_and_the_next_one_works(engine, drifting_frames):
    """OpenVINO cuts a budget above N down to N, so the failure is made: a request that breaks once."""

    class Broken:
        def __init__(self, request) -> None:
            self.set_tensor = request.set_tensor

        def infer(self) -> None:
            raise RuntimeError("Exception from src/inference.cpp:1:\nout of memory")

    buffers = engine.open_stream()
    before, request = buffers.state(), buffers._request(None)
    buffers.image[0] = next(iter(drifting_frames(1)))
    buffers._requests[None] = Broken(request)
    with pytest.raises(StepError, match=r"OpenVINO failed on model\.onnx with budget \(60, .*: out of memory"):
        buffers.run(ALL)
    assert_close(buffers.state(), before, 0.0)
    buffers._requests[None] = request
    assert buffers.run(ALL)["tokens_kept"].tolist() == [list(ALL)]


def test_report_says_what_really_runs(engine):
    assert engine.report.backend == "openvino" and engine.report.provider == "CPU in fp32"
    assert str(engine.report) == f"openvino {ov.__version__.split('-')[0]} on CPU in fp32, 1 threads"


@has_bf16
def test_bf16_is_another_precision_and_near(micro, drifting_frames):
    engine = load_engine(micro, backend="openvino", threads=1, precision="bf16")
    assert engine.report.provider == "CPU in bf16"
    one, other = engine.open_stream(), load_engine(micro, threads=1).open_stream()
    for frame in drifting_frames(2):
        one.set_state(other.state())
        one.image[0] = other.image[0] = frame
        got, want = one.run(ALL), other.run(ALL)
        difference = relative_difference(got["class_logits"], want["class_logits"])
        assert 1e-5 < difference < 0.1
        one.commit()
        other.commit()


def test_precision_that_is_not_there_is_refused(micro, monkeypatch):
    with pytest.raises(BackendUnavailableError, match="computes in fp32 or bf16, not in int3"):
        load_engine(micro, backend="openvino", precision="int3")
    with pytest.raises(BackendUnavailableError, match="precision of the graph, fp32, not in bf16"):
        load_engine(micro, backend="onnxruntime", precision="bf16")
    monkeypatch.setattr(ov.Core, "get_property", lambda *_: ["FP32"])
    with pytest.raises(BackendUnavailableError, match="no bf16 arithmetic"):
        load_engine(micro, backend="openvino", precision="bf16")


def test_missing_openvino_says_how_to_get_it(micro, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(BackendUnavailableError, match=r"pip install '\.\[openvino\]'"):
        load_engine(micro, backend="openvino")


def test_damaged_graph_is_a_backend_error(micro, tmp_path):
    shutil.copytree(micro.folder, tmp_path / "copy")
    (tmp_path / "copy" / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(BackendError, match="OpenVINO cannot load"):
        load_engine(replace(micro, folder=tmp_path / "copy"), backend="openvino")


SIGNAL_AFTER_ENGINES = """
import faulthandler, os, signal, sys
from pathlib import Path

from runtime.backend import load_engine
from runtime.bundle import load_bundle

faulthandler.enable()  # so that there is a stack for signal handlers
signal.signal(signal.SIGUSR1, lambda *_: print("handled"))
bundle = load_bundle(Path(sys.argv[1]))
one, two = (load_engine(bundle, backend="openvino", threads=1) for _ in range(2))
one.open_stream(), two.open_stream()  # compiled, each
one.close()
del one
two.close()
del two
os.kill(os.getpid(), signal.SIGUSR1)
"""


def test_process_still_handles_signals_after_engines_have_gone(micro_bundle):
    """Two engines that go in the order in which they came; see :func:`runtime.openvino_core.openvino_core`."""
    done = subprocess.run(
        [sys.executable, "-c", SIGNAL_AFTER_ENGINES, str(micro_bundle)],
        cwd=Path(__file__).parents[2], capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr
