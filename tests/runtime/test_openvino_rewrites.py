"""What is changed before OpenVINO compiles: operators that stay fp32 in bf16."""

from __future__ import annotations

import pytest

from runtime.openvino_core import computes_in_bf16, openvino_core
from runtime.openvino_rewrites import keep_fp32

pytest.importorskip("openvino")

has_bf16 = pytest.mark.skipif(not computes_in_bf16(), reason="this CPU has no bf16")


def precision_of_map_sm(bundle, *, keep: bool) -> str:
    """What Map-SM's product runs in where bf16 is asked for; others have to run in bf16."""
    core = openvino_core()
    model = core.read_model(str(bundle.path(bundle.manifest.graph)))
    if keep:
        assert keep_fp32(core, model) > 10
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
