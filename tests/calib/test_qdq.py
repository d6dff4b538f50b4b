"""Q/DQ in the graph: which layers, symmetric, the codes right, and that runtimes take it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from calib.graph_index import GraphIndex, module_of
from calib.linear_layers import linear_layers
from calib.qdq import insert_qdq
from export.engine import build_engines
from export.engine_request import EngineRequest
from export.lowered_bundle import Lowering, write_lowered
from export.typed_graph import to_typed_graph
from runtime.backend import load_engine
from runtime.bundle import load_bundle
from runtime.errors import BackendUnavailableError, CalibrationError
from runtime.manifest import GraphSpec

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="needs tensorrt-rtx: pip install '.[tensorrt-rtx]'"
)
NO_STATE = GraphSpec(file="x.onnx", selection="none", inputs=(), outputs=(), state=())


def ranges_of(model: onnx.ModelProto, spec: GraphSpec) -> dict[str, float]:
    return {layer.name: 4.0 for layer in linear_layers(GraphIndex(model), spec)}


def linear_graph(weight: np.ndarray, opset: int = 20) -> onnx.ModelProto:
    value = helper.make_tensor_value_info
    shapes = ["batch", weight.shape[0]], ["batch", weight.shape[1]]
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], "linear")],
        "g",
        [value("x", TensorProto.FLOAT, shapes[0])],
        [value("y", TensorProto.FLOAT, shapes[1])],
        [numpy_helper.from_array(weight, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def run(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def codes(values: np.ndarray, largest: float | np.ndarray, precision: str) -> np.ndarray:
    """What the codes of the values stand for, with one scale or one for each column."""
    if precision == "int8":
        scale = np.asarray(largest / 127, np.float32)
        return np.clip(np.rint(values / scale), -128, 127).astype(np.float32) * scale
    scale = np.asarray(largest / 448, np.float32)
    return np.clip(values / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_a_layer_gives_the_product_of_its_codes(precision):
    rng = np.random.default_rng(0)
    weight = (rng.normal(size=(16, 5)) * [0.01, 1, 10, 0.3, 0]).astype(np.float32)  # the last column is all zeros
    x = rng.normal(size=(7, 16)).astype(np.float32) * 2
    quantized = insert_qdq(linear_graph(weight), NO_STATE, {"linear": 3.0}, precision)
    assert (quantized.layers, quantized.left) == (("linear",), ())
    columns = np.abs(weight).max(axis=0)
    want = codes(x, 3.0, precision) @ codes(weight, np.where(columns > 0, columns, 1.0), precision)
    got = run(quantized.model, x)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    assert np.abs(got - x @ weight).max() > 1e-3 and np.abs(x).max() > 3.0, "nothing was rounded or cut off"


def test_weights_are_stored_in_codes_and_every_zero_point_is_zero(fp32, fp32_graph):
    spec = fp32.manifest.graph
    model = insert_qdq(fp32_graph, spec, ranges_of(fp32_graph, spec), "int8").model
    index = GraphIndex(model)
    pairs = [node for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert pairs
    for node in pairs:
        zero = numpy_helper.to_array(index.initializers[node.input[2]])
        assert zero.dtype == np.int8 and not zero.any()
        scale = numpy_helper.to_array(index.initializers[node.input[1]])
        stored = node.input[0] in index.initializers
        assert (scale.ndim == 1) == stored, "weights have a scale for each output, activations have one"
        assert not stored or index.initializers[node.input[0]].data_type == TensorProto.INT8
    assert len(model.SerializeToString()) < 0.6 * len(fp32_graph.SerializeToString())


def test_what_ranks_tokens_is_never_quantized(fp32, fp32_graph):
    spec = fp32.manifest.graph
    names = set(ranges_of(fp32_graph, spec))
    assert {name.split(".")[0] for name in names} == {"blocks", "mask_head", "query_update"}
    model = insert_qdq(fp32_graph, spec, ranges_of(fp32_graph, spec), "int8").model
    index = GraphIndex(model)
    for node in model.graph.node:
        if node.op_type == "MatMul" and module_of(node).startswith(("selectors", "map_selector")):
            makers = {index.producers[name].op_type for name in node.input if name in index.producers}
            assert "DequantizeLinear" not in makers


def test_layers_without_a_range_are_left(fp32, fp32_graph):
    spec = fp32.manifest.graph
    quantized = insert_qdq(fp32_graph, spec, {"blocks.0.mlp.fc1": 2.0}, "int8")
    assert quantized.layers == ("blocks.0.mlp.fc1",) and len(quantized.left) > 10
    assert sum(node.op_type == "QuantizeLinear" for node in quantized.model.graph.node) == 1


def test_scales_take_the_type_of_the_rest(fp32, fp32_graph):
    spec = fp32.manifest.graph
    typed = to_typed_graph(fp32_graph, spec, "fp16").model
    model = insert_qdq(typed, spec, ranges_of(fp32_graph, spec), "fp8").model
    index = GraphIndex(model)
    kinds = {
        (index.type_of(node.input[0]), index.type_of(node.input[1]))
        for node in model.graph.node
        if node.op_type == "QuantizeLinear"
    }
    assert kinds == {(TensorProto.FLOAT16, TensorProto.FLOAT16)}


def test_a_quantized_graph_and_an_old_operator_set_are_refused():
    weight = np.ones((4, 4), np.float32)
    once = insert_qdq(linear_graph(weight), NO_STATE, {"linear": 1.0}, "int8").model
    with pytest.raises(CalibrationError, match="quantized already"):
        insert_qdq(once, NO_STATE, {"linear": 1.0}, "int8")
    with pytest.raises(CalibrationError, match=r"operator set 18; .* 19 or later(.|\n)*--opset 20"):
        insert_qdq(linear_graph(weight, opset=18), NO_STATE, {"linear": 1.0}, "int8")


# Runtimes


@pytest.fixture(scope="module")
def lowered(fp32, fp32_graph, tmp_path_factory):
    """``lowered(precision, rest)``: the micro bundle in it."""
    made: dict[tuple[str, str], Path] = {}

    def make(precision: str, rest: str):
        if (precision, rest) not in made:
            folder = made[precision, rest] = tmp_path_factory.mktemp(f"{precision}-{rest}")
            ranges = ranges_of(fp32_graph, fp32.manifest.graph)
            write_lowered(fp32, folder, Lowering(rest, None if precision == rest else precision, ranges))
        return load_bundle(made[precision, rest])

    return make


def step(bundle, backend: str) -> dict[str, np.ndarray]:
    buffers = load_engine(bundle, backend=backend, threads=1).open_stream()
    buffers.image[:] = np.random.default_rng(0).integers(0, 256, buffers.image.shape, np.uint8)
    return {name: np.array(value) for name, value in buffers.run((60, 32, 26, 20)).items()}


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize(
    ("precision", "rest"),
    [
        ("fp16", "fp16"),
        ("bf16", "bf16"),
        ("int8", "fp32"),
        ("int8", "fp16"),
        ("int8", "bf16"),
        ("fp8", "fp32"),
        ("fp8", "fp16"),
    ],
)
def test_backends_run_it(fp32, lowered, precision, rest, backend):
    if backend == "openvino":
        pytest.importorskip("openvino")
    bundle = lowered(precision, rest)
    if (backend, rest) == ("onnxruntime", "bf16"):
        with pytest.raises(BackendUnavailableError, match=r"bf16(.|\n)*openvino"):
            step(bundle, backend)
        return
    want, got = step(fp32, "onnxruntime"), step(bundle, backend)
    difference = np.linalg.norm(got["mask_logits"] - want["mask_logits"]) / np.linalg.norm(want["mask_logits"])
    assert 0 < difference < 0.25 and bool(got["state_ok"][0])


@needs_rtx
@pytest.mark.slow
@pytest.mark.parametrize("capability", ["sm86", "sm89", "sm120"])
@pytest.mark.parametrize(("precision", "rest"), [("int8", "fp32"), ("int8", "fp16"), ("int8", "bf16"), ("fp8", "fp16")])
def test_tensorrt_rtx_builds_it_where_the_gpu_has_it(lowered, precision, rest, capability):
    bundle = lowered(precision, rest)
    request = EngineRequest({"usual": bundle.manifest.presets["0.55"]}, compute_capabilities=[capability])
    if (precision, capability) == ("fp8", "sm86"):
        with pytest.raises(BackendUnavailableError, match=r"sm86 \(Ampere\) has no fp8"):
            build_engines(bundle, "tensorrt-rtx", request)
        return
    graph, baseline = build_engines(bundle, "tensorrt-rtx", request)
    for engine in (graph, baseline):
        assert engine.record.precision == precision
        assert engine.record.asked[{"int8": "INT8", "fp8": "FP8"}[precision]] > 10


@needs_rtx
@pytest.mark.parametrize(
    ("precision", "rest", "code", "other"),
    [("int8", "fp16", "INT8", "HALF"), ("int8", "fp32", "INT8", "FLOAT"), ("fp8", "fp16", "FP8", "HALF")],
)
def test_tensorrt_rtx_reads_the_precision_of_each_layer(lowered, precision, rest, code, other):
    """In the parsed network, which is strongly typed: what a layer gives is what it is computed in."""
    import tensorrt_rtx as trt

    bundle = lowered(precision, rest)
    log = trt.Logger(trt.Logger.INTERNAL_ERROR)
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    assert parser.parse_from_file(str(bundle.path(bundle.manifest.graph)))
    layers = [network.get_layer(place) for place in range(network.num_layers)]
    quantizing = [layer for layer in layers if layer.type == trt.LayerType.QUANTIZE]
    assert quantizing and {layer.get_output(0).dtype.name for layer in quantizing} == {code}
    dequantizing = [layer for layer in layers if layer.type == trt.LayerType.DEQUANTIZE]
    assert {layer.get_output(0).dtype.name for layer in dequantizing} == {other}
    products = [layer for layer in layers if layer.type == trt.LayerType.MATRIX_MULTIPLY]
    kinds = {layer.get_output(0).dtype.name for layer in products}
    assert kinds == {other, "FLOAT"}, "linear layers in the rest's precision, the ranking in fp32"
    top_k = [layer for layer in layers if layer.type == trt.LayerType.TOPK]
    assert top_k and {layer.get_input(0).dtype.name for layer in top_k} == {"FLOAT"}
