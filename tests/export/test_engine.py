"""Engine plans: what is refused before TensorRT starts, and what TensorRT-RTX makes of the exported graph."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from export.engine import LARGEST_TOP_K, build_rtx_plan
from runtime.budget import reset_budget
from runtime.bundle import load_bundle
from runtime.errors import BackendError, BackendUnavailableError, TokenBudgetError

ROOT = Path(__file__).parents[2]

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="needs tensorrt-rtx: pip install '.[tensorrt-rtx]'"
)


# pixels = image.to(weight.dtype).permute(0, 3, 1, 2) in PatchEmbed is all that is missing; then this mark goes
@pytest.fixture(scope="module")
def bundle(micro_bundle):
    return load_bundle(micro_bundle)


@pytest.fixture
def unreachable(monkeypatch):
    """TensorRT-RTX is as good as not installed: what has to be refused before it starts cannot pass by luck."""
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)


def with_graph(bundle, **changes):
    """The bundle with a manifest that says something else; its files stay."""
    return replace(bundle, manifest=bundle.manifest.model_copy(update=changes))


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


# Refused before it starts


def test_threshold_is_refused_with_its_cure(threshold_bundle, unreachable):
    bundle = load_bundle(threshold_bundle)
    with pytest.raises(BackendError, match=r"threshold(.|\n)*NonZero(.|\n)*--selection budget"):
        build_rtx_plan(bundle, bundle.manifest.presets)


def test_more_tokens_than_top_k_takes_are_refused(bundle, unreachable):
    """3840 is the last that TensorRT runs; its builder takes more with no more than a warning."""
    large = with_graph(bundle, patch_grid=(64, 64), image_size=(1024, 1024))
    with pytest.raises(TokenBudgetError, match=r"3841.*1\.\.3840(.|\n)*--image-size"):
        build_rtx_plan(large, {"fits": (LARGEST_TOP_K, 9, 9, 9), "does not": (LARGEST_TOP_K + 1, 9, 9, 9)})
    with pytest.raises(TokenBudgetError, match="4096"):
        build_rtx_plan(large, {"reset": reset_budget((100, 90, 80, 70), 4096)})
    with pytest.raises(BackendUnavailableError):
        build_rtx_plan(large, {"fits": (LARGEST_TOP_K, 9, 9, 9)})


def test_a_dense_graph_has_no_top_k_to_outgrow(bundle, unreachable):
    large = with_graph(bundle, patch_grid=(64, 64), image_size=(1024, 1024), graph=bundle.manifest.baseline)
    with pytest.raises(BackendUnavailableError):
        build_rtx_plan(large, {"1.00": (4096,) * 4})


@pytest.mark.parametrize(
    ("budgets", "message"),
    [({}, "none was given"), ({"a": (0, 0, 0, 0)}, "0 at stage 0"), ({"a": (61, 1, 1, 1)}, "61"), ({"a": (5, 5)}, "4")],
)
def test_budgets_that_do_not_fit_the_model_are_refused(bundle, unreachable, budgets, message):
    with pytest.raises(TokenBudgetError, match=message):
        build_rtx_plan(bundle, budgets)


def test_missing_library_is_an_error_that_says_how_to_get_it(bundle, unreachable):
    with pytest.raises(BackendUnavailableError, match=r"pip install '\.\[tensorrt-rtx\]'"):
        build_rtx_plan(bundle, bundle.manifest.presets)


def test_needs_neither_torch_nor_onnx():
    blocked = "import sys; sys.modules.update(torch=None, onnx=None, tensorrt_rtx=None); import export.engine"
    subprocess.run([sys.executable, "-c", blocked], check=True, cwd=ROOT)


# With TensorRT-RTX


@needs_rtx
def test_graph_parses_with_the_tensors_of_the_manifest(bundle):
    """The image goes in as bytes, and the values of ``token_budget`` are known on the host."""
    spec = bundle.manifest.graph
    network, *_ = parsed(bundle.path(spec))
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    assert [tensor.name for tensor in inputs] == [tensor.name for tensor in spec.inputs]
    assert [tensor.name for tensor in outputs] == [tensor.name for tensor in spec.outputs]
    for tensor, expected in zip([*inputs, *outputs], [*spec.inputs, *spec.outputs], strict=True):
        kind = {"float32": "FLOAT"}.get(expected.dtype, expected.dtype.upper())
        assert tensor.dtype.name == kind, expected.name
        assert len(tensor.shape) == len(expected.shape), expected.name
    assert [tensor.name for tensor in inputs if tensor.is_shape_tensor] == ["token_budget"]


@needs_rtx
@pytest.mark.slow
def test_builds_one_profile_for_each_budget(bundle):
    usual = bundle.manifest.presets["0.55"]
    one = build_rtx_plan(bundle, {"usual": usual})
    two = build_rtx_plan(bundle, {"usual": usual, "reset": reset_budget(usual, 60)})
    assert isinstance(one, bytes) and len(two) > 1.2 * len(one), "the second profile has kernels of its own"


@needs_rtx
@pytest.mark.slow
def test_builds_the_dense_graph(bundle):
    dense = with_graph(bundle, graph=bundle.manifest.baseline)
    assert build_rtx_plan(dense, {"1.00": (60,) * 4}, ["sm86", "sm120"])


@needs_rtx
def test_a_graph_that_it_does_not_take_is_an_error_with_the_node(bundle, threshold_bundle, tmp_path):
    """NonZero under a manifest that says budget: the parser's own reason comes through."""
    spec = bundle.manifest.graph
    (tmp_path / spec.file).write_bytes((threshold_bundle / "model.onnx").read_bytes())
    with pytest.raises(BackendError, match=r"node '\w+' \(NonZero\)"):
        build_rtx_plan(replace(bundle, folder=tmp_path), {"usual": (42, 33, 26, 21)})


@needs_rtx
def test_a_budget_that_the_graph_cannot_run_is_refused_by_the_builder(bundle):
    """Behind the manifest's back: TopK of 61 among 60 tokens."""
    wrong = with_graph(bundle, patch_grid=(61, 1))
    with pytest.raises(BackendError, match=r"builds no engine(.|\n)*61"):
        build_rtx_plan(wrong, {"too many": (61, 1, 1, 1)})


@needs_rtx
def test_unknown_gpu_generation(bundle):
    with pytest.raises(BackendError, match=r"'sm10', only for sm75(.|\n)*sm120"):
        build_rtx_plan(bundle, {"usual": (42, 33, 26, 21)}, ["sm10"])
