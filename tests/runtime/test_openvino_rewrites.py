"""What is rewritten before OpenVINO compiles: the arg max without a sort, and operators that stay fp32 in bf16."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from runtime.openvino_core import computes_in_bf16, openvino_core
from runtime.openvino_rewrites import keep_fp32, replace_arg_max

ov = pytest.importorskip("openvino")
ops = pytest.importorskip("openvino.opset13")

has_bf16 = pytest.mark.skipif(not computes_in_bf16(), reason="this CPU has no bf16")


def arg_max_model(columns: int, *, mode: str = "max", axis: int = -1, count: int = 1, values: bool = False):
    x = ops.parameter([3, columns], np.float32, name="x")
    best = ops.topk(x, ops.constant(np.int64(count)), axis, mode, "value", index_element_type="i64")
    wanted = [best.output(1), best.output(0)] if values else [best.output(1)]
    return ov.Model([ops.result(output) for output in wanted], [x], "arg max")


def sorts(model) -> int:
    return sum(node.get_type_name() == "TopK" for node in model.get_ops())


REWRITTEN = arg_max_model(7)
MAXIMA = replace_arg_max(REWRITTEN)
COMPILED = openvino_core().compile_model(REWRITTEN, "CPU")


@settings(deadline=None)
@given(arrays.arrays(np.float32, (3, 7), elements=st.integers(-2, 2) | st.just(float("-inf"))))
def test_first_place_of_the_largest_value_is_found(x):
    """Few different values, so that nearly every row has a tie."""
    x[:, 3] = np.maximum(x[:, 3], -2)  # something is above -inf
    assert len(MAXIMA) == 1 and sorts(REWRITTEN) == 0
    (found,) = COMPILED(x).values()
    assert found.dtype == np.int64 and found.shape == (3, 1)
    np.testing.assert_array_equal(found[:, 0], x.argmax(1))


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_row_without_a_largest_number_gives_a_place_inside(value):
    (found,) = COMPILED(np.full((3, 7), value, np.float32)).values()
    assert found.tolist() == [[6], [6], [6]]


@pytest.mark.parametrize("other", [{"mode": "min"}, {"axis": 0}, {"count": 2}, {"values": True}], ids=str)
def test_what_is_no_arg_max_stays(other):
    model = arg_max_model(7, **other)
    assert replace_arg_max(model) == [] and sorts(model) == 1


def precision_of_map_sm(bundle, *, keep: bool) -> str:
    """What Map-SM's product runs in where bf16 is asked for; others have to run in bf16."""
    core = openvino_core()
    model = core.read_model(str(bundle.path(bundle.manifest.graph)))
    maxima = replace_arg_max(model)
    assert len(maxima) == 1
    if keep:
        assert keep_fp32(core, model, maxima) > 10
    model.reshape({spec.name: list(spec.shape_for(1)) for spec in bundle.manifest.graph.inputs})
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "bf16"})
    products = {}
    for node in compiled.get_runtime_model().get_ops():
        info = node.get_rt_info()
        if info["layerType"].astype(str) in ("MatMul", "FullyConnected"):
            products[str(node.get_output_partial_shape(0))] = info["runtimePrecision"].astype(str)
    assert "bf16" in products.values()
    patches = bundle.manifest.patch_count
    return products[f"[1,{patches},{patches}]"]


@has_bf16
def test_in_bf16_map_sm_stays_fp32_and_the_masks_do_not(micro):
    assert precision_of_map_sm(micro, keep=False) == "bf16"
    assert precision_of_map_sm(micro, keep=True) == "f32"
