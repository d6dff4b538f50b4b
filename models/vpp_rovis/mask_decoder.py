"""Mask2Former's decoder (arXiv:2112.01527): queries read, layer by layer, from where their masks are."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.vpp_rovis.deformable import Shapes
from models.vpp_rovis.pixel_decoder import sine_positions


class QueryAttention(nn.Module):
    """Multi-head attention of queries to given keys and values, with blocked pairs."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        """[B, q, C] of queries; ``bias`` broadcasts to [B, heads, q, k], -inf where a key is not to be seen."""
        weights, biases = self.qkv.weight.chunk(3), self.qkv.bias.chunk(3)
        q, k, v = (
            F.linear(x, weight, part).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for x, weight, part in zip((query, key, value), weights, biases, strict=True)
        )
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3) + bias
        return self.proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))


class DecoderLayer(nn.Module):
    """Cross attention, self attention, feed-forward network, each followed by its norm."""

    def __init__(self, dim: int, heads: int, ffn: int) -> None:
        super().__init__()
        self.cross_attn = QueryAttention(dim, heads)
        self.norm1 = nn.LayerNorm(dim)
        self.self_attn = QueryAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, ffn)
        self.fc2 = nn.Linear(ffn, dim)
        self.norm3 = nn.LayerNorm(dim)

    def forward(
        self, queries: Tensor, position: Tensor, key: Tensor, value: Tensor, cross_bias: Tensor, self_bias: Tensor
    ) -> Tensor:
        """Queries [B, q, C] -> the same."""
        x = self.norm1(queries + self.cross_attn(queries + position, key, value, cross_bias))
        placed = x + position
        x = self.norm2(x + self.self_attn(placed, placed, x, self_bias))
        return self.norm3(x + self.fc2(F.relu(self.fc1(x))))


class MaskDecoder(nn.Module):
    """Class and mask of every query, of the learned ones and of those carried from the frame before.

    A layer's attention mask is needed at the size of one memory only, and bilinear resizing commutes with the product
    of kernels and channels: the mask features are resized once for each memory, instead of all masks for each layer.
    The convolution that makes the mask features is 1 x 1, so the kernels of the queries, which are few, go through it
    instead of the map.

    Args:
        shapes: (height, width) of the memories, strides 32, 16, 8.

    Attributes:
        margin: See :attr:`models.pruned_host.PrunedHost.inner_margin`.
    """

    margin = 0.0

    def __init__(self, dim: int, heads: int, layers: int, ffn: int, classes: int, queries: int, shapes: Shapes) -> None:
        super().__init__()
        self.shapes = shapes
        self.query_feat = nn.Parameter(torch.zeros(queries, dim))
        self.query_embed = nn.Parameter(torch.zeros(queries, dim))
        self.level_embed = nn.Parameter(torch.zeros(len(shapes), dim))
        self.layers = nn.ModuleList(DecoderLayer(dim, heads, ffn) for _ in range(layers))
        self.post_norm = nn.LayerNorm(dim)
        self.cls_embed = nn.Linear(dim, classes + 1)
        self.mask_embed = nn.Sequential(
            nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim)
        )
        for index, shape in enumerate(shapes):
            self.register_buffer(f"position{index}", sine_positions(shape, dim), persistent=False)

    def forward(
        self,
        features: Tensor,
        mask_feature: nn.Conv2d,
        memories: list[Tensor],
        track_queries: Tensor,
        track_valid: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run all layers.

        Args:
            features: What ``mask_feature`` makes mask features of, [B, C, H / 4, W / 4].
            mask_feature: 1 x 1 convolution.
            memories: [B, h * w, C] each.
            track_queries: Queries of the frame before, [B, T, C]; they have no position.
            track_valid: Which of them there are, bool [B, T]; the others are seen by no query.

        Returns:
            Class logits [B, Q + T, classes + 1], mask logits [B, Q + T, H / 4, W / 4], queries [B, Q + T, C].
        """
        batch, learned = features.shape[0], self.query_feat.shape[0]
        queries = torch.cat([self.query_feat.expand(batch, -1, -1), track_queries], dim=1)
        position = F.pad(self.query_embed, (0, 0, 0, track_queries.shape[1]))
        valid = F.pad(track_valid, (learned, 0), value=True)
        self_bias = torch.where(valid, 0.0, float("-inf"))[:, None, None]  # [B, 1, 1, Q + T]
        values = [memory + level for memory, level in zip(memories, self.level_embed, strict=True)]
        keys = [value + getattr(self, f"position{index}") for index, value in enumerate(values)]
        small = [
            F.interpolate(features, shape, mode="bilinear", align_corners=False).flatten(2) for shape in self.shapes
        ]
        for number, layer in enumerate(self.layers):
            level = number % len(self.shapes)
            cross_bias = _blocked_bias(self._masks(queries, small[level], mask_feature), self.margin)
            queries = layer(queries, position, keys[level], values[level], cross_bias, self_bias)
        masks = self._masks(queries, features.flatten(2), mask_feature).unflatten(2, features.shape[2:])
        return self.cls_embed(self.post_norm(queries)), masks, queries

    def _masks(self, queries: Tensor, features: Tensor, mask_feature: nn.Conv2d) -> Tensor:
        """Mask logits [B, q, n] of queries [B, q, C] on features [B, C, n]."""
        kernels = self.mask_embed(self.post_norm(queries))
        return kernels @ mask_feature.weight.flatten(1) @ features + (kernels @ mask_feature.bias).unsqueeze(2)


def _blocked_bias(mask_logits: Tensor, margin: float = 0.0) -> Tensor:
    """Attention bias [B, 1, q, k]: -inf where a mask [B, q, k] is negative, except for masks that are all negative.

    Args:
        margin: Where to cut instead of at 0, over the largest of the logits.
    """
    blocked = mask_logits < (margin * mask_logits.abs().amax() if margin else 0)
    blocked = blocked & ~blocked.all(2, keepdim=True)
    return torch.where(blocked, float("-inf"), 0.0).unsqueeze(1)
