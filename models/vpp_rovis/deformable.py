"""Multi-scale deformable attention: each query reads a few places of each feature map."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Shapes = tuple[tuple[int, int], ...]  # (height, width) of each map


def cell_centres(shapes: Shapes) -> Tensor:
    """Centres (x, y) in [0, 1] of all cells of all maps, row-major, [sum(h * w), 2]."""
    parts = []
    for height, width in shapes:
        y, x = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
        parts.append(torch.stack([x, y], dim=-1).flatten(0, 1))
    return torch.cat(parts)


class DeformableAttention(nn.Module):
    """Deformable attention without an identity path (Deformable DETR, arXiv:2010.04159).

    Args:
        dim: Width of queries, values and result.
        heads: Each reads places of its own from its share of the channels.
        shapes: The maps that ``values`` holds one after the other.
        references: Centres of the queries, [q, 2]; see :func:`cell_centres`.
        points: Places per query, head and map.
    """

    grid_origin: Tensor
    grid_scale: Tensor

    def __init__(self, dim: int, heads: int, shapes: Shapes, references: Tensor, points: int = 4) -> None:
        super().__init__()
        self.heads, self.shapes, self.points = heads, shapes, points
        places = heads * len(shapes) * points
        self.sampling_offsets = nn.Linear(dim, 2 * places)
        self.attention_weights = nn.Linear(dim, places)
        self.value_proj = nn.Linear(dim, dim)
        self.output_proj = nn.Linear(dim, dim)
        sizes = torch.tensor([(width, height) for height, width in shapes], dtype=torch.float32)
        self.register_buffer("grid_origin", 2 * references - 1, persistent=False)  # [-1, 1], as grid_sample counts
        self.register_buffer("grid_scale", 2 / sizes, persistent=False)

    def forward(self, queries: Tensor, values: Tensor) -> Tensor:
        """Queries [B, q, C] and values [B, sum(h * w), C] -> [B, q, C]."""
        levels, channels = len(self.shapes), queries.shape[2] // self.heads
        # offsets, in units of grid_sample at once, and weights in one product
        scale = self.grid_scale.repeat_interleave(self.points, 0).repeat(self.heads, 1).flatten()
        both = F.linear(
            queries,
            torch.cat([self.sampling_offsets.weight * scale[:, None], self.attention_weights.weight]),
            torch.cat([self.sampling_offsets.bias * scale, self.attention_weights.bias]),
        )
        offsets, weights = both.split((self.sampling_offsets.out_features, self.attention_weights.out_features), dim=2)
        weights = weights.unflatten(2, (self.heads, -1)).softmax(-1)  # [B, q, heads, levels * points]
        offsets = offsets.unflatten(2, (self.heads, levels, self.points, 2))
        # points before queries: the weighted sum over points then runs along contiguous queries
        grid = offsets.permute(3, 0, 2, 4, 1, 5).flatten(1, 2) + self.grid_origin  # [levels, B * heads, points, q, 2]
        shares = weights.unflatten(3, (levels, self.points)).permute(3, 0, 2, 4, 1).flatten(1, 2).unsqueeze(2)
        picture = self.value_proj(values).transpose(1, 2).unflatten(1, (self.heads, channels)).flatten(0, 1)
        maps = picture.split([height * width for height, width in self.shapes], dim=2)  # [B * heads, c, h * w] each
        mixed: Tensor | float = 0.0
        for part, shape, place, share in zip(maps, self.shapes, grid, shares, strict=True):
            read = F.grid_sample(part.unflatten(2, shape), place, "bilinear", "zeros", align_corners=False)
            mixed = (read * share).sum(2) + mixed  # [B * heads, c, points, q] -> [B * heads, c, q]
        return self.output_proj(mixed.unflatten(0, (-1, self.heads)).flatten(1, 2).transpose(1, 2))
