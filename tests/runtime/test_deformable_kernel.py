"""The compiled kernel of deformable attention against torch's grid_sample."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("numba")

from runtime.deformable_kernel import deformable_attention

POINTS = 3


def by_grid_sample(offsets, logits, values, origins, sizes):
    """The same from the definition: each map sampled as a picture, then weighted and summed."""
    heads, levels = logits.shape[2], len(sizes)
    places = (
        torch.from_numpy(offsets).unflatten(2, (heads, levels, -1, 2)) + torch.from_numpy(origins)[:, None, None, None]
    )
    shares = torch.from_numpy(logits).softmax(-1).unflatten(3, (levels, -1))
    total, start = 0, 0
    for level, (height, width) in enumerate(sizes.tolist()):
        cells = torch.from_numpy(values[:, start : start + height * width]).unflatten(2, (heads, -1))
        start += height * width
        picture = cells.permute(0, 2, 3, 1).flatten(0, 1).unflatten(2, (height, width))
        grid = places[:, :, :, level].transpose(1, 2).flatten(0, 1)  # [B * heads, q, points, 2]
        read = F.grid_sample(picture, grid, align_corners=False).unflatten(0, (-1, heads))
        total = total + (read * shares[:, :, :, level].transpose(1, 2).unsqueeze(2)).sum(-1)
    return total.permute(0, 3, 1, 2).flatten(2).numpy()  # [B, heads, channels, q] -> [B, q, C]


def attention(seed, *, batch=1, queries=9, heads=2, channels=4, sizes=((5, 7), (3, 4)), spread=1.0):
    rng = np.random.default_rng(seed)
    sizes = np.array(sizes, np.int64)
    places = len(sizes) * POINTS
    return (
        (spread * rng.normal(size=(batch, queries, heads * places * 2))).astype(np.float32),
        (10 * spread * rng.normal(size=(batch, queries, heads, places))).astype(np.float32),
        rng.normal(size=(batch, sizes.prod(1).sum(), heads * channels)).astype(np.float32),
        (2 * rng.random((queries, 2)) - 1).astype(np.float32),
        sizes,
    )


def run(arrays, threads=1):
    offsets, values = arrays[0], arrays[2]
    result = np.full((*offsets.shape[:2], values.shape[2]), np.nan, np.float32)
    deformable_attention(*arrays, result, threads)
    return result


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=3),
    heads=st.integers(1, 3),
    queries=st.integers(1, 20),
    batch=st.integers(1, 2),
    spread=st.sampled_from([0.0, 0.1, 1.0, 100.0]),
    threads=st.sampled_from([1, 2, 3]),
)
def test_equals_grid_sample(seed, sizes, heads, queries, batch, spread, threads):
    """Also for maps of one cell, places far outside, and fewer queries than pieces."""
    arrays = attention(seed, batch=batch, queries=queries, heads=heads, sizes=sizes, spread=spread)
    np.testing.assert_allclose(run(arrays, threads), by_grid_sample(*arrays), rtol=1e-4, atol=1e-4)


def test_places_on_cells_and_edges_read_what_lies_there():
    """From the middle of the first cell to half a cell beyond the last, where there is nothing left to read."""
    values = np.array([[[10.0], [20.0]]], np.float32)  # a map of 1 x 2, one channel
    x = np.array([-0.5, 0.0, 0.5, 1.0, 1.5, -1.5], np.float32)
    offsets = np.stack([x, np.zeros_like(x)], 1)[None]
    arrays = offsets, np.ones((1, 6, 1, 1), np.float32), values, np.zeros((6, 2), np.float32), np.array([[1, 2]])
    np.testing.assert_allclose(run(arrays)[0, :, 0], [10, 15, 20, 10, 0, 0], atol=1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38, -3e38])
def test_broken_offsets_stay_inside_the_arrays(value):
    """A network with broken weights must not take the process with it; other queries are as they were."""
    arrays = attention(0)
    whole = run(arrays)
    arrays[0][0, 4] = value
    np.testing.assert_array_equal(np.delete(run(arrays), 4, 1), np.delete(whole, 4, 1))
