"""Every selector with stale and re-used features: budgets, what is remembered, and the form that trains."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from models.configs import CONFIGS, SELECTOR_STATE
from models.pruned_host import Selection
from models.selectors import NOTHING, GlobalPredictor, Refresh, mask_focus, next_draw
from models.training.sparse_step import masked_step
from models.vpp_eo import VppEo
from runtime.budget import token_budget

torch.set_num_threads(1)  # 60 tokens: more threads only wait for each other
PATCHES = 60
TOLERANCE = {"rtol": 1e-3, "atol": 3e-4}  # straight-through sums leave 1e-7 of every masked value
KINDS = [
    (name, pruned, refresh)
    for name in SELECTOR_STATE
    for pruned, refresh in (("stale", 0), ("reuse", 0), ("background", 40))
] + [("vpp", "adapted", 20)]
every_kind = pytest.mark.parametrize(("name", "pruned", "refresh"), KINDS)


def network(name: str, pruned: str = "stale", refresh: int = 0, seed: int = 0) -> VppEo:
    """A micro network with every weight at random, so that scores are well apart."""
    config = replace(CONFIGS["vpp-eo-micro"], selector=name, pruned=pruned, refresh=refresh)
    model = VppEo(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parameter_name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.copy_(noise / parameter[0].numel() ** 0.5)
        else:
            parameter.copy_(float(parameter_name.endswith("weight")) + 0.1 * noise)
    return model


def clip(count: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    """Blocks of 8 pixels that move and change; uint8 [T, B, H, W, 3]."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (count, batch, 3, 12, 20), generator=generator).float()
    blocks = blocks[:1] + 0.3 * (blocks - blocks[:1])
    images = F.interpolate(blocks.flatten(0, 1), scale_factor=8).unflatten(0, (count, batch))
    return images.permute(0, 1, 3, 4, 2).to(torch.uint8)


def budgets(model: VppEo, ratio: float, t: int) -> tuple[int, ...]:
    rule = model.budget_rule
    return rule.at_reset(rule.for_ratio(ratio)) if t == 0 else rule.for_ratio(ratio)


def run(model: VppEo, images: torch.Tensor, ratio: float) -> list:
    state, results = model.initial_state(images.shape[1]), []
    for t, image in enumerate(images):
        outputs, state = model(image, state, torch.tensor(budgets(model, ratio, t)))
        results.append((outputs, state))
    return results


@every_kind
def test_state_holds_what_the_selector_needs_and_no_more(name, pruned, refresh):
    model = network(name, pruned, refresh)
    extra = {"stale": set(), "adapted": set(), "reuse": {"final"}, "background": {"final", "focus"}}[pruned]
    want = {*SELECTOR_STATE[name], "queries", *extra, *(["age"] if refresh else [])}
    assert set(model.initial_state(2).tensors()) == set(model.state_fields(Selection.BUDGET)) == want
    (_, state) = run(model, clip(1, 2), 0.55)[0]
    first = model.initial_state(2).tensors()
    assert {key: (value.shape, value.dtype) for key, value in state.tensors().items()} == {
        key: (value.shape, value.dtype) for key, value in first.items()
    }


@every_kind
@settings(max_examples=4, deadline=None)
@given(ratio=st.floats(0.02, 1.0), batch=st.integers(1, 2))
def test_every_budget_is_met_exactly(name, pruned, refresh, ratio, batch):
    model = network(name, pruned, refresh)
    for t, (outputs, _) in enumerate(run(model, clip(3, batch), ratio)):
        counts = budgets(model, ratio, t)
        assert outputs.tokens_kept.tolist() == [list(counts)] * batch
        assert outputs.state_ok.all()
        assert outputs.mask_logits.isfinite().all()


@every_kind
@pytest.mark.parametrize("ratio", [0.4, 1.0])
def test_form_that_trains_equals_the_deployed_one(name, pruned, refresh, ratio):
    """Four frames of two clips, each form with its own state."""
    model, images = network(name, pruned, refresh), clip(4, 2)
    trained = model.initial_state(2)
    for t, (outputs, state) in enumerate(run(model, images, ratio)):
        budget = torch.tensor([budgets(model, ratio, t)] * 2)
        trace, trained = masked_step(model, images[t], trained, budget, noise=False)
        torch.testing.assert_close(trace.predictions[-1][0], outputs.class_logits, **TOLERANCE)
        torch.testing.assert_close(trace.predictions[-1][1], outputs.mask_logits, **TOLERANCE)
        assert set(trained.tensors()) == set(state.tensors())
        for field, value in trained.tensors().items():
            if field != "keep_logits":  # those of dropped tokens are never read
                torch.testing.assert_close(value, state.tensors()[field], **TOLERANCE)


@pytest.mark.parametrize("name", SELECTOR_STATE)
def test_all_tokens_equal_the_dense_network(name):
    model, images = network(name, "background", 30), clip(3)
    dense = model.initial_state(1)
    for image, (outputs, _) in zip(images, run(model, images, 1.0), strict=True):
        want, dense = model(image, dense, None, Selection.NONE)
        torch.testing.assert_close(outputs.class_logits, want.class_logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(outputs.mask_logits, want.mask_logits, rtol=1e-4, atol=1e-4)


def test_dropped_tokens_take_the_final_features_of_the_frame_before():
    model = network("random", "reuse")
    (_, before), (outputs, after) = run(model, clip(2), 0.4)
    passed = outputs.kept_stages[0] == 4
    torch.testing.assert_close(after.final[0, ~passed], before.final[0, ~passed], rtol=0, atol=0)
    assert ((after.final - before.final)[0, passed].abs().amax(1) > 1e-4).all()


def test_where_an_object_was_the_old_value_stands_for_a_dropped_token():
    """Both kinds differ from ``stale`` and from ``reuse`` exactly where the frame before says so."""
    finals, state = {}, None
    images = clip(2)
    for pruned in ("stale", "reuse", "background"):
        model = network("difference", pruned)
        state = model.initial_state(1)
        _, state = model(images[0], state, torch.tensor((PATCHES,) * 4))
        if pruned != "stale":
            state = state._replace(focus=torch.tensor([[3.0, -3.0] * 30]) if pruned == "background" else None)
        outputs, after = model(images[1], state, torch.tensor(budgets(model, 0.4, 1)))
        dropped = outputs.kept_stages[0] < 4
        finals[pruned] = after.final[0] if pruned != "stale" else None
    old_object = torch.tensor([True, False] * 30)
    same = (finals["background"] == finals["reuse"]).all(1)
    assert same[dropped & ~old_object].all() and not same[dropped & old_object].any()
    assert (finals["background"][dropped & old_object] != state.final[0, dropped & old_object]).any(1).all()


def test_adapter_starts_as_the_identity_and_then_moves_dropped_tokens_alone():
    """Weights of a network trained with ``stale`` go on unchanged."""
    stale, images = network("vpp"), clip(2)
    adapted = stale.with_selection("vpp", "adapted", 0).eval().requires_grad_(False)
    for (want, _), (got, _) in zip(run(stale, images, 0.4), run(adapted, images, 0.4), strict=True):
        torch.testing.assert_close(got.mask_logits, want.mask_logits)
    adapter = adapted.exit_adapter
    last, kept_stages = torch.randn(1, PATCHES, adapted.config.embed_dim), torch.arange(PATCHES)[None] % 5
    adapter.mlp.fc2.weight.normal_()
    adapter.stage_bias.normal_()
    moved = adapter(last, kept_stages)
    assert ((moved - last).abs().amax(2) > 1e-3).all()
    other = adapter(last, (kept_stages + 1) % 5)
    assert ((moved - other).abs().amax(2) > 1e-3).all()  # the stage at which a token was dropped matters
    full = [outputs.mask_logits for outputs, _ in run(adapted, images, 1.0)]
    for got, (want, _) in zip(full, run(stale, images, 1.0), strict=True):
        torch.testing.assert_close(got, want.mask_logits)  # nothing was dropped


def test_frame_without_a_prior_computes_every_token_where_features_are_reused():
    assert budgets(network("vpp", "reuse"), 0.4, t=0) == (PATCHES,) * 4
    for pruned in ("stale", "adapted"):
        assert budgets(network("vpp", pruned), 0.4, t=0) == (PATCHES, *token_budget(PATCHES, 0.4)[1:])


@pytest.mark.parametrize("name", ["svit", "dynamicvit"])
def test_selectors_without_a_prior_start_at_block_3_and_see_no_past(name):
    model, images = network(name), clip(2)
    assert budgets(model, 0.4, t=1)[0] == PATCHES
    alone, _ = model(images[1], model.initial_state(1), torch.tensor(budgets(model, 0.4, 1)))
    after, _ = run(model, images, 0.4)[1]
    assert torch.equal(alone.kept_stages, after.kept_stages)


@pytest.mark.parametrize("name", ["vpp", "masks", "difference", "random"])
def test_the_past_decides_what_is_kept(name):
    """The same second frame after two other first ones."""
    model, one, other = network(name), clip(2, seed=0), clip(2, seed=1)
    other[1] = one[1]
    if name == "random":  # chance does not look at the pictures, but goes on from frame to frame
        kept = [outputs.kept_stages for outputs, _ in run(model, one[[1, 1, 1]], 0.4)]
        assert not torch.equal(kept[1], kept[2])
        return
    kept = [run(model, images, 0.4)[1][0].kept_stages for images in (one, other)]
    assert not torch.equal(*kept)


def test_refresh_reaches_every_token_in_turn():
    """With 40 % of 12 tokens at the last stage, 4 a frame, no token waits longer than 60 / 4 frames."""
    model = network("masks", "background", 40)
    state, longest = model.initial_state(1), 0
    image = clip(1)[0]
    for t in range(40):
        outputs, state = model(image, state, torch.tensor(budgets(model, 0.4, t)))
        assert torch.equal(state.age[0] == 0, outputs.kept_stages[0] == 4)
        longest = max(longest, int(state.age.max()))
    assert 3 <= longest <= 15


def test_refresh_ranks_are_exact_and_distinct_at_any_age():
    refresh = Refresh(3840, 50)
    age = torch.full((1, 3840), float(refresh.oldest))
    age[0, :7] -= 1
    ranks = refresh.ranks(age)
    assert ranks.unique().numel() == 3840
    assert ranks.double().equal(age.double() * 3840 + refresh.order.double())
    assert (ranks[0, :7].max() < ranks[0, 7:].min()).item()
    assert refresh.next_age(age, torch.zeros(1, 3840, dtype=torch.bool)).max() == refresh.oldest


def test_focus_is_the_largest_logit_of_an_object_around_a_patch():
    """An independent loop over patches and their neighbours."""
    generator = torch.Generator().manual_seed(0)
    classes, masks = torch.randn(1, 5, 4, generator=generator), torch.randn(1, 5, 24, 40, generator=generator)
    got = mask_focus(classes, masks).unflatten(1, (6, 10))
    objects = [q for q in range(5) if classes[0, q].argmax() < 3]
    assert 0 < len(objects) < 5
    for row in range(6):
        for column in range(10):
            window = masks[0, objects, max(0, 4 * row - 4) : 4 * row + 8, max(0, 4 * column - 4) : 4 * column + 8]
            assert got[0, row, column] == window.max()
    classes[..., -1] = 100
    assert (mask_focus(classes, masks) == NOTHING).all()


def test_draw_is_park_and_millers_generator():
    """After 10,000 steps from 1 the generator with 48271 stands at 399268537 (Park, Miller and Stockmeyer, 1993)."""
    draw = torch.ones(1, 1, dtype=torch.int64)
    for _ in range(10_000):
        draw = next_draw(draw)
    assert draw.item() == 399268537


def test_global_predictor_sees_the_mean_of_the_other_tokens():
    torch.manual_seed(0)
    predictor, x = GlobalPredictor(48), torch.randn(1, 9, 48)
    changed = x.clone()
    changed[0, 1:] += 1.0 * torch.randn(8, 48)
    one, other = predictor(x), predictor(changed)
    assert not torch.allclose(one[0, 0], other[0, 0])
    order = torch.randperm(9)
    torch.testing.assert_close(predictor(x[:, order]), one[:, order])


@pytest.mark.parametrize(
    ("field", "value"), [("selector", "best"), ("pruned", "fresh"), ("refresh", 51), ("refresh", -1)]
)
def test_unknown_choices_are_refused(field, value):
    with pytest.raises(ValueError, match=str(value)):
        replace(CONFIGS["vpp-eo-micro"], **{field: value})
