"""Engine plans: what is refused before the library starts, and what TensorRT-RTX makes of the exported graphs."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from fake_cuda import FakeCuda
from fake_tensorrt import fake_tensorrt
from hypothesis import given, settings
from hypothesis import strategies as st

from export.engine import build_engines
from export.engine_layers import differences, layer_types
from export.engine_plan import Watch
from export.engine_request import LARGEST_TOP_K, EngineRequest, budgets_by_name, engine_inputs
from runtime.budget import reset_budget
from runtime.bundle import load_bundle
from runtime.cuda import Gpu
from runtime.engines import EngineInputs, EngineRecord, record_path
from runtime.errors import BackendError, BackendUnavailableError, SinkError, TokenBudgetError
from runtime.tensorrt_library import import_tensorrt

ROOT = Path(__file__).parents[2]
USUAL = (42, 32, 26, 20)
ORIN = Gpu("Orin", "sm87")
NEWEST, RTX = "tensorrt 11.4.0.106", "tensorrt-rtx 1.7.1.116"

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="needs tensorrt-rtx: pip install '.[tensorrt-rtx]'"
)


@pytest.fixture(scope="module")
def folder(micro_bundle, tmp_path_factory) -> Path:
    return Path(shutil.copytree(micro_bundle, tmp_path_factory.mktemp("engines") / "micro"))


@pytest.fixture
def bundle(folder):
    shutil.rmtree(folder / "engines", ignore_errors=True)
    return load_bundle(folder)


@pytest.fixture
def machine(monkeypatch):
    """``machine(version, cuda)``: from here on this is a machine with that library and a fake GPU, or with none."""

    def make(version: str, cuda: FakeCuda | None = None):
        cuda = cuda or FakeCuda()
        module = fake_tensorrt(version, cuda)
        bindings = ModuleType("cuda.bindings")
        bindings.runtime = cuda
        monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        return module.state

    return make


@pytest.fixture
def inputs_for(machine):
    """``inputs_for(bundle, request, version=..., gpu=...)``: what would be built, or the refusal."""

    def make(bundle, request, version=NEWEST, gpu=ORIN, graph=None):
        machine(version)
        return engine_inputs(bundle, graph or bundle.manifest.graph, request, import_tensorrt(version.split()[0]), gpu)

    return make


def with_graph(bundle, **changes):
    """The bundle with a manifest that says something else; its files stay."""
    return replace(bundle, manifest=bundle.manifest.model_copy(update=changes))


def build(bundle, backend="tensorrt-rtx", budgets=None, **changes):
    force, watch = changes.pop("force", False), changes.pop("watch", None)
    request = EngineRequest(**{"budgets": budgets or {"usual": USUAL}} | changes)
    return build_engines(bundle, backend, request, force=force, watch=watch)


# Refused before it starts


def test_threshold_is_refused_where_tokens_cannot_be_counted(threshold_bundle, inputs_for):
    bundle = load_bundle(threshold_bundle)
    request = EngineRequest(bundle.manifest.presets)
    with pytest.raises(BackendError, match=r"threshold(.|\n)*NonZero(.|\n)*--selection budget"):
        inputs_for(bundle, request, RTX)
    assert inputs_for(bundle, request).profiles, "TensorRT has NonZero"


def test_more_tokens_than_top_k_takes_are_refused(bundle, inputs_for):
    """3840 is the last that TensorRT runs; its builder takes more with no more than a warning."""
    large = with_graph(bundle, patch_grid=(60, 64), image_size=(960, 1024))
    assert inputs_for(large, EngineRequest({"fits": (LARGEST_TOP_K, 9, 9, 9)})).profiles
    larger = with_graph(bundle, patch_grid=(64, 64), image_size=(1024, 1024))
    with pytest.raises(TokenBudgetError, match=r"3841.*1\.\.3840(.|\n)*--image-size"):
        inputs_for(larger, EngineRequest({"does not": (LARGEST_TOP_K + 1, 9, 9, 9)}))
    with pytest.raises(TokenBudgetError, match=r"small reset keeps 4096"):
        inputs_for(larger, EngineRequest({"small": (100, 90, 80, 70)}))


def test_a_dense_graph_has_no_top_k_to_outgrow(bundle, inputs_for):
    large = with_graph(bundle, patch_grid=(64, 64), image_size=(1024, 1024))
    made = inputs_for(large, EngineRequest({"1.00": (4096,) * 4}), graph=bundle.manifest.baseline)
    assert [(profile.name, profile.token_budget) for profile in made.profiles] == [("dense", None)]


@pytest.mark.parametrize(
    ("budgets", "message"),
    [
        ({}, "none was given"),
        ({"a": (0, 0, 0, 0)}, "0 at stage 0"),
        ({"a": (61, 1, 1, 1)}, "61"),
        ({"a": (5, 5)}, "4"),
        ({"a": (5, 6, 5, 5)}, "nested"),
    ],
)
def test_budgets_that_do_not_fit_the_model_are_refused(bundle, inputs_for, budgets, message):
    with pytest.raises(TokenBudgetError, match=message):
        inputs_for(bundle, EngineRequest(budgets))


@pytest.mark.parametrize(
    ("changes", "version", "message"),
    [
        ({"batches": ()}, NEWEST, r"batch is \[\]"),
        ({"batches": (1, 0)}, NEWEST, "at least 1"),
        ({"compute_capabilities": ["sm89"]}, NEWEST, r"Orin \(sm87\), not for sm89(.|\n)*tensorrt-rtx"),
        ({"compute_capabilities": ["sm10"]}, RTX, r"sm75, .*sm120.*not for 'sm10'"),
        ({"compute_capabilities": ["sm87"]}, RTX, r"build on the Jetson with --backend tensorrt"),
        ({"compatibility": "ampere-plus"}, RTX, "--compute-capability"),
        ({"version_compatible": True}, RTX, "seconds"),
        ({"compatibility": "same-compute-capability"}, "tensorrt 10.3.0", r"10.3.0 has no .*only none, ampere-plus"),
        ({"compatibility": "any"}, NEWEST, "allowed are none, same-compute-capability, ampere-plus"),
    ],
)
def test_what_a_library_cannot_do_is_refused(bundle, inputs_for, changes, version, message):
    with pytest.raises(BackendError, match=message):
        inputs_for(bundle, EngineRequest({"usual": USUAL}, **changes), version)


def test_fp8_is_refused_where_the_gpu_has_none(bundle, inputs_for):
    fp8 = with_graph(bundle, precision="fp8")
    with pytest.raises(BackendError, match=r"sm87 \(Jetson Orin\) has no fp8: it came with sm89 \(Ada\)\. .*int8"):
        inputs_for(fp8, EngineRequest({"usual": USUAL}))
    assert inputs_for(fp8, EngineRequest({"usual": USUAL}), gpu=Gpu("Thor", "sm110"))


def test_tensorrt_needs_the_gpu_it_builds_for(bundle, machine):
    cuda = FakeCuda()
    machine(NEWEST, cuda)
    cuda.gpu = None
    with pytest.raises(BackendUnavailableError, match=r"no NVIDIA GPU(.|\n)*tensorrt-rtx"):
        build(bundle, "tensorrt")
    assert not (bundle.folder / "engines").exists()


@pytest.mark.parametrize(("backend", "cure"), [("tensorrt", "JetPack"), ("tensorrt-rtx", r"pip install '\.\[")])
def test_missing_library_is_an_error_that_says_how_to_get_it(bundle, monkeypatch, backend, cure):
    monkeypatch.setitem(sys.modules, backend.replace("-", "_"), None)
    with pytest.raises(BackendUnavailableError, match=cure):
        build(bundle, backend)


def test_needs_neither_torch_nor_onnx():
    blocked = "import sys; sys.modules.update(torch=None, onnx=None, tensorrt_rtx=None); import export.engine"
    subprocess.run([sys.executable, "-c", blocked], check=True, cwd=ROOT)


# What is asked for


def test_budgets_by_name(bundle):
    manifest = bundle.manifest
    assert budgets_by_name(manifest) == manifest.presets
    assert budgets_by_name(manifest, [0.55]) == {"0.55": USUAL}
    assert budgets_by_name(manifest, counts=[(9, 8, 7, 6)]) == {"9,8,7,6": (9, 8, 7, 6)}
    with pytest.raises(TokenBudgetError, match=r"keep ratio is 1\.5"):
        budgets_by_name(manifest, [1.5])


def test_every_budget_has_a_profile_and_so_has_its_reset(bundle, inputs_for):
    profiles = inputs_for(bundle, EngineRequest(bundle.manifest.presets, batches=(2, 1))).profiles
    budgets = [profile.token_budget for profile in profiles if profile.batch == 1]
    assert len(set(budgets)) == len(budgets), "one profile for each different budget"
    for counts in bundle.manifest.presets.values():
        assert {counts, reset_budget(counts, 60)} <= set(budgets)
    assert "1.00, 1.00 reset" in [profile.name for profile in profiles], "the same budget under two names"
    assert [profile.batch for profile in profiles] == [1] * len(budgets) + [2] * len(budgets)


names = st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=8)
counts = st.lists(st.integers(1, 4000), min_size=1, max_size=5).map(lambda c: tuple(sorted(c, reverse=True)))
records = st.builds(
    EngineRecord,
    backend=st.sampled_from(["tensorrt", "tensorrt-rtx"]),
    library_version=st.from_regex(r"\A\d{1,2}(\.\d{1,3}){1,3}\Z"),
    gpu=st.none() | st.text(max_size=20),
    compute_capabilities=st.lists(st.sampled_from(["sm86", "sm87", "sm120"]), unique=True).map(tuple),
    graph=names.map(lambda name: f"{name}.onnx"),
    graph_sha256=st.just("0" * 64),
    precision=st.sampled_from(["fp32", "int8"]),
    profiles=st.lists(
        st.fixed_dictionaries({"name": names, "token_budget": st.none() | counts, "batch": st.integers(1, 64)}),
        min_size=1,
    ),
    plan_sha256=st.just("f" * 64),
    plan_bytes=st.integers(1),
    build_s=st.floats(0, 1e4),
    asked=st.dictionaries(names, st.integers(0, 99)),
)


@settings(max_examples=40)
@given(records)
def test_records_survive_the_file(record):
    again = EngineRecord.model_validate_json(record.model_dump_json())
    assert again == record and again.inputs() == record.inputs()
    assert isinstance(record.inputs(), EngineInputs) and "/" not in record.name


@settings(max_examples=40)
@given(records, st.sampled_from(["sm75", "sm80", "sm86", "sm87", "sm120"]), names)
def test_an_engine_covers_no_gpu_that_it_was_not_built_for(record, capability, gpu):
    covered = record.why_not(record.library_version, Gpu(gpu, capability)) is None
    if record.compute_capabilities:
        assert covered == (capability in record.compute_capabilities and record.gpu in (None, gpu))
    else:
        assert covered == (capability != "sm75")


@pytest.mark.parametrize(
    ("built", "here", "compatible", "runs"),
    [
        ("10.3.0", "10.3.0", False, True),
        ("10.3.0", "10.13.3.9", False, False),
        ("10.3.0", "10.13.3.9", True, True),
        ("10.13.3.9", "10.3.0", True, False),
        ("10.16.1", "11.4.0", True, False),
        ("10.13.3.9", "10.13.3.9.post1", False, True),
    ],
)
def test_versions_that_run_an_engine(bundle, inputs_for, built, here, compatible, runs):
    made = inputs_for(bundle, EngineRequest({"usual": USUAL}, version_compatible=compatible))
    made = made.model_copy(update={"library_version": built})
    assert (made.why_not(here, ORIN) is None) == runs


# Building, on a fake GPU


def test_options_reach_the_library(bundle, machine):
    state = machine(NEWEST)
    build(bundle, "tensorrt", workspace_bytes=2**30, version_compatible=True, compatibility="ampere-plus")
    assert state.config._limits == {"WORKSPACE": 2**30}
    assert state.config._flags == {"VERSION_COMPATIBLE"}, "and TF32 is off"
    assert state.config.hardware_compatibility_level.name == "AMPERE_PLUS"
    assert state.config.profiling_verbosity.name == "DETAILED"


def test_an_engine_is_built_again_only_when_something_changed(bundle, machine):
    state = machine(NEWEST)
    first = build(bundle, "tensorrt")
    assert [engine.reused for engine in first] == [False, False] and state.builds == 2
    assert [engine.reused for engine in build(bundle, "tensorrt")] == [True, True] and state.builds == 2
    build(bundle, "tensorrt", force=True)
    assert state.builds == 4
    assert [engine.reused for engine in build(bundle, "tensorrt", {"other": (9, 8, 7, 6)})] == [False, True]
    first[0].plan.write_bytes(b"cut")
    assert [engine.reused for engine in build(bundle, "tensorrt", {"other": (9, 8, 7, 6)})] == [False, True]
    record_path(first[0].plan).write_text("{}")
    assert [engine.reused for engine in build(bundle, "tensorrt", {"other": (9, 8, 7, 6)})] == [False, True]
    assert load_bundle(bundle.folder), "the bundle is as valid as before"


def test_kernel_timings_are_kept_and_those_that_do_not_fit_left_aside(bundle, machine, caplog):
    machine(NEWEST)
    plan = build(bundle, "tensorrt")[0].plan
    cache = next(plan.parent.glob("timing*"))
    assert cache.name == "timing.tensorrt-11.4.0.106.sm89-nvidia-geforce-rtx-4090.plan.cache"
    kept = cache.read_bytes()
    with caplog.at_level(logging.WARNING):
        build(bundle, "tensorrt", force=True)
        assert not caplog.records
        cache.write_bytes(b"timings of another version")
        build(bundle, "tensorrt", force=True)
    assert "do not fit" in caplog.text and cache.read_bytes() == kept


def test_out_of_memory_says_what_to_do_and_keeps_the_old_engine(bundle, machine):
    state = machine(NEWEST)
    old = build(bundle, "tensorrt")[0]
    state.out_of_memory = True
    with pytest.raises(BackendError, match=r"OutOfMemory(.|\n)*--workspace"):
        build(bundle, "tensorrt", {"other": (9, 8, 7, 6)})
    state.out_of_memory = False
    assert build(bundle, "tensorrt")[0].reused and old.plan.is_file()


def test_layers_are_read_back_and_compared(bundle, machine):
    state = machine(NEWEST)
    first = build(bundle, "tensorrt")[0]
    assert first.differences == [] and first.record.found == {"FLOAT": 1} and first.record.asked["FLOAT"] > 10
    told = json.loads(first.plan.with_name(first.plan.name.replace(".plan", ".layers.json")).read_text())
    assert told["Layers"][0]["Name"] == "__myl_0"
    state.types = ["Row major linear FP16"]
    assert build(bundle, "tensorrt")[0].differences == [], "nothing changed, so nothing is read again"
    second = build(bundle, "tensorrt", force=True)[0]
    assert second.differences == ["HALF is in 1 layers and was not asked for"]


def test_engine_made_without_a_gpu_is_read_back_where_there_is_one(bundle, machine):
    cuda = FakeCuda()
    state = machine(RTX, cuda)
    gpu, cuda.gpu = cuda.gpu, None
    assert build(bundle)[0].differences is None
    cuda.gpu = gpu
    there = build(bundle)[0]
    assert there.reused and there.differences == [] and there.record.found and state.builds == 2
    assert build(bundle, compute_capabilities=["sm120"])[0].differences is None, "not for this GPU"


@pytest.mark.parametrize(
    ("word", "name"),
    [("Row major linear FP16", "HALF"), ("Half", "HALF"), ("BFloat16", "BF16"), ("Int8", "INT8"), ("FP8", "FP8"),
     ("Float", "FLOAT"), ("Row major linear FP32", "FLOAT")],
)  # fmt: skip
def test_types_in_the_words_of_the_inspector(word, name):
    """From TensorRT's documentation of 10.x and 11.x: one field for format and type, or one for each."""
    for fields in ({"Format/Datatype": word}, {"Format": "Row major linear", "DataType": word}):
        assert layer_types(json.dumps({"Layers": [{"Outputs": [{"Name": "x", **fields}]}, "a name alone"]})) == {
            name: 1
        }


def test_differences_name_what_is_missing_and_what_is_too_much():
    assert differences({"HALF": 4, "FLOAT": 2}, {"HALF": 1, "FLOAT": 9}) == []
    assert differences({"INT8": 4}, {"HALF": 1}) == [
        "INT8 was asked for in 4 layers and is in none",
        "HALF is in 1 layers and was not asked for",
    ]


def test_a_disk_that_is_full_leaves_no_half_engine(bundle, machine, monkeypatch):
    machine(NEWEST)
    monkeypatch.setattr(Path, "write_bytes", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(SinkError, match="No space left"):
        build(bundle, "tensorrt")
    assert list((bundle.folder / "engines").iterdir()) == []


# With TensorRT-RTX itself


def parsed(path: Path):
    """The network that TensorRT-RTX makes of a file, with the objects it needs alive."""
    import tensorrt_rtx as trt

    log = trt.Logger(trt.Logger.INTERNAL_ERROR)
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    errors = [] if parser.parse_from_file(str(path)) else [parser.get_error(i) for i in range(parser.num_errors)]
    assert not errors, [(error.node_name(), error.desc()) for error in errors]
    return network, builder, parser


@needs_rtx
def test_graph_parses_with_the_tensors_of_the_manifest(bundle):
    """The image goes in as bytes, and the values of ``token_budget`` are known on the host."""
    spec = bundle.manifest.graph
    network, *_ = parsed(bundle.path(spec))
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    for tensor, expected in zip([*inputs, *outputs], [*spec.inputs, *spec.outputs], strict=True):
        kind = {"float32": "FLOAT"}.get(expected.dtype, expected.dtype.upper())
        assert (tensor.name, tensor.dtype.name) == (expected.name, kind)
        assert len(tensor.shape) == len(expected.shape), expected.name
    assert [tensor.name for tensor in inputs if tensor.is_shape_tensor] == ["token_budget"]
    kinds = {network.get_layer(index).type.name for index in range(network.num_layers)}
    assert {"TOPK", "GATHER", "MATRIX_MULTIPLY"} <= kinds and "NON_ZERO" not in kinds


@needs_rtx
@pytest.mark.slow
@pytest.mark.parametrize(
    "capabilities", [("sm86",), ("sm89",), ("sm120",), ()], ids=lambda names: "-".join(names) or "all"
)
def test_builds_for_named_gpus(bundle, capabilities):
    model, dense = build(bundle, compute_capabilities=capabilities)
    for engine in (model, dense):
        assert engine.plan.stat().st_size == engine.record.plan_bytes > 1000
        assert engine.record.compute_capabilities == capabilities and engine.record.asked.keys() == {"FLOAT"}
        assert engine.differences is None
    assert [profile.token_budget for profile in model.record.profiles] == [USUAL, (60, *USUAL[1:])]


TYPE_OF = {"fp32": "FLOAT", "fp16": "HALF", "bf16": "BF16", "int8": "INT8", "fp8": "FP8"}
GIVEN = [Path(path) for path in os.environ.get("ENGINE_BUNDLES", "").split(os.pathsep) if path]


@needs_rtx
@pytest.mark.slow
@pytest.mark.skipif(not GIVEN, reason="name bundles in ENGINE_BUNDLES, with colons between")
@pytest.mark.parametrize("given", GIVEN, ids=lambda path: path.name)
@pytest.mark.parametrize("capability", ["sm86", "sm89", "sm120"])
def test_given_bundles_build_in_the_precision_that_they_name(given, capability, tmp_path):
    """Any bundle, of any network and precision: its layers compute in that, or the GPU is refused."""
    bundle = load_bundle(Path(shutil.copytree(given, tmp_path / "given", ignore=shutil.ignore_patterns("engines"))))
    manifest = bundle.manifest
    usual = {"usual": manifest.presets[manifest.default_preset]}
    if manifest.precision == "fp8" and capability == "sm86":
        with pytest.raises(BackendError, match="fp8"):
            build(bundle, budgets=usual, compute_capabilities=[capability])
        return
    for engine in build(bundle, budgets=usual, compute_capabilities=[capability]):
        narrow = {name for name in engine.record.asked if name != "FLOAT"}
        assert TYPE_OF[manifest.precision] in engine.record.asked
        assert manifest.precision != "fp32" or not narrow


@needs_rtx
@pytest.mark.slow
def test_every_profile_has_kernels_of_its_own(bundle):
    one = build(bundle, budgets={"all": (60,) * 4})[0]
    two = build(bundle, budgets={"usual": USUAL})[0]
    assert two.record.plan_bytes > 1.2 * one.record.plan_bytes


@needs_rtx
def test_a_graph_that_it_does_not_take_is_an_error_with_the_node(bundle, threshold_bundle, tmp_path):
    """NonZero under a manifest that says budget: the parser's own reason comes through."""
    spec = bundle.manifest.graph
    (tmp_path / spec.file).write_bytes((threshold_bundle / "model.onnx").read_bytes())
    with pytest.raises(BackendError, match=r"node 'token_moves/NonZero_\d+' \(NonZero\)"):
        build(replace(bundle, folder=tmp_path))


@needs_rtx
def test_a_graph_that_is_not_the_manifests_is_refused(bundle, tmp_path):
    spec = bundle.manifest.graph
    shutil.copy(bundle.path(bundle.manifest.baseline), tmp_path / spec.file)
    with pytest.raises(BackendError, match=r"the manifest says image, prior\.keys"):
        build(replace(bundle, folder=tmp_path))


@needs_rtx
def test_a_budget_that_the_graph_cannot_run_is_refused_by_the_builder(bundle):
    """Behind the manifest's back: TopK of 61 among 60 tokens."""
    wrong = with_graph(bundle, patch_grid=(61, 1))
    with pytest.raises(BackendError, match=r"builds no engine(.|\n)*61"):
        build(wrong, budgets={"too many": (61, 1, 1, 1)})


@needs_rtx
def test_too_little_workspace_says_so(bundle):
    with pytest.raises(BackendError, match=r"builds no engine(.|\n)*Memory ran out: give a larger --workspace"):
        build(bundle, workspace_bytes=1)


@needs_rtx
def test_progress_is_told_and_a_build_can_be_stopped(bundle):
    told: list[tuple[str, int, int]] = []
    stop = threading.Event()

    def report(phase: str, done: int, total: int) -> None:
        told.append((phase, done, total))
        if len(told) > 3:
            stop.set()

    with pytest.raises(BackendError, match="was stopped; nothing was written"):
        build(bundle, watch=Watch(report, stop))
    assert told[0] == ("Building engine", 0, 6) and len(told) < 50
    assert list((bundle.folder / "engines").iterdir()) == []
