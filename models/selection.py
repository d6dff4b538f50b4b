"""The mathematics of choosing patch tokens, as pure functions.

Scores are fp32 and rank tokens: the difference ``keep logit - drop logit``, never its softmax, which saturates.
Rows are moved by one flat index over [B * N], which exports to a Gather and a ScatterND of whole rows.

Source of the method: Video Patch Pruning, arXiv:2604.00827; the rewrites that are exact are named where they are made.
"""

from __future__ import annotations

import torch
from torch import Tensor


def keep_score(keep_logits: Tensor) -> Tensor:
    """Two logits per token (keep, drop) [..., 2] -> ranking score [...], fp32; 0 or more means "keep"."""
    logits = keep_logits.float()
    return logits[..., 0] - logits[..., 1]


def top_tokens(scores: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` highest scores, int64 [B, count], from scores [B, N].

    Of equal scores the lower index wins: ONNX's TopK promises it, ``torch.topk`` does not, hence the stable sort.
    """
    if torch.compiler.is_exporting():
        return scores.topk(count, dim=1).indices
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :count]


def kept_tokens(scores: Tensor) -> Tensor:
    """Indices of the tokens whose keep logit is not below the drop logit, int64 [1, K]; K comes from the data.

    Args:
        scores: float [1, N]; a batch would need one K for all.
    """
    return (scores[0] >= 0).nonzero(as_tuple=True)[0].unsqueeze(0)


def flat_rows(indices: Tensor, tokens: int) -> Tensor:
    """Token indices [B, K] -> row numbers [B * K] in a [B * tokens, ...] tensor."""
    batch = torch.arange(indices.shape[0], device=indices.device).unsqueeze(1)
    return (indices + batch * tokens).flatten()


def gather_tokens(x: Tensor, indices: Tensor) -> Tensor:
    """Rows of x [B, N, ...] at int64 ``indices`` [B, K] -> [B, K, ...]."""
    rows = flat_rows(indices, x.shape[1])
    return x.flatten(0, 1).index_select(0, rows).unflatten(0, indices.shape)


def scatter_tokens(x: Tensor, indices: Tensor, values: Tensor) -> Tensor:
    """A copy of x [B, N, ...] whose rows at distinct int64 ``indices`` [B, K] are ``values`` [B, K, ...]."""
    rows = flat_rows(indices, x.shape[1])
    return x.flatten(0, 1).index_put((rows,), values.flatten(0, 1)).unflatten(0, (-1, x.shape[1]))


def distance_table(patch_grid: tuple[int, int]) -> Tensor:
    """Map-SM's distance term, each value once: float [h * w + 1, w] for a grid of h x w patches.

    ``log10(10 * (2 - d) / 2 + 1e-6)`` with d the L1 distance of two patches of a grid over [0, 1] x [0, 1]: 1 at the
    same place, -6 at opposite corners. Row ``r * w + c`` is what column c has with every column of a row of patches
    that is r rows away; the last is -inf.
    """
    rows, columns = (torch.arange(size) / max(size - 1, 1) for size in patch_grid)
    distance = rows[:, None, None] + (columns[:, None] - columns).abs()  # [h, w, w]
    table = (5.0 * (2.0 - distance) + 1e-6).log10().flatten(0, 1)
    return torch.cat([table, torch.full_like(table[:1], float("-inf"))])


def distance_rows(patch_grid: tuple[int, int]) -> Tensor:
    """Rows of :func:`distance_table` that together are the distance term of each patch, int64 [N, h]."""
    rows, columns = (torch.arange(size) for size in patch_grid)
    apart = (rows[:, None] - rows).abs()  # [h, h]
    return (apart[:, None] * len(columns) + columns[:, None]).flatten(0, 1)


def distance_bias(table: Tensor, rows: Tensor, kept: Tensor) -> Tensor:
    """Distance term of keys with every token, [B, K, N]; -inf for keys that were pruned.

    Args:
        table: :func:`distance_table`. A table of all pairs of patches has h times as many values, too many for the
            caches that the network leaves it.
        rows: :func:`distance_rows` of the keys, [K, h] or [B, K, h].
        kept: Which of them were computed up to the prior, bool [B, K].
    """
    rows = torch.where(kept.unsqueeze(2), rows, table.shape[0] - 1)  # [B, K, h]
    return table.index_select(0, rows.flatten()).reshape(*kept.shape, -1)


def association_logits(tokens: Tensor, keys: Tensor, bias: Tensor) -> Tensor:
    """Similarity of keys of the frame before with every token, fp32 [B, K, N].

    Raw dot products: no projection, no scale, no normalisation (as published).

    Args:
        tokens: Tokens of frame t before the first pruned block, [B, N, C].
        keys: The same tokens of frame t-1, or some of them, [B, K, C].
        bias: Their :func:`distance_bias`, [B, K, N].
    """
    return keys.float() @ tokens.float().transpose(1, 2) + bias


def most_similar(association: Tensor, size: int) -> Tensor:
    """First place of the largest value of each column, int64 [B, N], from ``association`` [B, K, N].

    Found group by group: the largest value of each, the first group that has the largest of all, then its place there.
    ONNX Runtime reads K x N values in a third of the time for their maximum that it takes for its place; OpenVINO
    and TensorRT import an arg max as a TopK.

    Args:
        size: Keys in a group; divides K.
    """
    groups = association.unflatten(1, (-1, size))  # [B, K, N] -> [B, K / size, size, N]
    group = groups.amax(dim=2).argmax(dim=1)  # [B, N]
    candidates = groups.gather(1, group[:, None, None].expand(-1, 1, size, -1))  # [B, 1, size, N]
    return group * size + candidates.argmax(dim=2).squeeze(1)


def mean_pool_matrix(size: int, radius: int) -> Tensor:
    """Matrix [size, size] of a mean over 2 * radius + 1 neighbours with replicated borders along one axis."""
    offsets = torch.arange(-radius, radius + 1)
    neighbours = (torch.arange(size)[:, None] + offsets).clamp(0, size - 1)  # [size, 2r + 1]
    weights = torch.full(neighbours.shape, 1.0 / (2 * radius + 1))
    return torch.zeros(size, size).scatter_add_(1, neighbours, weights)


def smooth_scores(scores: Tensor, row_pool: Tensor, column_pool: Tensor) -> Tensor:
    """Mean-pool scores [B, N] over the patch grid; the two matrices are :func:`mean_pool_matrix` of its sides.

    Equal to replicate padding and average pooling of both logits before their difference: all of it is linear.
    """
    grid = scores.unflatten(1, (row_pool.shape[0], column_pool.shape[0]))  # [B, N] -> [B, h, w]
    return (row_pool @ grid @ column_pool.T).flatten(1)
