"""The step that trains against the step that is deployed, and the way of the gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from models.configs import CONFIGS
from models.pruned_host import Selection
from models.training.sparse_step import masked_step
from models.vpp_eo import State, VppEo
from runtime.budget import reset_budget, token_budget

torch.set_num_threads(1)  # 60 tokens: more threads only wait for each other
TOLERANCE = {"rtol": 1e-3, "atol": 2e-4}  # straight-through sums leave 1e-7 of every masked value
PATCHES = 60


def micro(seed=0):
    """A micro network with every weight at random, whatever the initialisation: scores are well apart."""
    model = VppEo(CONFIGS["vpp-eo-micro"])
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(float(name.endswith("weight")) + 0.1 * noise)  # 1-D weights are those of LayerNorm
    return model


def clip(count, batch, seed=0):
    """Noise in blocks of 8 pixels that moves to the right; uint8 [T, B, H, W, 3]."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (batch, 3, 12, 20), generator=generator).float()
    image = F.interpolate(blocks, scale_factor=8).permute(0, 2, 3, 1).to(torch.uint8)
    return torch.stack([image.roll(5 * t, dims=2) for t in range(count)])


def budgets_at(t, ratios):
    """int64 [B, 4] for frame t of clips at these keep ratios; frame 0 has no prior."""
    counts = [token_budget(PATCHES, ratio) for ratio in ratios]
    return torch.tensor([reset_budget(count, PATCHES) if t == 0 else count for count in counts])


def assert_same_state(got, want):
    assert torch.equal(got.kept, want.kept)
    torch.testing.assert_close(got.keys, want.keys, **TOLERANCE)
    torch.testing.assert_close(got.queries, want.queries, **TOLERANCE)
    kept = want.kept[..., None].expand_as(want.keep_logits)  # elsewhere no key can match: the value is never read
    torch.testing.assert_close(got.keep_logits[kept], want.keep_logits[kept], **TOLERANCE)


def row_of(state, row):
    return state.map(lambda entry: entry[row : row + 1])


@pytest.mark.parametrize("ratio", [1.0, 0.55, 0.3, 0.12])
@torch.no_grad()
def test_masks_equal_gathering(ratio):
    """Three frames, each side with its own state: outputs, kept tokens and what is handed on."""
    model, images = micro().eval(), clip(3, batch=2)
    masked_state = gathered_state = model.initial_state(2)
    for t, image in enumerate(images):
        budget = budgets_at(t, [ratio, ratio])
        trace, masked_state = masked_step(model, image, masked_state, budget, noise=False)
        outputs, gathered_state = model(image, gathered_state, budget[0])
        assert_same_state(masked_state, gathered_state)
        class_logits, mask_logits = trace.predictions[-1]
        torch.testing.assert_close(class_logits, outputs.class_logits, **TOLERANCE)
        torch.testing.assert_close(mask_logits, outputs.mask_logits, **TOLERANCE)


@torch.no_grad()
def test_budget_of_each_clip_is_its_own():
    """A batch of three keep ratios equals each clip alone, in the form that is deployed."""
    model, images, ratios = micro().eval(), clip(3, batch=3), (0.3, 1.0, 0.55)
    together, alone = model.initial_state(3), [model.initial_state(1) for _ in ratios]
    for t, image in enumerate(images):
        budget = budgets_at(t, ratios)
        trace, together = masked_step(model, image, together, budget, noise=False)
        for row in range(3):
            outputs, alone[row] = model(image[row : row + 1], alone[row], budget[row])
            assert_same_state(row_of(together, row), alone[row])
            torch.testing.assert_close(trace.predictions[-1][0][row], outputs.class_logits[0], **TOLERANCE)
            torch.testing.assert_close(trace.predictions[-1][1][row], outputs.mask_logits[0], **TOLERANCE)


@torch.no_grad()
def test_clips_with_and_without_a_prior_share_a_batch():
    """A clip without a prior next to one with: each as if it were alone."""
    model, images = micro().eval(), clip(2, batch=2)
    _, state = masked_step(model, images[0], model.initial_state(2), budgets_at(0, (0.55, 0.55)), noise=False)
    start = model.initial_state(2).tensors()
    mixed = State(**{name: torch.cat([entry[:1], start[name][1:]]) for name, entry in state.tensors().items()})
    budget = torch.cat([budgets_at(1, [0.55]), budgets_at(0, [0.55])])
    trace, after = masked_step(model, images[1], mixed, budget, noise=False)
    for row in range(2):
        outputs, want = model(images[1][row : row + 1], row_of(mixed, row), budget[row])
        assert_same_state(row_of(after, row), want)
        torch.testing.assert_close(trace.predictions[-1][0][row], outputs.class_logits[0], **TOLERANCE)
    assert trace.map_probability.shape == (1, PATCHES), "only the clip that has a prior"


@torch.no_grad()
def test_dense_equals_the_network_without_selection():
    model, images = micro().eval(), clip(2, batch=2)
    state = want_state = model.initial_state(2)
    for image in images:
        trace, state = masked_step(model, image, state, None, noise=True)  # nothing is decided: noise has no place
        outputs, want_state = model(image, want_state, None, Selection.NONE)
        torch.testing.assert_close(trace.predictions[-1][0], outputs.class_logits, **TOLERANCE)
        torch.testing.assert_close(trace.predictions[-1][1], outputs.mask_logits, **TOLERANCE)
        torch.testing.assert_close(state.queries, want_state.queries, **TOLERANCE)
    assert trace.map_probability is None
    assert trace.stage_decisions == []


@torch.no_grad()
def test_trace_tells_the_losses_what_they_need():
    model, images = micro().eval(), clip(2, batch=2)
    trace, state = masked_step(model, images[0], model.initial_state(2), budgets_at(0, (0.55, 0.3)), noise=False)
    assert trace.map_probability is None, "no clip has a prior"
    trace, _ = masked_step(model, images[1], state, budgets_at(1, (0.55, 0.3)), noise=False)
    assert trace.map_probability.shape == (2, PATCHES)
    assert ((trace.map_probability >= 0) & (trace.map_probability <= 1)).all()
    assert len(trace.stage_decisions) == 3
    for decision in trace.stage_decisions:
        torch.testing.assert_close(decision, decision.round(), rtol=0, atol=1e-6)
    assert len(trace.predictions) == 3, "blocks 9, 10 and 11"
    torch.testing.assert_close(model.mask_head(trace.features, state.queries)[1].shape, trace.predictions[-1][1].shape)


@torch.no_grad()
def test_noise_changes_the_choice_but_not_the_count():
    model, images = micro().eval(), clip(2, batch=2)
    for predictor in (model.map_selector.predictor, *model.selectors):
        predictor.mlp.fc2.weight.mul_(0.05)  # published noise is small: let the scores be close
    budget = budgets_at(1, (0.55, 0.3))
    _, state = masked_step(model, images[0], model.initial_state(2), budgets_at(0, (0.55, 0.3)), noise=False)
    kept = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        kept.append(masked_step(model, images[1], state, budget, noise=True)[1].kept)
    assert torch.equal(kept[0], kept[1]), "the seed decides"
    assert not torch.equal(kept[0], kept[2])
    for choice in kept:
        assert choice.sum(1).tolist() == budget[:, 1].tolist()


def test_noise_has_the_published_spread():
    """Difference of two Gumbel draws over 10: standard deviation pi / sqrt(3) / 10, mean 0 (methods.md 1.3)."""
    model = micro().eval()
    for predictor in (model.map_selector.predictor, *model.selectors):
        torch.nn.init.zeros_(predictor.mlp.fc2.weight)
    state = model.initial_state(2)._replace(kept=torch.ones(2, PATCHES, dtype=torch.bool))
    drawn = []
    for seed in range(20):
        torch.manual_seed(seed)
        with torch.no_grad():
            trace, _ = masked_step(model, clip(1, batch=2)[0], state, budgets_at(1, (1.0, 1.0)), noise=True)
        drawn.append(trace.map_probability.logit())
    drawn = torch.stack(drawn)
    assert drawn.std().item() == pytest.approx(0.1814, rel=0.05)
    assert drawn.mean().item() == pytest.approx(0.0, abs=0.015)


# --- gradients --------------------------------------------------------------------------------------------------------


def reached(module):
    return all(p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in module.parameters())


def run_clip(model, frames=3, ratio=0.55, noise=True):
    torch.manual_seed(0)
    state, traces, images = model.initial_state(2), [], clip(frames, batch=2)
    for t, image in enumerate(images):
        trace, state = masked_step(model, image, state, budgets_at(t, (ratio, ratio)), noise=noise)
        traces.append(trace)
    return traces, state


def result_of(trace):
    class_logits, mask_logits = trace.predictions[-1]
    return class_logits.square().mean() + mask_logits.square().mean()


@pytest.mark.parametrize("noise", [True, False])
def test_result_alone_teaches_the_selectors(noise):
    """The loss of the last frame reaches Map-SM, whose logits were computed a frame before, and all selectors."""
    model = micro()
    traces, _ = run_clip(model, noise=noise)
    result_of(traces[-1]).backward()
    assert reached(model.map_selector.predictor)
    for number, selector in enumerate(model.selectors):
        assert reached(selector), f"selector {number}"
    assert reached(model.patch_embed)
    for number, block in enumerate(model.blocks):
        assert reached(block), f"block {number}"


def test_selectors_are_not_taught_by_a_frame_without_a_prior_alone():
    model = micro()
    traces, _ = run_clip(model, frames=1)
    result_of(traces[0]).backward()
    assert all(p.grad is None for p in model.map_selector.predictor.parameters())


@pytest.mark.parametrize("handed_on", ["keys", "keep_logits", "queries"])
def test_gradients_flow_two_frames_back_through_the_state(handed_on):
    """The first frame's own embedding: its weights are those of a copy that the later frames do not use."""
    first, later = micro(), micro()
    images = clip(3, batch=2)
    _, state = masked_step(first, images[0], first.initial_state(2), budgets_at(0, (0.55, 0.55)), noise=False)
    state = State(**{
        name: entry if name == handed_on else entry.detach() for name, entry in state.tensors().items()
    })  # fmt: skip
    _, state = masked_step(later, images[1], state, budgets_at(1, (0.55, 0.55)), noise=False)
    trace, _ = masked_step(later, images[2], state, budgets_at(1, (0.55, 0.55)), noise=False)
    result_of(trace).backward()
    assert reached(first.patch_embed)


def test_map_selector_is_taught_by_the_blocks_of_later_stages_too():
    """Masks are nested: with blocks 1 and 2 doing nothing, what Map-SM dropped is missed from block 3 on."""
    model = micro()
    for block in list(model.blocks)[1:3]:
        for layer in (block.attn.proj, block.mlp.fc2):
            torch.nn.init.zeros_(layer.weight), torch.nn.init.zeros_(layer.bias)
    traces, _ = run_clip(model, frames=2, noise=False)
    result_of(traces[-1]).backward()
    assert reached(model.map_selector.predictor)


def test_gradient_of_the_result_is_finite_where_almost_nothing_is_kept():
    model = micro()
    traces, state = run_clip(model, ratio=0.02)
    assert state.kept.sum(1).tolist() == [1, 1]
    sum(map(result_of, traces)).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_decisions_carry_the_gradient_of_their_soft_values():
    """The ratio loss raises the keep logit of a selector that keeps too little."""
    model = micro()
    (trace,), _ = run_clip(model, frames=1, noise=False)
    (trace.stage_decisions[1].mean() - 2.0).square().backward()  # an aim that no decision reaches
    gradient = model.selectors[1].mlp.fc2.bias.grad
    assert gradient[0] < 0 < gradient[1]
    assert all(p.grad is None for p in model.selectors[2].parameters())
