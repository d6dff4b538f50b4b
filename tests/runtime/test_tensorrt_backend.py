"""Engines and streams on a fake GPU: one code path over the published names of five versions, against ONNX Runtime."""

from __future__ import annotations

import gc
import logging
import shutil
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from fake_cuda import FakeCuda, Status
from fake_tensorrt import API, VERSIONS, fake_tensorrt, signature_faults

from export.engine import build_engines
from export.engine_request import EngineRequest
from runtime.backend import load_engine
from runtime.bundle import Bundle, load_bundle
from runtime.errors import BackendError, BackendUnavailableError, EngineMismatchError, StepError, TokenBudgetError
from runtime.profiling.profile import ProfileRequest, profile_bundle
from runtime.reference import verify_engine
from runtime.stream import Stream

USUAL, SMALL = (42, 32, 26, 20), (36, 24, 16, 12)
RESET = (60, *USUAL[1:])
NEWEST = "tensorrt 11.4.0.106"


@dataclass
class Device:
    """A machine with a fake GPU and one version of the library.

    Attributes:
        state: The library's switches and counters.
    """

    backend: str
    cuda: FakeCuda
    state: SimpleNamespace


@pytest.fixture
def machine(monkeypatch) -> Callable[..., Device]:
    """``machine(version, cuda=FakeCuda())``: from here on this is such a machine."""

    def make(version: str = NEWEST, cuda: FakeCuda | None = None) -> Device:
        cuda = cuda or FakeCuda()
        module = fake_tensorrt(version, cuda)
        assert not signature_faults(module, API[version])
        bindings = ModuleType("cuda.bindings")
        bindings.runtime = cuda
        for name, fake in {
            "cuda": ModuleType("cuda"),
            "cuda.bindings": bindings,
            "cuda.bindings.runtime": cuda,
        }.items():
            monkeypatch.setitem(sys.modules, name, fake)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        return Device(version.split()[0], cuda, module.state)

    return make


@pytest.fixture(scope="module")
def folder(micro_bundle, tmp_path_factory) -> Path:
    return Path(shutil.copytree(micro_bundle, tmp_path_factory.mktemp("engines") / "micro"))


@pytest.fixture
def bundle(folder) -> Bundle:
    shutil.rmtree(folder / "engines", ignore_errors=True)
    return load_bundle(folder)


def built(bundle: Bundle, device: Device, **changes):
    request = EngineRequest(**{"budgets": {"usual": USUAL, "small": SMALL}} | changes)
    return build_engines(bundle, device.backend, request)


def pictures(count: int, batch: int = 1, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (batch, 96, 160, 3), np.uint8) for _ in range(count)]


def run(buffers, images, budgets) -> list[dict[str, np.ndarray]]:
    results = []
    for image, budget in zip(images, budgets, strict=True):
        buffers.image[:] = image
        results.append({name: np.array(value) for name, value in buffers.run(budget).items()})
        buffers.commit()
    return results


def expected(bundle: Bundle, images, budgets) -> list[dict[str, np.ndarray]]:
    return run(load_engine(bundle, threads=1).open_stream(len(images[0])), images, budgets)


def assert_same(got, want) -> None:
    for t, (one, other) in enumerate(zip(got, want, strict=True)):
        assert one.keys() == other.keys()
        for name in other:
            np.testing.assert_array_equal(one[name], other[name], err_msg=f"frame {t}: {name}")


# The same answers, in the names that every version has


@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_builds_loads_and_streams(bundle, machine, version):
    device = machine(version)
    built(bundle, device)
    images, budgets = pictures(9), [RESET, *[USUAL] * 5, *[SMALL] * 3]
    engine = load_engine(bundle, backend=device.backend)
    assert_same(run(engine.open_stream(), images, budgets), expected(bundle, images, budgets))
    assert str(engine.report) == f"{version} on NVIDIA GeForce RTX 4090 (sm89)"


@pytest.mark.parametrize("missing", ["execute_async_v3", "set_device_memory", "get_device_memory_size_for_profile_v2"])
def test_a_name_that_a_version_lacks_is_noticed(bundle, machine, monkeypatch, missing):
    """The fake is only worth something if it fails where the real library would."""
    classes = {name: {k: v for k, v in names.items() if k != missing} for name, names in API[NEWEST]["classes"].items()}
    monkeypatch.setitem(API, NEWEST, API[NEWEST] | {"classes": classes})
    device = machine()
    built(bundle, device)
    with pytest.raises(AttributeError, match=missing):
        run(load_engine(bundle, backend=device.backend).open_stream(), pictures(1), [USUAL])


def test_verify_and_stream_take_it_as_any_backend(bundle, machine):
    device = machine()
    build_engines(bundle, device.backend, EngineRequest(bundle.manifest.presets))
    engine = load_engine(bundle, backend="tensorrt")
    assert verify_engine(bundle, engine).frames
    with Stream(bundle, engine, keep_ratio=0.4) as stream:
        picture = pictures(1)[0][0]
        kept = [stream.step(picture, timestamp_s=t / 30).tokens_kept.tolist() for t in range(3)]
    assert kept == [[60, 24, 16, 12], [36, 24, 16, 12], [36, 24, 16, 12]]


def test_dense_graph_has_an_engine_of_its_own(bundle, machine):
    device = machine()
    built(bundle, device)
    engine = load_engine(bundle, bundle.manifest.baseline, backend="tensorrt")
    images = pictures(2)
    want = run(load_engine(bundle, bundle.manifest.baseline, threads=1).open_stream(), images, [None, None])
    assert_same(run(engine.open_stream(), images, [None, None]), want)


# Memory and graphs


def test_nothing_is_allocated_and_one_graph_launched_per_frame_once_warm(bundle, machine):
    device = machine()
    built(bundle, device)
    buffers = load_engine(bundle, backend="tensorrt").open_stream()
    images = pictures(5)
    run(buffers, images[:4], [USUAL] * 4)  # each of the two state sets: once kernel by kernel, once recorded
    assert device.state.executed == 2
    before = device.cuda.calls.copy()
    run(buffers, images * 2, [USUAL] * 10)
    assert device.cuda.calls - before == {"cudaGraphLaunch": 10, "cudaStreamSynchronize": 10}
    assert device.state.executed == 2


def test_graphs_of_one_budget_survive_another(bundle, machine):
    device = machine()
    built(bundle, device)
    budgets = [RESET, *[USUAL] * 4, *[SMALL] * 4, RESET, *[USUAL] * 3]
    images = pictures(len(budgets))
    buffers = load_engine(bundle, backend="tensorrt").open_stream()
    assert_same(run(buffers, images, budgets), expected(bundle, images, budgets))
    launches = device.cuda.calls["cudaGraphLaunch"]
    run(buffers, images[:4], [USUAL, SMALL, USUAL, SMALL])
    assert device.cuda.calls["cudaGraphLaunch"] == launches + 4


@pytest.mark.parametrize("where", ["cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphInstantiate", "engine"])
def test_without_a_graph_it_goes_on_and_says_so_once(bundle, machine, caplog, where):
    device = machine("tensorrt-rtx 1.7.1.116")
    built(bundle, device)
    device.state.capturable = where != "engine"
    device.cuda.fail[where] = 0, Status.cudaErrorStreamCaptureInvalidated
    buffers = load_engine(bundle, backend=device.backend).open_stream()
    images = pictures(6)
    with caplog.at_level(logging.WARNING):
        got = run(buffers, images, [USUAL] * 6)
    assert_same(got, expected(bundle, images, [USUAL] * 6))
    assert len(caplog.records) == 1 and "no CUDA graph" in caplog.text
    assert device.cuda.calls["cudaGraphLaunch"] == 0


def test_all_memory_comes_back(bundle, machine):
    device = machine()
    built(bundle, device)
    engine = load_engine(bundle, backend="tensorrt")
    run(engine.open_stream(), pictures(6), [USUAL] * 6)
    gc.collect()
    assert device.cuda.alive() == 0, "dropped, as Stream.close does"
    buffers = engine.open_stream()
    image = buffers.image
    run(buffers, pictures(6), [USUAL] * 6)
    engine.close()
    engine.close()
    assert not device.cuda.device and not device.cuda.streams and not device.cuda.graphs
    image[:] = 0  # a view that somebody still holds stays valid
    del buffers, image
    gc.collect()
    assert device.cuda.alive() == 0


def test_too_little_memory_leaves_nothing_behind(bundle, machine):
    device = machine()
    built(bundle, device)
    engine = load_engine(bundle, backend="tensorrt")
    device.cuda.limit = 100_000
    with pytest.raises(BackendError, match=r"cudaMalloc got no [\d.]+ MiB: [\d.]+ MiB of 0.1 MiB are free(.|\n)*fewer"):
        engine.open_stream()
    gc.collect()
    assert device.cuda.alive() == 0
    device.cuda.limit = 2**40
    run(engine.open_stream(), pictures(1), [USUAL])


def test_streams_share_an_engine_and_no_state(bundle, machine):
    device = machine()
    built(bundle, device)
    engine = load_engine(bundle, backend="tensorrt")
    cameras = [engine.open_stream(), engine.open_stream()]
    clips = [pictures(6, seed=1), pictures(6, seed=2)]
    got: list[list] = [[], []]
    for t in range(6):
        for camera, clip, results in zip(cameras, clips, got, strict=True):
            results += run(camera, clip[t : t + 1], [USUAL if t else RESET])
    for results, clip in zip(got, clips, strict=True):
        assert_same(results, expected(bundle, clip, [RESET, *[USUAL] * 5]))


def test_streams_may_run_in_threads_of_their_own(bundle, machine):
    device = machine()
    built(bundle, device)
    engine = load_engine(bundle, backend="tensorrt")
    clips = [pictures(8, seed=seed) for seed in range(3)]
    got: dict[int, list] = {}

    def camera(index: int) -> None:
        got[index] = run(engine.open_stream(), clips[index], [RESET, *[USUAL] * 7])

    threads = [threading.Thread(target=camera, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, clip in enumerate(clips):
        assert_same(got[index], expected(bundle, clip, [RESET, *[USUAL] * 7]))


def test_batch_is_what_the_engine_was_built_for(bundle, machine):
    device = machine()
    built(bundle, device, batches=(1, 3))
    engine = load_engine(bundle, backend="tensorrt")
    images = pictures(4, batch=3)
    assert_same(run(engine.open_stream(3), images, [USUAL] * 4), expected(bundle, images, [USUAL] * 4))
    with pytest.raises(BackendError, match=r"batch of 1 or 3, not of 2(.|\n)*--batch 2"):
        engine.open_stream(2)


@pytest.mark.parametrize(("batches", "together"), [((1,), 1), ((1, 2, 3), 3), ((1, 3), 1), ((2, 3), 0)])
def test_it_tells_which_budgets_and_batches_it_takes(bundle, machine, batches, together):
    device = machine()
    built(bundle, device, batches=batches)
    report = load_engine(bundle, backend="tensorrt").report
    assert set(report.budgets) == {USUAL, SMALL}, "those of frames without a prior are nobody's choice"
    assert report.largest_batch == together
    assert load_engine(bundle, bundle.manifest.baseline, backend="tensorrt").report.budgets is None


# State


def test_state_moves_on_only_with_commit(bundle, machine):
    device = machine()
    built(bundle, device)
    buffers = load_engine(bundle, backend="tensorrt").open_stream()
    image = pictures(1)[0]
    buffers.image[:] = image
    before = buffers.state()
    first = {name: np.array(value) for name, value in buffers.run(USUAL).items()}
    for name, value in buffers.state().items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)
    assert_same([dict(buffers.run(USUAL))], [first])
    buffers.commit()
    assert not np.array_equal(buffers.state()["prior.keys"], before["prior.keys"])
    buffers.reset()
    assert_same([buffers.state()], [before])


def test_state_can_be_read_and_written(bundle, machine):
    device = machine()
    built(bundle, device)
    buffers = load_engine(bundle, backend="tensorrt").open_stream()
    rng = np.random.default_rng(3)
    state = {
        name: (rng.standard_normal(value.shape) > 0).astype(value.dtype) for name, value in buffers.state().items()
    }
    buffers.set_state(state)
    assert_same([buffers.state()], [state])
    with pytest.raises(ValueError, match=r"prior.keys is float32 .* got float64"):
        buffers.set_state({"prior.keys": state["prior.keys"].astype(np.float64)})


@pytest.mark.parametrize(
    "name", ["execute_async_v3", "set_input_shape", "set_tensor_address", "set_optimization_profile_async"]
)
def test_a_call_that_returns_false_is_a_failed_step(bundle, machine, name):
    device = machine()
    built(bundle, device)
    buffers = load_engine(bundle, backend="tensorrt").open_stream()
    device.state.refuse.add(name)
    before = buffers.state()
    with pytest.raises(StepError, match=r"TensorRT 11.4.0.106 failed on model.onnx with budget \(42, 32, 26, 20\)"):
        buffers.run(USUAL)
    assert_same([buffers.state()], [before])
    device.state.refuse.clear()
    images = pictures(3)
    assert_same(run(buffers, images, [USUAL] * 3), expected(bundle, images, [USUAL] * 3))


def test_what_the_library_logged_is_in_the_message(bundle, machine):
    device = machine()
    built(bundle, device)
    buffers = load_engine(bundle, backend="tensorrt").open_stream()
    device.state.refuse.add("execute_async_v3")
    with pytest.raises(StepError, match=r"does not enqueue(.|\n)*something is wrong inside"):
        buffers.run(USUAL)


@pytest.mark.parametrize("function", ["cudaStreamSynchronize", "cudaMemcpyAsync"])
def test_a_cuda_failure_is_a_failed_step(bundle, machine, function):
    device = machine()
    built(bundle, device)
    buffers = load_engine(bundle, backend="tensorrt").open_stream()
    run(buffers, pictures(1), [USUAL])
    device.cuda.fail[function] = 1 if function == "cudaMemcpyAsync" else 0, Status.cudaErrorIllegalAddress
    with pytest.raises(StepError, match=rf"{function} failed with cudaErrorIllegalAddress: text of"):
        buffers.run(USUAL)


def test_budget_that_was_not_built_names_those_that_were(bundle, machine):
    device = machine()
    built(bundle, device)
    engine = load_engine(bundle, backend="tensorrt")
    with pytest.raises(TokenBudgetError, match=r"9,9,9,9(.|\n)*42,32,26,20 \(usual\)(.|\n)*--token-budget 9,9,9,9"):
        engine.open_stream().run((9, 9, 9, 9))


# What does not load


def refused(bundle: Bundle, device: Device, *words: str) -> None:
    with pytest.raises(EngineMismatchError) as caught:
        load_engine(bundle, backend=device.backend)
    missing = [word for word in (*words, "deploy.py build") if word not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"


def test_no_engine(bundle, machine):
    refused(bundle, machine(), "holds none for tensorrt and model.onnx")


def test_engine_of_another_gpu(bundle, machine):
    built(bundle, machine(cuda=FakeCuda("Orin", (8, 7))))
    refused(bundle, machine(), "built for Orin (sm87); here is NVIDIA GeForce RTX 4090 (sm89)")


def test_engine_of_another_card_of_the_same_generation(bundle, machine):
    built(bundle, machine(cuda=FakeCuda("NVIDIA L4", (8, 9))))
    refused(bundle, machine(), "built for NVIDIA L4 (sm89)")
    built(bundle, machine(cuda=FakeCuda("NVIDIA L4", (8, 9))), compatibility="same-compute-capability")
    load_engine(bundle, backend=machine().backend)


def test_engine_of_another_version(bundle, machine):
    built(bundle, machine("tensorrt 10.3.0"))
    refused(bundle, machine(), "built by version 10.3.0, runs with that; here is 11.4.0.106")


def test_engine_that_was_cut_short(bundle, machine):
    device = machine()
    plan = built(bundle, device)[0].plan
    plan.write_bytes(plan.read_bytes()[:-10])
    refused(bundle, device, plan.name, "cut short or changed")


def test_engine_of_another_graph(bundle, machine, folder):
    device = machine()
    built(bundle, device)
    other = bundle.manifest.files | {"model.onnx": "0" * 64}
    changed = bundle.manifest.model_copy(update={"files": other})
    with pytest.raises(EngineMismatchError, match=r"built from another model.onnx"):
        load_engine(Bundle(folder, changed, bundle.initial_state), backend="tensorrt")


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe", b'{"record_version": 99}'])
def test_record_that_is_none(bundle, machine, content):
    device = machine()
    plan = built(bundle, device)[0].plan
    plan.with_suffix(".json").write_bytes(content)
    refused(bundle, device, "no record of an engine")


def test_out_of_memory_while_loading(bundle, machine):
    device = machine()
    built(bundle, device)
    device.state.out_of_memory = True
    with pytest.raises(BackendError, match=r"does not load(.|\n)*OutOfMemory(.|\n)*fewer budgets"):
        load_engine(bundle, backend="tensorrt")


def test_without_a_gpu_the_library_is_not_touched(bundle, machine):
    device = machine()
    built(bundle, device)
    device.cuda.gpu = None
    with pytest.raises(BackendUnavailableError, match=r"no NVIDIA GPU(.|\n)*onnxruntime"):
        load_engine(bundle, backend="tensorrt")


def test_without_the_bindings_it_says_how_to_get_them(bundle, machine, monkeypatch):
    device = machine()
    built(bundle, device)
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(BackendUnavailableError, match=r"pip install 'cuda-bindings"):
        load_engine(bundle, backend="tensorrt")


# How long it takes


def profile_of(bundle: Bundle, device: Device):
    build_engines(bundle, device.backend, EngineRequest(bundle.manifest.presets))
    request = ProfileRequest(backend=device.backend, steps=3, warm_up=1, presets=["0.40"])
    return profile_bundle(bundle, request)


@pytest.mark.parametrize("version", VERSIONS)
def test_profile_has_layers_parts_and_transfers(bundle, machine, version):
    device = machine(version)
    device.state.types = ["Row major linear FP32"] * 3
    profile = profile_of(bundle, device)
    assert [row.name for row in profile.rows] == ["dense", "keep 0.40"]
    for layers in profile.layers.values():
        assert [(layer.name, layer.op, layer.part, layer.ms) for layer in layers] == [
            (f"blocks.{index}.mlp/Gelu_1", "kgen", f"blocks.{index}.mlp", 0.25 * (index + 1)) for index in range(3)
        ]
    assert {part.name for part in profile.parts} >= {"block 0 MLP", "blocks 1-2 MLP"}
    assert profile.stages_ms["upload"] > 0 and profile.stages_ms["download"] > 0
    assert "CUDA graph: used" in " ".join(profile.mode)


def test_engine_without_the_default_budget_runs_what_it_has(bundle, machine, caplog):
    device, small = machine(), bundle.manifest.presets["0.40"]
    build_engines(bundle, device.backend, EngineRequest({"0.40": small, "1.00": bundle.manifest.presets["1.00"]}))
    profile = profile_bundle(bundle, ProfileRequest(backend=device.backend, steps=3, warm_up=1, layers=False))
    assert [row.name for row in profile.rows] == ["dense", "keep 0.40", "keep 1.00"] and profile.default == "0.40"
    caplog.clear()
    with Stream(bundle, load_engine(bundle, backend=device.backend)) as stream:
        assert stream.budget == small
        image = pictures(1)[0][0]
        result = [stream.step(image) for _ in range(2)][1]  # the first frame has no prior, and another budget
    assert tuple(result.tokens_kept) == small
    assert "not built for the bundle's default budget, keep ratio 0.55; it runs at 0.4" in caplog.text


def test_moving_once_more_changes_no_answer(bundle, machine):
    device = machine()
    built(bundle, device)
    images, budgets = pictures(4), [RESET, USUAL, SMALL, USUAL]
    with_transfers = []
    buffers = load_engine(bundle, backend=device.backend).open_stream()
    for image, budget in zip(images, budgets, strict=True):
        with_transfers += run(buffers, [image], [budget])
        assert min(buffers.transfers_ms()) >= 0
    assert_same(with_transfers, expected(bundle, images, budgets))
