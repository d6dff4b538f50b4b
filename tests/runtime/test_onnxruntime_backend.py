"""The ONNX Runtime backend: equal to plain calls bit for bit, with memory that is allocated once."""

from __future__ import annotations

import contextlib
import itertools
import re
import sys
import time
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest

from runtime import onnxruntime_backend
from runtime.backend import load_engine
from runtime.bundle import load_bundle
from runtime.errors import BackendError, BackendUnavailableError, StepError
from runtime.onnxruntime_backend import OnnxRuntimeBuffers

ort = pytest.importorskip("onnxruntime")

ALL = (60, 60, 60, 60)
BUDGETS = [(60, 32, 26, 20), (42, 32, 26, 20), (42, 32, 26, 20), (36, 25, 17, 12), (1, 1, 1, 1), ALL, (42, 32, 26, 20)]


class Plain:
    """``InferenceSession.run`` with the state fed back by hand."""

    def __init__(self, bundle, graph, batch: int) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self.graph = graph
        self.session = ort.InferenceSession(str(bundle.path(graph)), options, providers=["CPUExecutionProvider"])
        self.state = {}
        for pair in graph.state:
            spec, row = graph.input(pair.input), bundle.initial_row(graph, pair.input)
            value = np.zeros(spec.shape_for(batch), spec.dtype)
            self.state[pair.input] = value if row is None else value + row

    def step(self, image, budget) -> dict[str, np.ndarray]:
        feed = {"image": image, **self.state}
        if self.graph.has_budget:
            feed["token_budget"] = np.array(budget, np.int64)
        names = [spec.name for spec in self.graph.outputs]
        outputs = dict(zip(names, self.session.run(names, feed), strict=True))
        self.state = {pair.input: outputs.pop(pair.output) for pair in self.graph.state}
        return outputs


def batches(drifting_frames, batch: int, count: int) -> list[np.ndarray]:
    """``count`` images uint8 [batch, H, W, 3], each row another clip."""
    return [np.stack(rows) for rows in zip(*(drifting_frames(count, seed=seed) for seed in range(batch)), strict=True)]


def assert_same(got, want) -> None:
    assert set(got) == set(want)
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)
        assert got[name].dtype == value.dtype


@pytest.fixture
def buffers(micro_engine):
    return micro_engine.open_stream()


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("which", ["graph", "baseline"])
def test_equals_plain_calls_bit_for_bit(micro, drifting_frames, which, batch):
    """Seven frames under changing budgets: a state that is lost, doubled or a frame late shows."""
    graph = getattr(micro.manifest, which)
    buffers, plain = load_engine(micro, graph, threads=1).open_stream(batch), Plain(micro, graph, batch)
    assert_same(buffers.state(), plain.state)
    for image, budget in zip(batches(drifting_frames, batch, len(BUDGETS)), BUDGETS, strict=True):
        buffers.image[:] = image
        got = buffers.run(budget if graph.has_budget else None)
        assert_same(got, plain.step(image, budget))
        buffers.commit()
        assert_same(buffers.state(), plain.state)


def test_threshold_graph_equals_plain_calls(threshold_bundle, drifting_frames):
    """It reads the first count alone; how many tokens the later stages keep is in the data."""
    bundle = load_bundle(threshold_bundle)
    graph = bundle.manifest.graph
    buffers, plain = load_engine(bundle, threads=1).open_stream(), Plain(bundle, graph, 1)
    for image, first in zip(batches(drifting_frames, 1, 4), (60, 42, 30, 42), strict=True):
        buffers.image[:] = image
        assert_same(buffers.run((first, 5, 4, 3)), plain.step(image, (first,)))
        buffers.commit()


def test_dense_graph_equals_the_other_at_budget_n(micro, drifting_frames):
    one = load_engine(micro, threads=1).open_stream()
    other = load_engine(micro, micro.manifest.baseline, threads=1).open_stream()
    for image in batches(drifting_frames, 1, 3):
        one.image[:] = other.image[:] = image
        got, want = one.run(ALL), other.run(None)
        np.testing.assert_allclose(got["mask_logits"], want["mask_logits"], rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(got["tokens_kept"], [ALL])
        one.commit(), other.commit()


def test_memory_is_allocated_once(buffers, drifting_frames):
    """The same arrays at the same addresses, two sets of state that take turns, and no new numpy memory."""
    image = buffers.image
    states, addresses = [], set()
    for t, frame in enumerate(drifting_frames(6)):
        buffers.image[0] = frame
        outputs = buffers.run(BUDGETS[t])
        buffers.commit()
        states.append({name: value.data_ptr() for name, value in buffers._sets[buffers._current].items()})
        addresses.add((image.ctypes.data, *(value.ctypes.data for value in outputs.values())))
    assert buffers.image is image and len(addresses) == 1
    assert states[0] == states[2] == states[4] and states[1] == states[3] == states[5]
    assert not set(states[0].values()) & set(states[1].values())

    assert buffers.image.nbytes > buffers.state()["prior.keys"].nbytes > 10_000
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(10):
            buffers.run(BUDGETS[1])
            buffers.commit()
        assert tracemalloc.get_traced_memory()[1] - before < 5_000
    finally:
        tracemalloc.stop()


def test_image_buffer_is_what_the_graph_reads(buffers, drifting_frames):
    one, other = drifting_frames(1, seed=1)[0], drifting_frames(1, seed=2)[0]
    buffers.image[0] = one
    first = buffers.run(ALL)["mask_logits"].copy()
    buffers.image[0] = other
    assert (buffers.run(ALL)["mask_logits"] != first).any()
    buffers.image[0] = one
    np.testing.assert_array_equal(buffers.run(ALL)["mask_logits"], first)


def test_threads_rest_between_steps(micro):
    with contextlib.closing(load_engine(micro, threads=2)) as engine:
        stream = engine.open_stream()
        for _ in range(5):
            stream.run(ALL)
            before = time.process_time()
            time.sleep(0.1)
            assert time.process_time() - before < 0.05, "a thread that spins takes a core from decoding"


def test_state_stays_until_it_is_committed(buffers, drifting_frames):
    frames = drifting_frames(3)
    buffers.image[0] = frames[0]
    buffers.run(ALL)
    buffers.commit()
    before = buffers.state()
    for frame in frames[1:]:  # two steps that nobody commits
        buffers.image[0] = frame
        buffers.run(BUDGETS[1])
        assert_same(buffers.state(), before)
    uncommitted = {name: value.copy() for name, value in buffers.run(BUDGETS[1]).items()}
    buffers.commit()
    assert (buffers.state()["prior.keys"] != before["prior.keys"]).any()
    buffers.set_state(before)
    assert_same(buffers.run(BUDGETS[1]), uncommitted)


@pytest.mark.parametrize("budget", [(61, 20, 10, 5), (20, 30, 10, 5)], ids=["above N", "not nested"])
def test_failed_step_leaves_the_state(buffers, drifting_frames, budget):
    frames = drifting_frames(2)
    buffers.image[0] = frames[0]
    buffers.run(ALL)
    buffers.commit()
    before = buffers.state()
    buffers.image[0] = frames[1]
    want = {name: value.copy() for name, value in buffers.run(BUDGETS[1]).items()}
    with pytest.raises(StepError, match=rf"model\.onnx with budget \({budget[0]}, {budget[1]}") as caught:
        buffers.run(budget)
    assert caught.value.__cause__ is not None
    assert_same(buffers.state(), before)
    assert_same(buffers.run(BUDGETS[1]), want)


def test_reset_equals_new(micro, micro_engine, buffers, drifting_frames):
    """After an odd and an even number of steps, because the sets take turns."""
    new = micro_engine.open_stream().state()
    np.testing.assert_array_equal(new["prior.queries"][0], micro.initial_state["prior.queries"])
    assert not new["prior.keys"].any() and not new["prior.kept"].any() and not new["prior.keep_logits"].any()
    for frame in drifting_frames(3):
        buffers.image[0] = frame
        buffers.run(ALL)
        buffers.commit()
        assert (buffers.state()["prior.queries"] != new["prior.queries"]).any()
        buffers.reset()
        assert_same(buffers.state(), new)


def test_streams_of_one_engine_share_nothing(micro_engine, drifting_frames):
    one, other = micro_engine.open_stream(), micro_engine.open_stream()
    before = other.state()
    one.image[0] = drifting_frames(1)[0]
    one.run(ALL)
    one.commit()
    assert_same(other.state(), before)
    assert not other.image.any()


def test_state_that_was_set_is_used(micro, micro_engine, buffers, drifting_frames):
    frames = drifting_frames(3)
    other = micro_engine.open_stream()
    for frame in frames[:2]:
        buffers.image[0] = frame
        buffers.run(ALL)
        buffers.commit()
    state = buffers.state()
    other.set_state(state)
    assert_same(other.state(), state)
    other.image[0] = buffers.image[0] = frames[2]
    assert_same(other.run(BUDGETS[1]), {name: value.copy() for name, value in buffers.run(BUDGETS[1]).items()})
    state["prior.keys"][:] = 0  # a copy: changing it changes no stream
    assert buffers.state()["prior.keys"].any() and other.state()["prior.keys"].any()


def test_set_state_takes_arrays_that_are_not_contiguous(buffers):
    keys = buffers.state()["prior.keys"]
    value = np.arange(keys.size, dtype=np.float32).reshape(keys.shape[::-1]).T
    buffers.set_state({"prior.keys": value})
    np.testing.assert_array_equal(buffers.state()["prior.keys"], value)


@pytest.mark.parametrize("dtype", [np.float64, np.float16])
def test_set_state_refuses_another_dtype(buffers, dtype):
    keys = buffers.state()["prior.keys"]
    with pytest.raises(ValueError, match=r"prior\.keys is float32 \[1, 60, 48\], got float"):
        buffers.set_state({"prior.keys": keys.astype(dtype)})
    with pytest.raises(ValueError, match=r"got float32 \[60, 48\]"):
        buffers.set_state({"prior.keys": keys[0]})


def test_state_that_is_not_finite_is_reported(buffers, drifting_frames):
    buffers.image[0] = drifting_frames(1)[0]
    assert buffers.run(ALL)["state_ok"].tolist() == [True]
    state = buffers.state()
    state["prior.queries"][0, 0, 0] = np.inf
    buffers.set_state(state)
    assert buffers.run(ALL)["state_ok"].tolist() == [False]


# --- what is not there ----------------------------------------------------------------------------------------------


def test_report_says_what_it_runs_on(micro):
    report = load_engine(micro, threads=2).report
    assert report.provider == "CPUExecutionProvider" and report.threads == 2
    assert str(report) == f"onnxruntime {ort.__version__} on CPUExecutionProvider, 2 threads"
    assert "threads" not in str(load_engine(micro).report)


def test_unknown_backend_names_those_there_are(micro):
    with pytest.raises(BackendUnavailableError, match=r"'cuda-please'; there are onnxruntime, onnxruntime-cuda"):
        load_engine(micro, backend="cuda-please")


def test_cuda_that_is_not_built_in_says_how_to_get_it(micro, monkeypatch):
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(
        BackendUnavailableError, match=r"has no CUDAExecutionProvider, only CPU.*pip install onnxruntime-gpu"
    ):
        load_engine(micro, backend="onnxruntime-cuda")


def test_cuda_that_is_listed_but_does_not_load_is_no_silent_cpu(micro, monkeypatch):
    """ONNX Runtime lists CUDA where no GPU is, and would go on on the CPU."""

    class OnCpu(ort.InferenceSession):
        def __init__(self, path, options, providers, **options_by_name) -> None:
            super().__init__(path, None, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(ort, "InferenceSession", OnCpu)
    with pytest.raises(BackendUnavailableError, match=r"listed but could not be loaded here.*onnxruntime-gpu"):
        load_engine(micro, backend="onnxruntime-cuda")


def test_onnxruntime_that_is_not_installed_says_how_to_get_it(micro, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendUnavailableError, match=r"not installed.*pip install onnxruntime"):
        load_engine(micro)


def test_damaged_graph_is_an_error_with_its_name(changed_bundle):
    folder = changed_bundle()
    path = folder / "model.onnx"
    path.write_bytes(path.read_bytes()[:5000])
    bundle = load_bundle(changed_bundle.rehash(folder))
    with pytest.raises(BackendError, match=r"cannot load .*model\.onnx: ") as caught:
        load_engine(bundle)
    assert not isinstance(caught.value, BackendUnavailableError)


def test_close_may_be_called_twice(micro):
    engine = load_engine(micro)
    engine.close()
    engine.close()


# Memory of a device, here the CPU's own under another address: copies where a GPU needs them


def device_buffers(engine, micro, batch: int = 1, graph_ids=None) -> OnnxRuntimeBuffers:
    return OnnxRuntimeBuffers(engine._session, micro, engine.graph, batch, "cpu", graph_ids)


@pytest.mark.parametrize("batch", [1, 2])
def test_device_memory_equals_plain_calls_bit_for_bit(micro, micro_engine, drifting_frames, batch):
    buffers, plain = device_buffers(micro_engine, micro, batch), Plain(micro, micro_engine.graph, batch)
    assert_same(buffers.state(), plain.state)
    for image, budget in zip(batches(drifting_frames, batch, len(BUDGETS)), BUDGETS, strict=True):
        buffers.image[:] = image
        assert_same(buffers.run(budget), plain.step(image, budget))
        buffers.commit()
        assert_same(buffers.state(), plain.state)


def test_device_memory_is_no_host_memory(micro, micro_engine):
    buffers = device_buffers(micro_engine, micro)
    for name, tensor in buffers._shared.items():
        assert tensor.data_ptr() != buffers._host[name].ctypes.data, name


def test_device_state_may_be_set_and_reset(micro, micro_engine, drifting_frames):
    buffers, other = device_buffers(micro_engine, micro), micro_engine.open_stream()
    for each in (buffers, other):
        each.image[0] = drifting_frames(1)[0]
        each.run(ALL)
        each.commit()
    assert_same(buffers.state(), other.state())
    buffers.reset()
    assert_same(buffers.state(), micro_engine.open_stream().state())
    buffers.set_state(other.state())
    assert_same(buffers.run(BUDGETS[1]), other.run(BUDGETS[1]))


# CUDA graphs: a captured graph has the addresses and token counts that it was captured with


class Recording:
    """A session that notes under which graph every binding ran, and which graphs were given back."""

    def __init__(self, session) -> None:
        self._session, self.ran, self.released = session, [], []

    def __getattr__(self, name):
        return getattr(self._session, name)

    def run_with_iobinding(self, binding, options=None) -> None:
        self.ran.append((options.get_run_config_entry("gpu_graph_id"), id(binding)))
        self._session.run_with_iobinding(binding)

    def release_captured_graph(self, graph_id) -> None:
        self.released.append(graph_id)


@pytest.fixture
def recording(micro_engine):
    return Recording(micro_engine._session)


def capturing_buffers(recording, micro, micro_engine, ids) -> OnnxRuntimeBuffers:
    return OnnxRuntimeBuffers(recording, micro, micro_engine.graph, 1, "cpu", ids)


def test_one_graph_for_each_budget_and_set_of_state(recording, micro, micro_engine, drifting_frames):
    ids = itertools.count(1)
    buffers = capturing_buffers(recording, micro, micro_engine, ids)
    for frame, budget in zip(drifting_frames(7), [ALL, *[BUDGETS[1]] * 4, ALL, ALL], strict=True):
        buffers.image[0] = frame
        buffers.run(budget)
        buffers.commit()
    assert [graph for graph, _ in recording.ran] == ["1", "2", "3", "2", "3", "4", "1"]
    assert len(set(recording.ran)) == 4  # always with the binding that it was captured with
    other = capturing_buffers(recording, micro, micro_engine, ids)
    other.run(ALL)
    assert recording.ran[-1][0] == "5"  # streams of one session share no graph: they have other addresses


def test_graphs_of_budgets_long_past_are_given_back(recording, micro, micro_engine, monkeypatch):
    monkeypatch.setattr(onnxruntime_backend, "_MOST_BINDINGS", 2)
    buffers = capturing_buffers(recording, micro, micro_engine, itertools.count(1))
    for first in (40, 41, 42, 40):
        buffers.run((first, 9, 9, 9))
    assert recording.released == [1, 2] and recording.ran[-1][0] == "4"


def test_without_cuda_graphs_nothing_is_captured(micro, micro_engine):
    assert micro_engine.open_stream()._binding(ALL).options is None


# What the CUDA provider is asked for, and what it leaves to the CPU


class Assigned:
    """A part of a graph that a provider was given."""

    def __init__(self, ep_name: str, *op_types: str) -> None:
        self.ep_name, self._op_types = ep_name, op_types

    def get_nodes(self):
        return [SimpleNamespace(op_type=name) for name in self._op_types]


@pytest.fixture
def on_cuda(monkeypatch):
    """A CUDA provider that loads, and gives these parts of the graph away; returns what it was asked for."""
    asked = {}

    def make(*parts: Assigned):
        class OnCuda(ort.InferenceSession):
            def __init__(self, path, options, providers, **more) -> None:
                asked["providers"] = providers
                super().__init__(path, None, providers=["CPUExecutionProvider"])

            def get_providers(self):
                return ["CUDAExecutionProvider", "CPUExecutionProvider"]

            def get_provider_graph_assignment_info(self):
                return parts

        monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
        monkeypatch.setattr(ort, "InferenceSession", OnCuda)
        return asked

    return make


@pytest.mark.parametrize(
    ("backend", "precision", "tf32", "capture"),
    [
        ("onnxruntime-cuda", None, "0", "0"),
        ("onnxruntime-cuda", "fp32", "0", "0"),
        ("onnxruntime-cuda", "tf32", "1", "0"),
        ("onnxruntime-cuda-graph", None, "0", "1"),
    ],
)
def test_cuda_computes_in_what_was_asked_for(micro, on_cuda, backend, precision, tf32, capture):
    """Left to itself it rounds fp32 to tf32."""
    asked = on_cuda()
    report = load_engine(micro, backend=backend, precision=precision).report
    flags = {"use_tf32": tf32, "enable_cuda_graph": capture}
    assert asked["providers"] == [("CUDAExecutionProvider", flags)]
    assert (report.provider, report.precision) == ("CUDAExecutionProvider", "tf32" if tf32 == "1" else "fp32")


@pytest.mark.parametrize(("backend", "others"), [("onnxruntime", ""), ("onnxruntime-cuda", ", or .* in tf32")])
def test_precision_that_there_is_not_says_what_there_is(micro, on_cuda, backend, others):
    on_cuda()
    with pytest.raises(BackendUnavailableError, match=rf"precision of the graph, fp32{others}, not in bf16"):
        load_engine(micro, backend=backend, precision="bf16")


def test_shapes_on_the_cpu_are_no_fallback(micro, on_cuda, caplog):
    on_cuda(Assigned("CUDAExecutionProvider", "MatMul"), Assigned("CPUExecutionProvider", "Shape", "Gather", "Concat"))
    assert load_engine(micro, backend="onnxruntime-cuda").report.provider == "CUDAExecutionProvider"
    assert caplog.text == ""


def test_operators_left_to_the_cpu_are_told(micro, on_cuda, caplog):
    on_cuda(Assigned("CPUExecutionProvider", "TopK", "Shape"), Assigned("CPUExecutionProvider", "GridSample", "TopK"))
    report = load_engine(micro, backend="onnxruntime-cuda").report
    assert report.provider == "CUDAExecutionProvider (1 GridSample, 2 TopK on the CPU)"
    assert "leaves to the CPU: 1 GridSample, 2 TopK" in caplog.text


def test_real_record_of_placement_is_read(micro):
    """The names that this ONNX Runtime uses for it."""
    left = onnxruntime_backend._left_to_cpu(load_engine(micro)._session)
    assert re.search(r"\d+ MatMul", left) and "TopK" in left and "Shape" not in left


def test_graph_that_cannot_be_captured_says_what_to_use_instead(micro, on_cuda, monkeypatch):
    on_cuda()

    def fail(*args, **kwargs):
        raise RuntimeError("This session cannot use the CUDA Graph feature as requested by the user\nmore")

    monkeypatch.setattr(ort, "InferenceSession", fail)
    with pytest.raises(
        BackendError, match=r"cannot capture .*as requested by the user. Use --backend onnxruntime-cuda"
    ):
        load_engine(micro, backend="onnxruntime-cuda-graph")
