from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from models import selection
from models.configs import CONFIGS, config_by_name
from models.pruned_host import Selection
from models.vpp_eo import State, VppEo, patch_grid
from runtime.budget import token_budget
from runtime.errors import ImageSizeError

torch.set_num_threads(1)  # 60 tokens: more threads only wait for each other
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
PATCHES = 60  # 96 x 160 pixels
BUDGET = (33, 25, 14, 6)

budgets = st.lists(st.integers(1, PATCHES), min_size=4, max_size=4).map(lambda counts: sorted(counts, reverse=True))


def micro(seed=0, **fields):
    """A micro network with every weight at random, biases too: no fault hides behind a zero of the initialisation."""
    model = VppEo(replace(CONFIGS["vpp-eo-micro"], **fields)).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.copy_(noise / parameter[0].numel() ** 0.5)
        else:
            parameter.copy_(float(name.endswith("weight")) + 0.1 * noise)  # LayerNorm has the only vectors of weights
    return model


@pytest.fixture(scope="module")
def model():
    return micro()


def frames(count, batch=1, size=(96, 160), seed=0):
    """Noise in blocks of 8 pixels that moves to the right; uint8 [T, B, H, W, 3]."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (batch, 3, size[0] // 8, size[1] // 8), generator=generator).float()
    image = F.interpolate(blocks, scale_factor=8).permute(0, 2, 3, 1).to(torch.uint8)
    return torch.stack([image.roll(5 * t, dims=2) for t in range(count)])


def tensor(budget):
    return torch.tensor(budget)


def run(model, images, budget, mode=Selection.BUDGET):
    """All outputs and states of a stream; the first frame has no prior, so its first count is N."""
    state, results = model.initial_state(images.shape[1]), []
    for t, image in enumerate(images):
        counts = None if budget is None else tensor([model.patch_count if t == 0 else budget[0], *budget[1:]])
        outputs, state = model(image, state, counts, mode)
        results.append((outputs, state))
    return results


def cut(values, row):
    return type(values)(*(None if value is None else value[row : row + 1] for value in values))


def assert_same(got, want):
    """Equal token choices first: after another choice every value differs and none explains it."""
    names = [name for name in got._fields if getattr(want, name) is not None]
    for name in names:
        a, b = getattr(got, name), getattr(want, name)
        if not a.is_floating_point():
            assert torch.equal(a, b), name
    for name in names:
        torch.testing.assert_close(
            getattr(got, name), getattr(want, name), **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_shapes_are_those_that_the_docstrings_promise(model):
    outputs, state = run(model, frames(2, batch=2), BUDGET)[1]
    assert outputs.class_logits.shape == (2, 8, 9)
    assert outputs.mask_logits.shape == (2, 8, 24, 40)
    assert (outputs.kept_stages.shape, outputs.kept_stages.dtype) == ((2, PATCHES), torch.int64)
    assert (outputs.tokens_kept.shape, outputs.tokens_kept.dtype) == ((2, 4), torch.int64)
    assert (outputs.state_ok.shape, outputs.state_ok.dtype) == ((2,), torch.bool)
    first = model.initial_state(2).tensors()
    assert {name: (entry.shape, entry.dtype) for name, entry in state.tensors().items()} == {
        name: (entry.shape, entry.dtype) for name, entry in first.items()
    }


@settings(max_examples=25, deadline=None)
@given(budgets, st.integers(1, 3))
def test_every_budget_is_met_exactly_and_nested(model, budget, batch):
    for t, (outputs, state) in enumerate(run(model, frames(2, batch), budget)):
        counts = [PATCHES if t == 0 else budget[0], *budget[1:]]
        assert outputs.tokens_kept.tolist() == [counts] * batch
        for stage, count in enumerate(counts):  # a token that passed stage j passed all before it: kept_stages counts
            assert (outputs.kept_stages > stage).sum(1).tolist() == [count] * batch
        assert state.kept.sum(1).tolist() == [counts[1]] * batch, "the prior is taken between stages 1 and 2"
        assert torch.equal(state.kept, outputs.kept_stages >= 2)
        assert (state.keep_logits[~state.kept] == 0).all()
        assert outputs.state_ok.all()
        assert all(
            value.isfinite().all() for value in (outputs.class_logits, outputs.mask_logits, *state.tensors().values())
        )


@pytest.mark.parametrize("batch", [1, 3])
def test_budget_of_all_tokens_equals_the_dense_network(model, batch):
    images = frames(3, batch)
    dense, full = run(model, images, None, Selection.NONE), run(model, images, (PATCHES,) * 4)
    for (want, want_state), (got, got_state) in zip(dense, full, strict=True):
        torch.testing.assert_close(got.class_logits, want.class_logits, **TOLERANCE)
        torch.testing.assert_close(got.mask_logits, want.mask_logits, **TOLERANCE)
        torch.testing.assert_close(got_state.queries, want_state.queries, **TOLERANCE)
        assert torch.equal(got.tokens_kept, want.tokens_kept)
        assert torch.equal(got.kept_stages, want.kept_stages)
        assert want.state_ok.all()


def test_dense_network_matches_a_plain_vision_transformer(model):
    """Blocks, queries and head put together from their parts, with the head's two linear maps in the usual order."""
    image = frames(1, batch=2)[0]
    pixels = (image.permute(0, 3, 1, 2).float() / 255 - tensor(model.config.mean).view(3, 1, 1)) / tensor(
        model.config.std
    ).view(3, 1, 1)
    x = F.conv2d(pixels, model.patch_embed.proj.weight, model.patch_embed.proj.bias, stride=16)
    x = x.flatten(2).transpose(1, 2) + model.pos_embed
    queries = model.queries.expand(2, -1, -1)
    for number, block in enumerate(model.blocks):
        if number == 9:
            x = torch.cat([x, queries], dim=1)
        x = plain_block(block, x, heads=3)
    patches, queries = x[:, :PATCHES], x[:, PATCHES:]
    outputs, state = model(image, model.initial_state(2), None, Selection.NONE)
    torch.testing.assert_close(state.queries, model.queries + model.query_update(queries), **TOLERANCE)
    classes, masks = plain_head(model.mask_head, patches, queries)
    torch.testing.assert_close(outputs.class_logits, classes, **TOLERANCE)
    torch.testing.assert_close(outputs.mask_logits, masks, **TOLERANCE)


def plain_block(block, x, heads):
    y = block.norm1(x)
    qkv = F.linear(y, block.attn.qkv.weight, block.attn.qkv.bias).chunk(3, dim=2)
    q, k, v = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in qkv)
    attention = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(3) @ v
    x = x + block.attn.proj(attention.transpose(1, 2).flatten(2))
    return x + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))


def plain_head(head, tokens, queries):
    """Transposed convolution to stride 8; then every pixel of a 2 x 2 cell at stride 4 with the kernel of its place."""
    rows, columns = head.upsample.patch_grid
    weight = head.upsample.weight.unflatten(0, (-1, 2, 2)).permute(3, 0, 1, 2)  # [M * 4, C] -> [C, M, 2, 2]
    grid = head.norm(tokens).transpose(1, 2).unflatten(2, (rows, columns))
    bias = head.upsample.bias.unflatten(0, (-1, 2, 2)).repeat(1, rows, columns)
    features = F.conv_transpose2d(grid, weight, stride=2) + bias
    features = features + head.refine(F.gelu(features))
    queries = head.norm(queries)
    kernels = head.kernels(queries).unflatten(2, (4, -1))  # [B, Q, 4, M]
    masks = torch.empty(*queries.shape[:2], 4 * rows, 4 * columns)
    for place in range(4):
        logits = torch.einsum("bqm,bmhw->bqhw", kernels[:, :, place], features)
        masks[:, :, place // 2 :: 2, place % 2 :: 2] = logits
    return head.classify(queries), masks


def test_kept_tokens_depend_on_the_frame_before(model):
    """Same image, same budget: what is kept follows the keep logits, the keys and the kept tokens of the state."""
    images = frames(2)
    state = run(model, images[:1], BUDGET)[0][1]

    def kept(changed):
        return model(images[1], changed, tensor(BUDGET))[0].kept_stages > 0

    usual = kept(state)
    half = state.kept & (torch.arange(PATCHES) < PATCHES // 2)
    assert not torch.equal(kept(state._replace(keep_logits=-state.keep_logits)), usual), "keep logits"
    assert not torch.equal(kept(state._replace(keys=state.keys.flip(1))), usual), "keys"
    assert not torch.equal(kept(state._replace(kept=half)), usual), "kept"
    assert torch.equal(kept(state._replace(queries=state.queries + 1.0)), usual), "queries carry no prior"


@pytest.mark.parametrize("batch", [1, 2])
def test_map_sm_compares_with_the_tokens_kept_and_finds_the_same(batch, monkeypatch):
    """Fewer keys than patches, and the same answer, also in the frame after the budget was raised."""
    model, compared, images = micro(), [], frames(4, batch)

    def stream():
        (_, state), *_ = run(model, images[:1], BUDGET)
        for image, budget in zip(images[1:], (BUDGET, BUDGET, (50, 45, 20, 10)), strict=True):
            outputs, state = model(image, state, tensor(budget))
            yield outputs, state

    plain = selection.association_logits

    def noting(tokens, keys, bias):
        compared.append(keys.shape[1])
        return plain(tokens, keys, bias)

    monkeypatch.setattr(selection, "association_logits", noting)
    few = list(stream())
    model.compares_all = True
    every = list(stream())
    columns, (start, after) = model.patch_grid[1], (compared[:4], compared[4:])
    assert start == [columns * math.ceil(count / columns) for count in (BUDGET[1], BUDGET[1], BUDGET[1], 45)]
    assert after == [PATCHES] * 4 and max(start) < PATCHES
    for (got, state), (want, plain_state) in zip(few, every, strict=True):
        assert_same(got, want)
        assert_same(state, plain_state)


def test_pruned_keys_are_never_matched(model):
    """Whatever stands where the frame before pruned has no influence."""
    images = frames(2)
    state = run(model, images[:1], BUDGET)[0][1]
    noise = 100 * torch.randn(state.keys.shape, generator=torch.Generator().manual_seed(1))
    wild = State(
        keys=torch.where(state.kept[..., None], state.keys, noise),
        keep_logits=torch.where(state.kept[..., None], state.keep_logits, noise[..., :2]),
        kept=state.kept,
        queries=state.queries,
    )
    assert_same(model(images[1], wild, tensor(BUDGET))[0], model(images[1], state, tensor(BUDGET))[0])


def test_state_hands_on_keys_of_this_frame_and_logits_of_the_tokens_kept(model):
    image = frames(1)[0]
    _, state = model(image, model.initial_state(1), tensor((PATCHES,) * 4))
    x = model.embed(image)
    keys = plain_block(model.blocks[0], x, heads=3)
    torch.testing.assert_close(state.keys, keys, **TOLERANCE)
    x = keys
    for block in list(model.blocks)[1:6]:
        x = plain_block(block, x, heads=3)
    torch.testing.assert_close(state.keep_logits, model.map_selector.predictor(x), **TOLERANCE)


def test_token_that_was_dropped_keeps_its_last_value(model):
    """With one token from stage 0 on, all the others are still those of block 0 when the head sees them."""
    images = frames(2)
    state = run(model, images[:1], BUDGET)[0][1]
    seen = []
    hook = model.mask_head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    outputs, next_state = model(images[1], state, tensor((1, 1, 1, 1)))
    hook.remove()
    dropped = outputs.kept_stages == 0
    assert dropped.sum() == PATCHES - 1
    torch.testing.assert_close(seen[0][dropped], next_state.keys[dropped], **TOLERANCE)
    assert (seen[0][~dropped] - next_state.keys[~dropped]).abs().max() > 1e-2


def test_rows_of_a_batch_are_independent(model):
    images = frames(3, batch=2)
    together = run(model, images, BUDGET)
    for row in range(2):
        alone = run(model, images[:, row : row + 1], BUDGET)
        for (got, got_state), (want, want_state) in zip(together, alone, strict=True):
            assert_same(cut(got, row), want)
            assert_same(cut(got_state, row), want_state)


def test_bad_state_in_one_row_leaves_the_other_alone(model):
    images = frames(2, batch=2)
    state = run(model, images[:1], BUDGET)[0][1]
    broken = state._replace(keys=state.keys.clone())
    broken.keys[0] = torch.nan
    got, want = (model(images[1], entry, tensor(BUDGET))[0] for entry in (broken, state))
    assert_same(cut(got, 1), cut(want, 1))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_state_that_is_not_finite_is_reported_for_its_row_alone(model, value):
    """The camera's bytes are finite: what breaks is a query that was handed on, or a weight."""
    state = model.initial_state(2)
    state.queries[1, 3, 5] = value
    outputs, _ = model(frames(1, batch=2)[0], state, tensor((PATCHES,) * 4))
    assert outputs.state_ok.tolist() == [True, False]
    outputs, _ = model(frames(1, batch=2)[0], state, None, Selection.NONE)
    assert outputs.state_ok.tolist() == [True, False]


def test_keys_that_are_nan_are_reported():
    model = micro()
    model.pos_embed[0, 7] = torch.nan
    outputs, state = model(frames(1)[0], model.initial_state(1), tensor((PATCHES,) * 4))
    assert state.keys.isnan().any()
    assert outputs.state_ok.tolist() == [False]


def test_keep_logits_that_are_not_finite_are_reported():
    model = micro()
    model.map_selector.predictor.mlp.fc2.bias[0] = torch.inf
    outputs, state = model(frames(1)[0], model.initial_state(1), tensor((PATCHES,) * 4))
    assert state.keys.isfinite().all()
    assert outputs.state_ok.tolist() == [False]


def decide(model, stage, biases):
    """Let selective module ``stage`` (1..3) add ``biases`` to its keep and drop logit."""
    model.selectors[stage - 1].mlp.fc2.bias.copy_(tensor(biases))
    return model


def test_threshold_keeps_the_tokens_that_score_0_or_more():
    """Decisions taken again from what the selectors saw, and applied to the tokens that were still there."""
    model, scores = micro(), []
    for selector in model.selectors:
        selector.register_forward_hook(lambda *args: scores.append(args[2][0, :, 0] - args[2][0, :, 1]))
    results = run(model, frames(3), BUDGET, Selection.THRESHOLD)
    for t, (outputs, _) in enumerate(results):
        stages = outputs.kept_stages[0]
        counts = [PATCHES if t == 0 else BUDGET[0]]
        for seen in scores[3 * t : 3 * t + 3]:
            assert len(seen) == counts[-1], "a stage decides about the tokens that the one before kept"
            counts.append(int((seen >= 0).sum()))
        assert outputs.tokens_kept[0].tolist() == counts
        assert [int((stages > stage).sum()) for stage in range(4)] == counts
    assert len({tuple(outputs.tokens_kept[0].tolist()) for outputs, _ in results}) > 1, "the count comes from the data"


def test_threshold_picks_the_same_tokens_as_a_budget_of_its_counts():
    """A budget equal to the counts of the threshold keeps the same tokens: both rank by one score."""
    model, images = decide(micro(), 3, (0.3, -0.3)), frames(2)  # some tokens are left at the end
    model.compares_all = True  # the counts of the second frame are lower
    state = model.initial_state(1)
    for t, image in enumerate(images):
        first = PATCHES if t == 0 else BUDGET[0]
        want, next_state = model(image, state, tensor((first, 1, 1, 1)), Selection.THRESHOLD)
        counts = want.tokens_kept[0]
        assert (counts >= 1).all()
        got, got_state = model(image, state, counts)
        assert_same(got, want)
        assert_same(got_state, next_state)
        state = next_state


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_threshold_stage_that_keeps_nothing_gives_finite_outputs(stage):
    model = decide(micro(), stage, (-1e3, 1e3))
    state = model.initial_state(1)
    for t, image in enumerate(frames(2)):
        first = PATCHES if t == 0 or stage == 1 else BUDGET[0]
        outputs, state = model(image, state, tensor((first, 1, 1, 1)), Selection.THRESHOLD)
        assert outputs.tokens_kept[0, stage:].tolist() == [0] * (4 - stage)
        assert outputs.tokens_kept[0, 0] == first
        assert all(
            value.isfinite().all() for value in (outputs.class_logits, outputs.mask_logits, *state.tensors().values())
        )
        assert outputs.state_ok.item() is (stage > 1), "the prior is empty if nothing is left at block 5"
        assert state.kept.any().item() is (stage > 1)


def test_threshold_that_keeps_everything_equals_the_dense_network():
    model = micro()
    for stage in (1, 2, 3):
        decide(model, stage, (1e3, -1e3))
    image = frames(1)[0]
    got, _ = model(image, model.initial_state(1), tensor((PATCHES, 1, 1, 1)), Selection.THRESHOLD)
    want, _ = model(image, model.initial_state(1), None, Selection.NONE)
    assert_same(got, want)


def test_queries_start_as_learned_and_are_handed_on(model):
    state = model.initial_state(3)
    assert torch.equal(state.queries, model.queries.expand(3, -1, -1))
    assert not state.kept.any()
    assert not state.keys.any()
    assert not state.keep_logits.any()
    (outputs, after), (_, later) = run(model, frames(2), BUDGET)
    assert (after.queries - model.queries).abs().max() > 1e-3
    assert (later.queries - after.queries).abs().max() > 1e-4, "what a query is depends on what it has seen"
    other, _ = model(frames(2)[1], model.initial_state(1), tensor((PATCHES, *BUDGET[1:])))
    handed_on, _ = model(
        frames(2)[1], model.initial_state(1)._replace(queries=after.queries), tensor((PATCHES, *BUDGET[1:]))
    )
    assert (other.mask_logits - handed_on.mask_logits).abs().max() > 1e-5
    assert outputs.state_ok.all()


def test_initial_state_belongs_to_the_caller(model):
    learned = model.queries.clone()
    model.initial_state(2).queries.fill_(7.0)
    assert torch.equal(model.queries, learned)


@pytest.mark.parametrize("mode", list(Selection))
def test_a_step_is_a_pure_function(mode):
    """Twice the same arguments, bit for bit the same results; arguments and module stay as they were."""
    model, images = micro(), frames(2)
    budget = None if mode is Selection.NONE else tensor(BUDGET)
    state = run(model, images[:1], BUDGET)[0][1]

    def attributes():
        return [
            {name: value for name, value in vars(module).items() if not name.startswith("_")}
            | {f"{kind}.{name}": (id(value), value if value is None else value.clone())
               for kind in ("_parameters", "_buffers") for name, value in vars(module)[kind].items()}
            for module in model.modules()
        ]  # fmt: skip

    before, arguments = attributes(), [value.clone() for value in (images, *state.tensors().values())]
    torch.manual_seed(1)
    first = model(images[1], state, budget, mode)
    torch.manual_seed(2)  # noise would come from here
    second = model(images[1], state, budget, mode)

    left, right = ((*step[0], *step[1].tensors().values()) for step in (first, second))
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(arguments, (images, *state.tensors().values()), strict=True):
        assert torch.equal(a, b)
    for module, (old, new) in zip(model.modules(), zip(before, attributes(), strict=True), strict=True):
        assert old.keys() == new.keys(), type(module).__name__
        for name in old:
            if name.startswith("_"):
                assert old[name][0] == new[name][0], name
                assert old[name][1] is None or torch.equal(old[name][1], new[name][1]), name
            else:
                assert old[name] == new[name], name


@pytest.mark.parametrize("size", [(160, 96), (96, 160), (32, 32), (112, 208)], ids=lambda size: f"{size[0]}x{size[1]}")
def test_another_image_size_works_with_the_same_weights(model, size):
    resized = model.at_image_size(size)
    grid = (size[0] // 16, size[1] // 16)
    assert resized.patch_grid == grid
    assert resized.config == replace(model.config, image_size=size)
    assert resized.training is model.training
    for t, (outputs, _) in enumerate(run(resized, frames(2, size=size), token_budget(resized.patch_count, 0.55))):
        assert outputs.mask_logits.shape == (1, 8, size[0] // 4, size[1] // 4)
        assert outputs.mask_logits.isfinite().all(), t
    positions = model.pos_embed.unflatten(1, model.patch_grid).permute(0, 3, 1, 2)
    if size != model.config.image_size:
        positions = F.interpolate(positions, size=grid, mode="bicubic", align_corners=False)
    torch.testing.assert_close(resized.pos_embed, positions.flatten(2).transpose(1, 2))
    for name, value in model.state_dict().items():
        assert name == "pos_embed" or torch.equal(resized.state_dict()[name], value), name


def test_resized_copy_does_not_share_its_weights(model):
    before = model.queries.clone()
    model.at_image_size((32, 64)).requires_grad_(False).queries.zero_()
    assert torch.equal(model.queries, before)


@pytest.mark.parametrize(
    ("size", "nearest"),
    [((100, 160), "96 160"), ((96, 153), "96 160"), ((0, 160), "16 160"), ((3, -5), "16 16"), ((540, 960), "544 960")],
)
def test_size_that_the_patches_do_not_divide_names_the_nearest(model, size, nearest):
    with pytest.raises(ImageSizeError) as caught:
        model.at_image_size(size)
    message = str(caught.value)
    assert f"{size[0]} x {size[1]}" in message
    assert "patch size 16" in message
    assert f"The nearest that is: {nearest}." in message


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_named_configurations_hold_together(name):
    config = config_by_name(name)
    assert config.name == name
    assert config.embed_dim % config.heads == 0
    assert config.stage_blocks == (1, 3, 6, 9)
    assert (config.stages, config.prior_stage) == (4, 1)
    assert config.query_block >= max(config.stage_blocks)
    assert patch_grid(config)[0] * 16 == config.image_size[0]
    assert config_by_name(name, ("cat", "dog")).classes == ("cat", "dog")


def test_unknown_configuration_lists_those_there_are():
    with pytest.raises(KeyError, match=r"vpp-eo-huge.*vpp-eo-micro, vpp-eo-nano"):
        config_by_name("vpp-eo-huge")
