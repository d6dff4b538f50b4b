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


def axis_distance(size: int) -> Tensor:
    """|u_i - u_j| of ``size`` points evenly spaced over [0, 1], float [size, size]."""
    points = torch.linspace(0.0, 1.0, size) if size > 1 else torch.zeros(1)
    return (points[:, None] - points[None, :]).abs()


def distance_bias(row_distance: Tensor, column_distance: Tensor) -> Tensor:
    """Map-SM's distance term [N, N] from the distances along both axes, [rows, rows] and [columns, columns].

    ``log10(10 * (2 - d) / 2 + 1e-6)`` with d the L1 distance in [0, 2]: 1 at the same place, -6 at opposite corners.
    Built by broadcasting, so that a graph stores the two small matrices only.
    """
    distance = row_distance[:, None, :, None] + column_distance[None, :, None, :]  # [h, w, h, w]
    tokens = row_distance.shape[0] * column_distance.shape[0]
    return (5.0 * (2.0 - distance) + 1e-6).log10().reshape(tokens, tokens)


def association_logits(tokens: Tensor, keys: Tensor, kept: Tensor, bias: Tensor) -> Tensor:
    """Similarity of keys of the frame before with every token, fp32 [B, K, N]; -inf for keys that were pruned.

    Raw dot products: no projection, no scale, no normalisation (as published).

    Args:
        tokens: Tokens of frame t before the first pruned block, [B, N, C].
        keys: The same tokens of frame t-1, or some of them, [B, K, C].
        kept: Which of them were computed up to the prior, bool [B, K].
        bias: Their rows of :func:`distance_bias`, [K, N] or [B, K, N].
    """
    pruned = torch.where(kept, 0.0, float("-inf")).unsqueeze(2)  # [B, K, 1]
    # The mask rides along as one more channel, against ones: one pass less over K x N.
    ones = torch.ones_like(tokens[..., :1], dtype=torch.float32)
    similarity = torch.cat([keys.float(), pruned], dim=2) @ torch.cat([tokens.float(), ones], dim=2).transpose(1, 2)
    return similarity + bias


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
