"""check_parity: it agrees with the graph that was exported, and says where a slightly different model parts from it."""

from __future__ import annotations

import copy

import pytest
import torch

from export.check import check_parity
from runtime.backend import load_engine
from runtime.bundle import load_bundle
from runtime.errors import ExportMismatchError

torch.set_num_threads(1)

BUDGET = (42, 32, 26, 20)


@pytest.fixture(scope="module")
def engine(micro_bundle):
    return load_engine(load_bundle(micro_bundle), threads=1)


@pytest.fixture
def other(micro_model):
    """``other(name, change)``: a copy of the model with one weight changed."""

    def make(name: str, change):
        model = copy.deepcopy(micro_model)
        with torch.no_grad():
            change(model.get_parameter(name))
        return model

    return make


@pytest.mark.parametrize("budget", [BUDGET, (1, 1, 1, 1), (60, 60, 60, 60)], ids=str)
def test_the_exported_model_agrees(engine, micro_model, drifting_frames, budget):
    parity = check_parity(micro_model, engine, drifting_frames(4), budget)
    assert len(parity.frames) == 4
    compared = {"class_logits", "mask_logits", "state_ok"}
    compared |= {f"next_prior.{name}" for name in ("keys", "keep_logits", "kept", "queries")}
    assert all(frame.differences.keys() == compared for frame in parity.frames)
    assert parity.worst < 1e-4


def test_the_dense_graph_agrees(micro_bundle, micro_model, drifting_frames):
    bundle = load_bundle(micro_bundle)
    dense = load_engine(bundle, bundle.manifest.baseline, threads=1)
    parity = check_parity(micro_model, dense, drifting_frames(2), (60,) * 4)
    assert [frame.differences.keys() >= {"class_logits", "next_prior.queries"} for frame in parity.frames] == [True] * 2


@pytest.mark.parametrize(
    ("weight", "tensor"),
    [
        ("mask_head.classify.bias", "class_logits"),
        ("mask_head.kernels.fc2.bias", "mask_logits"),
        ("query_update.1.bias", r"next_prior\.queries"),
        ("map_selector.predictor.mlp.fc2.weight", r"next_prior\.keep_logits"),
        ("pos_embed", r"(class_logits|next_prior\.keys)"),
    ],
)
def test_a_slightly_different_weight_is_named_by_what_it_changes(engine, other, drifting_frames, weight, tensor):
    """0.1 % of the weight's usual size, ten times the tolerance or more in what comes out."""
    model = other(weight, lambda value: value.add_(0.01))
    with pytest.raises(ExportMismatchError, match=rf"frame 0, budget \(60, 32, 26, 20\): {tensor} differs by"):
        check_parity(model, engine, drifting_frames(2), BUDGET)


def test_another_choice_of_tokens_is_named_before_any_value(engine, other, drifting_frames):
    model = other("selectors.1.mlp.fc2.weight", lambda value: value.neg_())
    with pytest.raises(ExportMismatchError, match=r"frame 0.*tokens are chosen differently at stage 2"):
        check_parity(model, engine, drifting_frames(2), BUDGET)


def test_a_difference_that_only_a_prior_shows_is_found_on_the_second_frame(engine, micro_model, drifting_frames):
    """A model that forgets its prior keys agrees on the first frame, which has no prior."""
    from models import selection

    frames = drifting_frames(3)
    assert len(check_parity(micro_model, engine, frames[:1], BUDGET).frames) == 1
    original = selection.association_logits
    selection.association_logits = lambda tokens, keys, bias: original(tokens, -keys, bias)
    try:
        assert len(check_parity(micro_model, engine, frames[:1], BUDGET).frames) == 1
        with pytest.raises(ExportMismatchError, match=r"frame 1, budget \(42, 32, 26, 20\): .*stage 0"):
            check_parity(micro_model, engine, frames, BUDGET)
    finally:
        selection.association_logits = original


def test_not_a_number_is_a_difference(engine, other, drifting_frames):
    model = other("mask_head.classify.bias", lambda value: value.fill_(float("nan")))
    with pytest.raises(ExportMismatchError, match="class_logits differs by inf"):
        check_parity(model, engine, drifting_frames(1), BUDGET)


def test_tolerance_is_the_limit(engine, other, drifting_frames):
    model = other("mask_head.classify.bias", lambda value: value.add_(1e-3))
    worst = check_parity(model, engine, drifting_frames(1), BUDGET, tolerance=1.0).worst
    assert 1e-4 < worst < 1e-1
    check_parity(model, engine, drifting_frames(1), BUDGET, tolerance=worst * 1.1)
    with pytest.raises(ExportMismatchError):
        check_parity(model, engine, drifting_frames(1), BUDGET, tolerance=worst * 0.9)
