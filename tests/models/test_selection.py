"""Selection mathematics against the published order of operations, methods.md 1.3, written out plainly."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from models import selection
from models.pruned_host import MapSelector
from models.vpp_eo import State

GRIDS = [(1, 1), (1, 7), (6, 10), (9, 16), (34, 60)]
grids = pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"{grid[0]}x{grid[1]}")


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def distance_bias(grid, kept):
    return selection.distance_bias(selection.distance_table(grid), selection.distance_rows(grid), kept)


def published_scores(selector, tokens, keys, deep, kept, grid):
    """Soft keep probability [B, N] in the published order: associate, copy deep features, LN + MLP, smooth, softmax."""
    association = tokens.double() @ keys.double().transpose(1, 2) + direct_bias(grid)
    association = association.masked_fill(~kept[:, None], -math.inf)
    one_hot = F.one_hot(association.argmax(2), tokens.shape[1]).to(deep.dtype)
    copied = one_hot @ deep
    predictor = selector.predictor
    hidden = F.gelu(
        predictor.mlp.fc1(F.layer_norm(copied, copied.shape[-1:], predictor.norm.weight, predictor.norm.bias))
    )
    logits = predictor.mlp.fc2(hidden).log_softmax(2)
    return smoothed(logits, grid).softmax(2)[..., 0]


def direct_bias(grid):
    """Step 2 of methods.md 1.3 as a double loop over patches."""
    rows, columns = grid
    places = [(y / max(rows - 1, 1), x / max(columns - 1, 1)) for y in range(rows) for x in range(columns)]
    return torch.tensor(
        [[math.log10(10 * (2 - abs(a - c) - abs(b - d)) / 2 + 1e-6) for c, d in places] for a, b in places],
        dtype=torch.float64,
    )


def smoothed(logits, grid):
    """Logits [B, N, 2] after the 9 x 9 mean with replicated borders."""
    maps = logits.transpose(1, 2).unflatten(2, grid)
    maps = F.avg_pool2d(F.pad(maps, (4, 4, 4, 4), mode="replicate"), 9, stride=1)
    return maps.flatten(2).transpose(1, 2)


@grids
def test_smoothing_of_the_difference_equals_that_of_both_logits(grid):
    logits = random(2, grid[0] * grid[1], 2)
    pools = [selection.mean_pool_matrix(size, 4) for size in grid]
    got = selection.smooth_scores(selection.keep_score(logits), *pools)
    torch.testing.assert_close(got, selection.keep_score(smoothed(logits, grid)), rtol=1e-5, atol=1e-5)


@grids
def test_log_softmax_does_not_change_the_score(grid):
    logits = random(2, grid[0] * grid[1], 2)
    torch.testing.assert_close(selection.keep_score(logits.log_softmax(2)), selection.keep_score(logits))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_score_is_the_fp32_difference(dtype):
    logits = (30 * random(3, 5, 2)).to(dtype)
    score = selection.keep_score(logits)
    assert score.dtype == torch.float32
    assert torch.equal(score, logits[..., 0].float() - logits[..., 1].float())


@pytest.mark.parametrize("grid", GRIDS[:4], ids=lambda grid: f"{grid[0]}x{grid[1]}")
def test_distance_bias_equals_the_double_loop(grid):
    kept = torch.rand(2, grid[0] * grid[1], generator=torch.Generator().manual_seed(0)) < 0.7
    got = distance_bias(grid, kept)
    assert (got[~kept] == -math.inf).all()
    # log10 near 1e-6 magnifies the rounding of the distance: 1 ulp of 2 there is 0.1
    for bias, keys in zip(got, kept, strict=True):
        want = direct_bias(grid).float()[keys]
        near = want > -3
        torch.testing.assert_close(bias[keys][near], want[near], rtol=1e-4, atol=1e-5)
        assert (bias[keys][~near] < -3).all()


def test_distance_bias_at_both_ends():
    (bias,) = distance_bias((6, 10), torch.ones(1, 60, dtype=torch.bool))
    torch.testing.assert_close(bias.diagonal(), torch.ones(60), rtol=0, atol=1e-6)
    assert bias[0, 59].item() == pytest.approx(-6, abs=0.05)
    assert bias[9, 50].item() == pytest.approx(-6, abs=0.05)
    assert bias.argmax(1).tolist() == list(range(60))


def test_distance_bias_of_some_keys_is_that_of_theirs():
    grid, chosen = (6, 10), torch.tensor([[3, 59, 0], [41, 7, 12]])
    rows, kept = selection.distance_rows(grid)[chosen], torch.tensor([[True, False, True], [True, True, True]])
    got = selection.distance_bias(selection.distance_table(grid), rows, kept)
    want = distance_bias(grid, torch.ones(1, 60, dtype=torch.bool))[0][chosen]
    assert torch.equal(got, torch.where(kept[..., None], want, -math.inf))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_association_is_raw_products_plus_distance(dtype):
    tokens, keys, bias = random(2, 12, 8).to(dtype), random(2, 5, 8, seed=1).to(dtype), random(2, 5, 12, seed=2)
    got = selection.association_logits(tokens, keys, bias)
    assert got.dtype == torch.float32
    want = torch.einsum("bkc,bnc->bkn", keys.double(), tokens.double()) + bias.double()
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


def test_association_survives_products_beyond_float16():
    tokens = torch.full((1, 2, 64), 60.0, dtype=torch.float16)  # 64 * 60 * 60 is 3.5 times the largest float16
    logits = selection.association_logits(tokens, tokens, torch.zeros(1, 2, 2))
    assert torch.equal(logits, torch.full((1, 2, 2), 230400.0))


@given(
    batch=st.integers(1, 3), groups=st.integers(1, 5), size=st.integers(1, 5), tokens=st.integers(1, 9),
    values=st.integers(1, 40), kept=st.floats(0, 1), seed=st.integers(0, 99),
)  # fmt: skip
def test_most_similar_is_the_first_place_of_the_largest(batch, groups, size, tokens, values, kept, seed):
    rng, keys = np.random.default_rng(seed), groups * size
    association = rng.integers(-values, values, (batch, keys, tokens)).astype(np.float32)  # with ties
    association[rng.random((batch, keys)) > kept] = -np.inf
    found = selection.most_similar(torch.from_numpy(association), size)
    np.testing.assert_array_equal(found.numpy(), association.argmax(1))


def some_state(share, seed=0):
    """A selector on 9 x 16 patches, tokens of two pictures, and a prior with a share of the keys kept."""
    torch.manual_seed(seed)
    selector = MapSelector(32, (9, 16))
    keys, logits = random(2, 144, 32, seed=seed), random(2, 144, 2, seed=seed + 1)
    kept = torch.rand(2, 144, generator=torch.Generator().manual_seed(seed)) < share
    return selector, keys + 0.1 * random(2, 144, 32, seed=seed + 2), State(keys, logits, kept, torch.zeros(2, 1, 32))


@pytest.mark.parametrize("share", [1.0, 0.5, 0.05, 0.0])
def test_keys_that_were_kept_are_enough(share):
    selector, tokens, state = some_state(share)
    enough = max(1, math.ceil(int(state.kept.sum(1).max()) / 16))
    want = selector(tokens, state)
    for key_rows in {enough, 9}:
        assert torch.equal(selector(tokens, state, key_rows), want)


@pytest.mark.parametrize("key_rows", [1, 3])
def test_of_too_many_keys_those_that_score_highest_are_compared_with(key_rows):
    selector, tokens, state = some_state(0.8)
    scores = torch.where(state.kept, selection.keep_score(state.keep_logits), -math.inf)
    best = scores >= scores.sort(dim=1, descending=True).values[:, [16 * key_rows - 1]]
    assert torch.equal(selector(tokens, state, key_rows), selector(tokens, state._replace(kept=best)))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("share", [1.0, 0.5, 0.05])
def test_scores_rank_as_the_published_module(share, seed):
    """Logits at t-1 and a gather, against deep features copied along the one-hot association."""
    grid, dim = (9, 16), 32
    torch.manual_seed(seed)
    selector = MapSelector(dim, grid)
    deep, keys = random(2, 144, dim, seed=seed), random(2, 144, dim, seed=seed + 10)
    tokens = keys.roll(1, dims=1) + 0.1 * random(2, 144, dim, seed=seed + 20)
    kept = torch.rand(2, 144, generator=torch.Generator().manual_seed(seed)) < share
    kept[:, 0] = True
    logits = torch.where(kept[..., None], selector.predictor(deep), 0.0)

    score = selector(tokens, State(keys, logits, kept, torch.zeros(2, 1, dim)))
    want = published_scores(selector, tokens, keys, deep, kept, grid)
    torch.testing.assert_close(score.sigmoid(), want, rtol=1e-5, atol=1e-6)
    rank = want.gather(1, score.argsort(dim=1, descending=True))
    assert (rank[:, 1:] <= rank[:, :-1] + 1e-6).all(), "the published score falls along our ranking"


def test_map_selector_follows_an_object_that_moved():
    """Tokens that moved by eight columns take the score of where they were."""
    torch.manual_seed(0)
    grid, dim = (9, 30), 16
    selector = MapSelector(dim, grid)
    keys = 20 * F.normalize(random(1, 270, dim), dim=2)  # of one length: each is most similar to itself
    logits = torch.zeros(1, 9, 30, 2)
    logits[:, :, 5:10, 0] = 5.0
    kept = torch.ones(1, 270, dtype=torch.bool)
    moved = keys.unflatten(1, grid).roll(8, dims=2).flatten(1, 2)
    score = selector(moved, State(keys, logits.flatten(1, 2), kept, torch.zeros(1, 1, dim))).unflatten(1, grid)
    columns = score[0].mean(0)
    full = (columns > columns.max() - 1e-4).nonzero().flatten()
    assert full.tolist() == [13, 14, 15, 16, 17], "all of the object within 4 columns"


@pytest.mark.parametrize("keys", ["zero", "random"])
def test_empty_prior_gives_finite_scores(keys):
    selector = MapSelector(16, (6, 10))
    tokens = random(2, 60, 16)
    prior = torch.zeros(2, 60, 16) if keys == "zero" else random(2, 60, 16, seed=1)
    state = State(prior, torch.zeros(2, 60, 2), torch.zeros(2, 60, dtype=torch.bool), torch.zeros(2, 1, 16))
    score = selector(tokens, state)
    assert score.isfinite().all()
    assert selection.top_tokens(score, 60).sort(1).values.tolist() == [list(range(60))] * 2


@st.composite
def index_sets(draw):
    batch, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 20))
    count = draw(st.integers(0, tokens))
    rows = [draw(st.permutations(range(tokens)))[:count] for _ in range(batch)]
    return tokens, torch.tensor(rows, dtype=torch.int64).reshape(batch, count)


@settings(deadline=None)
@given(index_sets())
def test_gather_and_scatter_equal_torch(case):
    tokens, indices = case
    batch, count = indices.shape
    x, values = random(batch, tokens, 5), random(batch, count, 5, seed=1)
    wide = indices[..., None].expand(-1, -1, 5)
    before = x.clone()
    assert torch.equal(selection.gather_tokens(x, indices), x.gather(1, wide))
    assert torch.equal(selection.scatter_tokens(x, indices, values), x.scatter(1, wide, values))
    assert torch.equal(selection.gather_tokens(x[..., 0], indices), x[..., 0].gather(1, indices))
    flags = torch.zeros(batch, tokens, dtype=torch.int64)
    assert torch.equal(selection.scatter_tokens(flags, indices, torch.ones_like(indices)), flags.scatter(1, indices, 1))
    assert torch.equal(x, before), "the argument is left as it was"


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(-2, 2), min_size=12, max_size=12), min_size=1, max_size=3), st.integers(1, 12))
def test_of_equal_scores_the_lower_index_wins(rows, count):
    scores = torch.tensor(rows, dtype=torch.float32)
    want = [sorted(range(12), key=lambda i, row=row: (-row[i], i))[:count] for row in rows]
    assert selection.top_tokens(scores, count).tolist() == want


@pytest.mark.parametrize("count", [1, 420, 1428, 2040])
def test_lower_index_wins_among_as_many_tokens_as_a_video_has(count):
    """torch.topk and an unstable sort go astray only on longer rows."""
    scores = torch.randint(0, 5, (2, 2040), generator=torch.Generator().manual_seed(0)).float()
    want = [sorted(range(2040), key=lambda i, row=row: (-row[i], i))[:count] for row in scores.tolist()]
    assert selection.top_tokens(scores, count).tolist() == want


@given(st.lists(st.sampled_from([-1.0, -1e-30, -0.0, 0.0, 1e-30, 1.0]), min_size=1, max_size=9))
def test_threshold_keeps_where_keep_is_not_below_drop(scores):
    want = [i for i, score in enumerate(scores) if score >= 0]
    assert selection.kept_tokens(torch.tensor([scores])).tolist() == [want]
