"""The published network in OpenVINO, where one operator of ours computes each deformable attention."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from runtime.backend import load_engine
from runtime.bundle import load_bundle
from runtime.errors import StepError
from runtime.openvino_core import computes_in_bf16, openvino_core
from runtime.parity import relative_difference
from runtime.reference import compare_engine, verify_engine

ov = pytest.importorskip("openvino")
ops = pytest.importorskip("openvino.opset13")
pytest.importorskip("numba")
deformable = pytest.importorskip("runtime.openvino_deformable")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def published(published_bundle):
    return load_bundle(published_bundle)


def kinds(model) -> list[str]:
    return [node.get_type_name() for node in model.get_ops()]


def attentions(graph_file) -> int:
    """How many modules of the network sample a map."""
    names = [node.get_friendly_name() for node in openvino_core().read_model(graph_file).get_ops()]
    return len({name.split("/")[0] for name in names if "GridSample" in name})


@pytest.mark.parametrize("which", ["graph", "baseline"])
def test_every_deformable_attention_is_one_operator(published, which):
    path = str(published.path(getattr(published.manifest, which)))
    model = openvino_core().read_model(path)
    joined = deformable.join_deformable_attention(model, threads=1, failures=[])
    assert joined == attentions(path) > 10
    model.validate_nodes_and_infer_types()
    assert kinds(model).count(deformable.NAME) == joined and "GridSample" not in kinds(model)
    names = [node.get_friendly_name() for node in model.get_ops() if node.get_type_name() == deformable.NAME]
    assert all(".attn/" in name for name in names), "parts of a profile go by names"


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("batch", [1, 2])
def test_answers_are_those_of_gridsample(published, agrees_with_gridsample, batch, threads):
    agrees_with_gridsample(published, load_engine(published, backend="openvino", threads=threads), batch)


def test_verify_passes(published):
    verify_engine(published, load_engine(published, backend="openvino", threads=1))


@pytest.mark.skipif(not computes_in_bf16(), reason="this CPU has no bf16")
def test_in_bf16_it_is_as_near_to_torch_as_gridsample(published, monkeypatch):
    """Places that were rounded would show: bf16 has 8 bits."""
    ratios = {}
    for joins in (True, False):
        monkeypatch.setattr(deformable, "has_numba", lambda joins=joins: joins)
        engine = load_engine(published, backend="openvino", threads=1, precision="bf16")
        ratios[joins] = compare_engine(published, engine).sqnr_db
    for name in ("class_logits", "mask_logits", "queries"):
        assert ratios[True][name] > ratios[False][name] - 3, name


def test_without_numba_gridsample_stays_and_that_is_said(published, monkeypatch, caplog):
    monkeypatch.setattr(deformable, "has_numba", lambda: False)
    deformable._say_that_numba_is_missing.cache_clear()
    model = openvino_core().read_model(str(published.path(published.manifest.graph)))
    before = kinds(model)
    with caplog.at_level(logging.WARNING):
        assert deformable.join_deformable_attention(model, threads=1, failures=[]) == 0
    assert kinds(model) == before
    verify_engine(published, load_engine(published, backend="openvino", threads=1))
    assert caplog.text.count("pip install '.[openvino]'") == 1


def test_other_sampling_stays():
    picture, grid = ops.parameter([1, 4, 5, 6], np.float32), ops.parameter([1, 3, 2, 2], np.float32)
    plain = {"mode": "bilinear", "padding_mode": "zeros", "align_corners": False}
    read = ops.transpose(ops.grid_sample(picture, grid, plain), ops.constant(np.array([0, 2, 3, 1])))
    model = ov.Model([read], [picture, grid], "sampling")
    assert deformable.join_deformable_attention(model, threads=1, failures=[]) == 0
    assert "GridSample" in kinds(model)


@pytest.mark.parametrize(
    ("attribute", "value"), [("align_corners", True), ("padding_mode", "border"), ("mode", "nearest")]
)
def test_deformable_attention_that_samples_in_another_way_stays(published, attribute, value):
    model = openvino_core().read_model(str(published.path(published.manifest.graph)))
    for node in [node for node in model.get_ops() if node.get_type_name() == "GridSample"]:
        changed = ops.grid_sample(node.input_value(0), node.input_value(1), node.get_attributes() | {attribute: value})
        node.output(0).replace(changed.output(0))
    assert deformable.join_deformable_attention(model, threads=1, failures=[]) == 0


def test_failed_operator_is_a_failed_step_and_the_next_one_runs(published, monkeypatch):
    """OpenVINO itself would give the results of the step before."""
    buffers = load_engine(published, backend="openvino", threads=1).open_stream()
    budget = published.manifest.budget_rule.at_reset(published.manifest.presets["0.55"])
    with monkeypatch.context() as patch:
        patch.setattr(deformable, "deformable_attention", lambda *arguments: 1 / 0)
        with pytest.raises(StepError, match="division by zero"):
            buffers.run(budget)
    assert buffers.run(budget)["state_ok"].all()


def test_maps_are_told_apart_where_a_graph_converts_them(published, drifting_frames):
    """Graphs in fp16, bf16 and INT8 bring the maps to fp32 just before they are sampled."""
    path, budget = str(published.path(published.manifest.graph)), published.manifest.presets["1.00"]
    answers = []
    for join in (False, True):
        model = openvino_core().read_model(path)
        samplings = [node for node in model.get_ops() if node.get_type_name() == "GridSample"]
        for node in samplings:
            half = ops.convert(node.input_value(0), "bf16")
            node.input(0).replace_source_output(ops.convert(half, "f32").output(0))
        model.validate_nodes_and_infer_types()
        if join:
            assert deformable.join_deformable_attention(model, threads=1, failures=[]) == attentions(path)
        model.reshape({spec.name: list(spec.shape_for(1)) for spec in published.manifest.graph.inputs})
        request = (
            openvino_core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}).create_infer_request()
        )
        buffers = load_engine(published, threads=1).open_stream()
        feeds = {"image": drifting_frames(1, published.manifest.image_size)[0][None]}
        feeds |= {"token_budget": np.array(budget, np.int64), **buffers.state()}
        outputs = request.infer({spec.name: feeds[spec.name] for spec in published.manifest.graph.inputs})
        answers.append({name: outputs[name] for name in ("class_logits", "mask_logits", "queries")})
    for name, wanted in answers[0].items():
        assert relative_difference(answers[1][name], wanted) < 0.02, name  # only the maps themselves are rounded
