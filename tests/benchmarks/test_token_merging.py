"""Token merging against one that merges token by token in plain Python."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.token_merging import (
    MergingVppEo,
    attend_by_size,
    counts_for,
    counts_of_equal_work,
    match,
    merging_giga_macs,
)
from models.macs import giga_macs
from models.pruned_host import Selection


def merge_slowly(values, sizes, keys, count):
    """Lists of tokens: sums of ``values * sizes``, sizes, and which tokens each is made of."""
    unit = keys / np.linalg.norm(keys, axis=1, keepdims=True)
    groups = {index: [index] for index in range(len(keys))}
    pairs = []
    for even in range(0, len(keys), 2):
        odd = max(range(1, len(keys), 2), key=lambda other: unit[even] @ unit[other])
        pairs.append((unit[even] @ unit[odd], even, odd))
    for _, even, odd in sorted(pairs, reverse=True)[:count]:
        groups[odd] += groups.pop(even)
    merged = [sum(values[index] * sizes[index] for index in group) for group in groups.values()]
    return merged, [sum(sizes[index] for index in group) for group in groups.values()], list(groups.values())


@settings(deadline=None, max_examples=40)
@given(tokens=st.integers(2, 15), share=st.floats(0, 1), seed=st.integers(0, 10_000))
def test_merging_is_that_of_the_oracle(tokens, share, seed):
    count = int(share * (tokens // 2))
    rng = np.random.default_rng(seed)
    keys, values = rng.normal(size=(tokens, 5)), rng.normal(size=(tokens, 3))
    sizes = rng.integers(1, 4, tokens).astype(float)
    want, want_sizes, groups = merge_slowly(values, sizes, keys, count)

    matching = match(torch.tensor(keys)[None], count)
    size = torch.tensor(sizes)[None, :, None]
    got, got_sizes = matching.apply(torch.tensor(values)[None] * size)[0], matching.apply(size)[0, :, 0]
    places = matching.places(tokens)[0]

    assert len(got) == len(want) == tokens - count
    for value, total, group in zip(want, want_sizes, groups, strict=True):
        (place,) = set(places[group].tolist())  # all of a group are found at one place
        np.testing.assert_allclose(got[place], value, rtol=1e-12, atol=1e-12)
        assert got_sizes[place] == total


def test_token_of_three_weighs_as_three_equal_tokens(micro_model):
    """Attention over one token of size three is attention over three copies of it."""
    block = micro_model.blocks[0]
    x = torch.randn(1, 4, 48, generator=torch.Generator().manual_seed(0))
    copies = torch.cat([x[:, :1], x[:, :1], x], dim=1)
    with torch.no_grad():
        once, _ = attend_by_size(block, x, torch.tensor([[[3.0], [1.0], [1.0], [1.0]]]))
        thrice, _ = attend_by_size(block, copies, torch.ones(1, 6, 1))
    torch.testing.assert_close(once, thrice[:, 2:], rtol=1e-5, atol=1e-5)


def test_nothing_merged_is_the_dense_network(micro_model):
    image = torch.randint(0, 256, (2, 96, 160, 3), dtype=torch.uint8)
    state = micro_model.initial_state(2)
    with torch.no_grad():
        outputs, after = micro_model(image, state, None, Selection.NONE)
        class_logits, mask_logits, queries = MergingVppEo(micro_model, [0] * 12)(image, state.queries)
    torch.testing.assert_close(class_logits, outputs.class_logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mask_logits, outputs.mask_logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(queries, after.queries, rtol=1e-4, atol=1e-5)


def test_identical_patches_lose_nothing_by_merging(micro_model):
    """Where all tokens are the same, merging changes no answer."""
    image = torch.full((1, 96, 160, 3), 90, dtype=torch.uint8)
    host = micro_model
    kept = host.pos_embed.data.clone()
    try:
        host.pos_embed.data.zero_()
        with torch.no_grad():
            whole = MergingVppEo(host, [0] * 12)(image, host.initial_state(1).queries)
            merged = MergingVppEo(host, counts_for(60, 12, 80))(image, host.initial_state(1).queries)
    finally:
        host.pos_embed.data.copy_(kept)
    for one, other in zip(whole, merged, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ratio", [0.40, 0.55])
def test_counts_of_equal_work_compute_as_much_as_our_budget(micro_model, ratio):
    wanted = giga_macs(micro_model, micro_model.budget_rule.for_ratio(ratio))
    got = merging_giga_macs(micro_model, counts_of_equal_work(micro_model, wanted))
    assert wanted <= got <= 1.05 * wanted


def test_work_without_merging_is_that_of_the_dense_network(micro_model):
    dense = giga_macs(micro_model, (60,) * 4, Selection.NONE)
    assert merging_giga_macs(micro_model, [0] * 12) == pytest.approx(dense)
