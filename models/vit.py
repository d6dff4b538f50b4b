"""Plain vision transformer parts: patch embedding, position embedding, attention, MLP, block."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PatchEmbed(nn.Module):
    """Linear embedding of square patches, straight from uint8 pixels.

    Normalisation ``(pixel / 255 - mean) / std`` is part of the weights (computed once, folded at export), so that
    the graph's input is the camera's own bytes. A product with a matrix rather than the convolution that it equals:
    it reads the patches in the order in which their bytes lie, so that only runs of ``3 * patch_size`` values move.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, patch_size: int, embed_dim: int, mean: tuple[float, float, float], std: tuple[float, float, float]
    ) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, embed_dim, kernel_size=patch_size, stride=patch_size)
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("std", torch.tensor(std), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """uint8 [B, H, W, 3], RGB -> float [B, N, C], row-major over the patch grid."""
        size = self.proj.stride[0]
        weight = self.proj.weight / (255.0 * self.std).view(1, 3, 1, 1)
        bias = self.proj.bias - (self.proj.weight * (self.mean / self.std).view(1, 3, 1, 1)).sum((1, 2, 3))
        pixels = image.to(weight.dtype).unflatten(1, (-1, size)).unflatten(3, (-1, size))  # [B, h, size, w, size, 3]
        patches = pixels.transpose(2, 3).flatten(3).flatten(1, 2)  # [B, N, size * size * 3]
        return patches @ weight.permute(2, 3, 1, 0).flatten(0, 2) + bias


def cosine_patches(patch_size: int, count: int) -> Tensor:
    """The ``count`` smoothest patterns of an RGB patch, orthonormal, [count, 3, patch_size, patch_size].

    Products of cosines (the DCT-II basis) in brightness and two colour differences, brightness four times as fine.
    A network that starts from these sees edges and colours from the first step; random ones have to be unlearned.
    """
    position = (torch.arange(patch_size) + 0.5) * torch.pi / patch_size
    waves = torch.cos(torch.arange(patch_size)[:, None] * position)  # [frequency, place]
    waves = waves / waves.norm(dim=1, keepdim=True)
    colours = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [1.0, -2.0, 1.0]])
    colours = colours / colours.norm(dim=1, keepdim=True)
    fineness = (1, 2, 2)
    order = sorted(
        (fineness[c] * (u * u + v * v) ** 0.5, c, u, v)
        for c in range(3) for u in range(patch_size) for v in range(patch_size)
    )[:count]  # fmt: skip
    return torch.stack([torch.einsum("c,h,w->chw", colours[c], waves[u], waves[v]) for _, c, u, v in order])


def sincos_pos_embed(patch_grid: tuple[int, int], dim: int) -> Tensor:
    """Sines and cosines of the row and the column of each patch, [1, N, dim]; a start for a learned embedding."""
    quarter = dim // 4
    frequencies = 1.0 / 100.0 ** (torch.arange(quarter) / quarter)
    parts = []
    for size, across in zip(patch_grid, (False, True), strict=True):
        angles = torch.arange(size)[:, None] * frequencies  # [size, dim / 4]
        waves = torch.cat([angles.sin(), angles.cos()], dim=1)
        parts.append((waves[None] if across else waves[:, None]).expand(*patch_grid, -1))
    return torch.cat(parts, dim=-1).flatten(0, 1).unsqueeze(0)


def resize_pos_embed(pos_embed: Tensor, source_grid: tuple[int, int], target_grid: tuple[int, int]) -> Tensor:
    """Resample a position embedding [1, N, C] bicubically to another patch grid (rows, columns)."""
    if source_grid == target_grid:
        return pos_embed
    grid = pos_embed.unflatten(1, source_grid).permute(0, 3, 1, 2)  # [1, N, C] -> [1, C, h, w]
    grid = F.interpolate(grid, size=target_grid, mode="bicubic", align_corners=False)
    return grid.flatten(2).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Scaled dot-product attention, [B, heads, N, d] each; keys where ``mask`` is False are left out.

    Exported it is written out, because torch's operator demands at least one token and a stage may keep none. Trained
    on a CPU too, where a step in bfloat16 takes a quarter longer with torch's operator (vpp-eo-nano, one core).
    """
    training_on_cpu = q.requires_grad and q.device.type == "cpu"
    if (torch.compiler.is_exporting() and mask is None) or training_on_cpu:
        logits = q * q.shape[-1] ** -0.5 @ k.transpose(2, 3)
        return (logits if mask is None else logits.masked_fill(~mask, float("-inf"))).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class QueryKeyValue(nn.Linear):
    """Queries, keys and values of tokens; exported as three products, so that nothing has to be cut apart."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__(dim, 3 * dim)
        self.heads = heads

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens [B, N, C] -> three tensors [B, heads, N, d]."""
        if torch.compiler.is_exporting():
            weights, biases = self.weight.unflatten(0, (3, -1)), self.bias.unflatten(0, (3, -1))
            parts = tuple(F.linear(x, weights[part], biases[part]) for part in range(3))
        else:
            parts = super().forward(x).chunk(3, dim=2)
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts)
        return q, k, v


class Attention(nn.Module):
    """Multi-head self-attention over all tokens given."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"{heads} heads cannot share a width of {dim} equally")
        self.qkv = QueryKeyValue(dim, heads)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """[B, N, C] -> [B, N, C]; keys where the bool ``key_mask`` [B, N] is False are not attended to."""
        mask = None if key_mask is None else key_mask[:, None, None, :]
        out = attend(*self.qkv(x), mask)
        return self.proj(out.transpose(1, 2).flatten(2))  # [B, heads, N, d] -> [B, N, C]


class Mlp(nn.Module):
    """Two linear layers with the erf GELU between them."""

    def __init__(self, dim: int, hidden: int, out: int | None = None) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim if out is None else out)

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., out]."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, dim: int, heads: int, mlp_ratio: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, mlp_ratio * dim)

    def forward(self, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """[B, N, C] -> [B, N, C]."""
        x = x + self.attn(self.norm1(x), key_mask)
        return x + self.mlp(self.norm2(x))
