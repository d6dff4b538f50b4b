"""What is changed before OpenVINO compiles: operators that stay fp32 in bf16, and how keys move."""

from __future__ import annotations

import numpy as np
import pytest

from runtime.openvino_core import computes_in_bf16, openvino_core
from runtime.openvino_rewrites import BUDGET, keep_fp32, move_keys_as_rows

pytest.importorskip("openvino")

has_bf16 = pytest.mark.skipif(not computes_in_bf16(), reason="this CPU has no bf16")


def precisions(bundle, *, keep: bool) -> dict[str, set[str]]:
    """What runs in what where bf16 is asked for: Map-SM, from its keys to the places found, and all products."""
    core = openvino_core()
    model = core.read_model(str(bundle.path(bundle.manifest.graph)))
    if keep:
        assert keep_fp32(core, model) > 10
    model.reshape({spec.name: list(spec.shape_for(1)) for spec in bundle.manifest.graph.inputs})
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "bf16"})
    found: dict[str, set[str]] = {"products": set()}
    for node in compiled.get_runtime_model().get_ops():
        info = {name: value.astype(str) for name, value in node.get_rt_info().items()}
        kind, precision = info["layerType"], info["runtimePrecision"]
        if kind in ("MatMul", "FullyConnected"):
            found["products"].add(precision)
        if "map_selector/" in info["originalLayersNames"] and "predictor" not in info["originalLayersNames"]:
            found.setdefault(kind, set()).add(precision)
    return found


@has_bf16
def test_in_bf16_map_sm_stays_fp32_and_the_masks_do_not(micro):
    rounded, kept = precisions(micro, keep=False), precisions(micro, keep=True)
    assert "bf16" in rounded["products"] and "bf16" in kept["products"]
    assert "bf16" in rounded["MatMul"]
    for kind in ("MatMul", "Reduce", "TopK", "GatherElements"):
        assert kept[kind] - {"i32"} == {"f32"}, kind


def test_keys_that_move_as_rows_give_the_same(micro):
    core, graph = openvino_core(), micro.manifest.graph
    inputs = {spec.name: np.zeros(spec.shape_for(1), spec.dtype) for spec in graph.inputs}
    inputs["image"][:] = np.random.default_rng(0).integers(0, 256, inputs["image"].shape)
    inputs[BUDGET][:] = micro.manifest.budget_rule.patch_count
    answers = []
    for rewrite in (False, True):
        model = core.read_model(str(micro.path(graph)))
        if rewrite:
            assert move_keys_as_rows(model) == micro.manifest.depth
            assert move_keys_as_rows(model) == 0, "nothing is left to do"
        model.reshape({name: list(value.shape) for name, value in inputs.items()})
        answers.append(core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(inputs))
    for name in ("class_logits", "mask_logits", "next_prior.keep_logits"):
        np.testing.assert_allclose(answers[1][name], answers[0][name], rtol=1e-4, atol=1e-4)
