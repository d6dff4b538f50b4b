"""Mask2Former's pixel decoder (arXiv:2112.01527): deformable self-attention over three maps, then mask features."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.vpp_rovis.deformable import DeformableAttention, Shapes, cell_centres

GROUPS = 32


def sine_positions(shape: tuple[int, int], dim: int) -> Tensor:
    """Position encoding [h * w, dim]: half of the channels for the row, half for the column."""
    half = dim // 2
    scale = 10000 ** (2 * (torch.arange(half) // 2) / half)
    waves = []
    for size in shape:
        angle = torch.arange(1, size + 1)[:, None] / (size + 1e-6) * 2 * math.pi / scale
        waves.append(torch.stack([angle[:, 0::2].sin(), angle[:, 1::2].cos()], dim=2).flatten(1))
    rows, columns = waves[0][:, None].expand(*shape, half), waves[1][None].expand(*shape, half)
    return torch.cat([rows, columns], dim=2).flatten(0, 1)


class NormedConv(nn.Module):
    """Convolution and GroupNorm."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, bias: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=bias)
        self.gn = nn.GroupNorm(GROUPS, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, h, w] -> [B, outputs, h, w]."""
        return self.gn(self.conv(x))


class EncoderLayer(nn.Module):
    """Deformable self-attention and a feed-forward network, each followed by its norm."""

    def __init__(self, dim: int, heads: int, ffn: int, shapes: Shapes) -> None:
        super().__init__()
        self.attn = DeformableAttention(dim, heads, shapes, cell_centres(shapes))
        self.norm1 = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, ffn)
        self.fc2 = nn.Linear(ffn, dim)
        self.norm2 = nn.LayerNorm(dim)

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        """[B, sum(h * w), C] -> the same."""
        x = self.norm1(x + self.attn(x + position, x))
        return self.norm2(x + self.fc2(F.relu(self.fc1(x))))


class PixelDecoder(nn.Module):
    """From the backbone's maps to memories at strides 32, 16, 8 and mask features at stride 4.

    Args:
        inputs: Channels of the backbone's maps.
        dim: Channels of the result.
        shapes: (height, width) of the maps at strides 4, 8, 16, 32.
    """

    positions: Tensor

    def __init__(self, inputs: int, dim: int, heads: int, layers: int, ffn: int, shapes: Shapes) -> None:
        super().__init__()
        self.shapes = shapes[:0:-1]  # strides 32, 16, 8
        self.input_convs = nn.ModuleList(NormedConv(inputs, dim, 1, bias=True) for _ in self.shapes)
        self.level_encoding = nn.Parameter(torch.zeros(len(self.shapes), dim))
        self.layers = nn.ModuleList(EncoderLayer(dim, heads, ffn, self.shapes) for _ in range(layers))
        self.lateral_conv = NormedConv(inputs, dim, 1, bias=False)
        self.output_conv = NormedConv(dim, dim, 3, bias=False)
        self.mask_feature = nn.Conv2d(dim, dim, 1)
        encoded = [sine_positions(shape, dim) for shape in self.shapes]
        self.register_buffer("positions", torch.cat(encoded), persistent=False)

    def forward(self, maps: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Maps of strides 4, 8, 16, 32 -> map [B, C, H / 4, W / 4], memories [B, h * w, C] of strides 32, 16, 8.

        ``mask_feature`` would make mask features of the map; the mask decoder applies it to its kernels instead.
        """
        sizes = [height * width for height, width in self.shapes]
        level = torch.cat([row.expand(size, -1) for row, size in zip(self.level_encoding, sizes, strict=True)])
        position = self.positions + level
        tokens = [conv(x).flatten(2) for conv, x in zip(self.input_convs, maps[:0:-1], strict=True)]
        x = torch.cat(tokens, dim=2).transpose(1, 2)
        for layer in self.layers:
            x = layer(x, position)
        memories = list(x.split(sizes, dim=1))
        coarse = memories[-1].transpose(1, 2).unflatten(2, self.shapes[-1])
        fine = self.lateral_conv(maps[0])
        fine = fine + F.interpolate(coarse, fine.shape[2:], mode="bilinear", align_corners=False)
        return F.relu(self.output_conv(fine)), memories
