"""fp16 and bf16: what is rounded and what is not, that the graph is valid, and that TensorRT-RTX takes it."""

from __future__ import annotations

import importlib.util
import shutil

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from calib.graph_index import GraphIndex, check_graph, module_of
from calib.samples import deviation, reference_samples
from export.engine import build_engines
from export.engine_request import EngineRequest
from export.lowered_bundle import Lowering, write_lowered
from export.typed_graph import KeepFp32, rounded_graph, to_typed_graph
from runtime.bundle import load_bundle
from runtime.manifest import GraphSpec

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="needs tensorrt-rtx: pip install '.[tensorrt-rtx]'"
)
KIND = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
KIND_NAME = {"fp16": "HALF", "bf16": "BF16"}  # in TensorRT
NUMPY = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16}
NO_STATE = GraphSpec(file="x.onnx", selection="none", inputs=(), outputs=(), state=())


@pytest.fixture(scope="module", params=["budget", "threshold", "dense"])
def graph(request, micro_bundle, threshold_bundle):
    """A graph of vpp-eo-micro with its entry in the manifest."""
    bundle = load_bundle(threshold_bundle if request.param == "threshold" else micro_bundle)
    spec = bundle.manifest.baseline if request.param == "dense" else bundle.manifest.graph
    return onnx.load(bundle.path(spec)), spec


def types_read_by(index: GraphIndex, operator: str) -> dict[str, set[int]]:
    """Types of what goes into the nodes of one kind, by module."""
    return {
        module_of(node): {index.type_of(name) for name in node.input if name}
        for node in index.model.graph.node
        if node.op_type == operator
    }


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_blocks_compute_low_and_the_ranking_in_fp32(graph, precision):
    model, spec = graph
    before = model.SerializeToString()
    typed = to_typed_graph(model, spec, precision)
    assert model.SerializeToString() == before, "the fp32 graph was changed"
    index = GraphIndex(typed.model)
    products = types_read_by(index, "MatMul")
    low = {name for name, kinds in products.items() if kinds == {KIND[precision]}}
    fp32 = {name for name, kinds in products.items() if kinds == {TensorProto.FLOAT}}
    assert low | fp32 == set(products), "a product of two types"
    assert {name.split(".")[0] for name in low} >= {"blocks", "mask_head", "query_update"}
    assert not any(name.startswith(("map_selector", "selectors")) for name in low)
    if spec.selection == "budget":
        assert {name.split(".")[0] for name in fp32} == {"map_selector", "selectors"}
        assert types_read_by(index, "TopK").popitem()[1] == {TensorProto.FLOAT, TensorProto.INT64}
    assert all(KIND[precision] in kinds for kinds in types_read_by(index, "Gelu").values() if len(kinds) == 1) or fp32
    assert typed.low > 10 and str(typed.low) in str(typed)


def test_sums_that_tell_whether_the_state_is_finite_stay_fp32(graph):
    """The sum over all tokens of a picture of 960 x 544 is beyond 65504."""
    index = GraphIndex(to_typed_graph(*graph, "fp16").model)
    waiting, sums = ["state_ok"], 0
    while waiting:
        node = index.producers.get(waiting.pop())
        if node is not None and node.op_type == "ReduceSum":
            sums += 1
        elif node is not None:
            kinds = {name: index.type_of(name) for name in node.input if name}
            assert TensorProto.FLOAT16 not in kinds.values(), node.name
            waiting += [name for name, kind in kinds.items() if kind in (TensorProto.FLOAT, TensorProto.BOOL)]
    assert sums >= 1


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_inputs_outputs_and_state_stay_as_the_manifest_says(graph, precision):
    model, spec = graph
    typed = to_typed_graph(model, spec, precision).model
    for name in ("input", "output"):
        want, got = getattr(model.graph, name), getattr(typed.graph, name)
        assert [value.SerializeToString() for value in got] == [value.SerializeToString() for value in want]


def test_layer_norm_accumulates_in_fp32(graph):
    model, spec = graph
    typed = to_typed_graph(model, spec, "fp16").model
    stash = [
        attribute.i
        for node in typed.graph.node
        for attribute in node.attribute
        if node.op_type == "LayerNormalization" and attribute.name == "stash_type"
    ]
    assert set(stash) <= {1}  # 1, the default, is fp32


def small_graph(*nodes, constants=(), x=("batch", 4), y=None):
    """A graph x -> y in fp32."""
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "g", [value("x", TensorProto.FLOAT, x)], [value("y", TensorProto.FLOAT, y or x)], constants
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def run(model, x):
    import onnxruntime as ort

    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_rounded_graph_rounds_after_every_operator(precision):
    """Against the same steps in numpy: square, then subtract, each rounded."""
    nodes = helper.make_node("Mul", ["x", "x"], ["square"]), helper.make_node("Sub", ["square", "x"], ["y"])
    typed = to_typed_graph(small_graph(*nodes), NO_STATE, precision)
    assert (typed.low, typed.casts) == (2, 2)
    x = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    a = x.astype(NUMPY[precision]).astype(np.float32)
    square = (a * a).astype(NUMPY[precision]).astype(np.float32)
    want = (square - a).astype(NUMPY[precision]).astype(np.float32)
    np.testing.assert_array_equal(run(rounded_graph(typed.model), x), want)
    assert np.abs(want - (x * x - x)).max() > 1e-4, "nothing was rounded"


def test_every_result_of_a_node_is_rounded():
    """A Split has several; each is rounded, and the node is there once."""
    nodes = (
        helper.make_node("Mul", ["x", "x"], ["square"]),
        helper.make_node("Split", ["square"], ["left", "right"], axis=1, num_outputs=2),
        helper.make_node("Sub", ["left", "right"], ["y"]),
    )
    model = small_graph(*nodes, y=("batch", 2))
    rounded = rounded_graph(to_typed_graph(model, NO_STATE, "fp16").model)
    assert sum(node.op_type == "Split" for node in rounded.graph.node) == 1
    x = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    half = x.astype(np.float16)
    square = (half.astype(np.float32) ** 2).astype(np.float16).astype(np.float32)
    want = (square[:, :2] - square[:, 2:]).astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(run(rounded, x), want)


def test_constant_beyond_the_range_of_fp16_keeps_its_node_fp32():
    far = numpy_helper.from_array(np.array(1e6, np.float32), "far")
    nodes = helper.make_node("Mul", ["x", "far"], ["large"]), helper.make_node("Div", ["large", "far"], ["y"])
    model = small_graph(*nodes, constants=[far])
    assert to_typed_graph(model, NO_STATE, "fp16").fp32 == {"out of range": 2}
    assert to_typed_graph(model, NO_STATE, "bf16").fp32 == {}
    x = np.ones((1, 4), np.float32)
    np.testing.assert_array_equal(run(rounded_graph(to_typed_graph(model, NO_STATE, "fp16").model), x), x)


def test_places_where_a_map_is_sampled_stay_fp32():
    """From the LayerNormalization on: bf16 would move them by an eighth of a cell."""
    scale = numpy_helper.from_array(np.ones(4, np.float32), "scale")
    weight = numpy_helper.from_array(np.eye(4, dtype=np.float32), "weight")
    shape = numpy_helper.from_array(np.array([1, 1, 2, 2]), "shape")
    nodes = (
        helper.make_node("Mul", ["x", "x"], ["features"]),
        helper.make_node("LayerNormalization", ["features", "scale"], ["normed"]),
        helper.make_node("MatMul", ["normed", "weight"], ["offsets"]),
        helper.make_node("Reshape", ["offsets", "shape"], ["places"]),
        helper.make_node("Reshape", ["features", "shape"], ["map"]),
        helper.make_node("GridSample", ["map", "places"], ["sampled"]),
        helper.make_node("Reshape", ["sampled", "two"], ["y"]),
    )
    two = numpy_helper.from_array(np.array([1, -1]), "two")
    model = small_graph(*nodes, constants=[scale, weight, shape, two], x=(1, 4), y=(1, 2))
    typed = GraphIndex(to_typed_graph(model, NO_STATE, "bf16").model)
    kinds = {node.op_type: {typed.type_of(name) for name in node.input} for node in typed.model.graph.node}
    assert kinds["Mul"] == {TensorProto.BFLOAT16}
    assert kinds["LayerNormalization"] == kinds["MatMul"] == kinds["GridSample"] == {TensorProto.FLOAT}


def test_keep_names_operators_and_modules(micro_bundle):
    bundle = load_bundle(micro_bundle)
    model, spec = onnx.load(bundle.path(bundle.manifest.graph)), bundle.manifest.graph
    keep = KeepFp32(operators=frozenset({"Softmax"}), modules=("mask_head",))
    index = GraphIndex(to_typed_graph(model, spec, "fp16", keep).model)
    assert set().union(*types_read_by(index, "Softmax").values()) == {TensorProto.FLOAT}
    kinds = {name: kind for name, kind in types_read_by(index, "MatMul").items() if name.startswith("mask_head")}
    assert set().union(*kinds.values()) == {TensorProto.FLOAT}
    everything_low = GraphIndex(to_typed_graph(model, spec, "fp16", KeepFp32(ranking=False)).model)
    kinds = types_read_by(everything_low, "MatMul")
    assert kinds["selectors.0.mlp.fc1"] == {TensorProto.FLOAT16}


@pytest.mark.parametrize(("precision", "limit"), [("fp16", 0.02), ("bf16", 0.1)])
def test_graph_stays_close_to_torch(micro_bundle, precision, limit):
    bundle = load_bundle(micro_bundle)
    spec = bundle.manifest.graph
    model = onnx.load(bundle.path(spec))
    samples = reference_samples(bundle)
    assert deviation(model, samples).error < 1e-5
    found = deviation(rounded_graph(to_typed_graph(model, spec, precision).model), samples)
    assert 1e-5 < found.error < limit and found.smallest_overlap > 0.95, str(found)


def test_invalid_graph_is_refused():
    model = small_graph(helper.make_node("Add", ["x", "nothing"], ["y"]))
    with pytest.raises(onnx.checker.ValidationError):
        to_typed_graph(model, NO_STATE, "fp16")
    model = small_graph(helper.make_node("Reshape", ["x", "x"], ["y"]))  # a shape in floats
    with pytest.raises(onnx.shape_inference.InferenceError):
        check_graph(model)


@needs_rtx
@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("capability", ["sm86", "sm89", "sm120"])
def test_tensorrt_rtx_builds_it(micro_bundle, tmp_path, precision, capability):
    bundle = load_bundle(shutil.copytree(micro_bundle, tmp_path / "fp32"))
    (tmp_path / "low").mkdir()
    write_lowered(bundle, tmp_path / "low", Lowering(precision))
    lowered = load_bundle(tmp_path / "low")
    assert (lowered.manifest.precision, lowered.manifest.rest_precision) == (precision, precision)
    request = EngineRequest({"usual": bundle.manifest.presets["0.55"]}, compute_capabilities=[capability])
    low, fp32 = (build_engines(one, "tensorrt-rtx", request)[0].record for one in (lowered, bundle))
    assert low.plan_bytes < fp32.plan_bytes
    assert KIND_NAME[precision] in low.asked and set(fp32.asked) == {"FLOAT"}
