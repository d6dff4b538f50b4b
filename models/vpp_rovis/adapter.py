"""ViT-Adapter (arXiv:2205.08534): a convolutional side branch that exchanges features with a plain ViT."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.vpp_rovis.deformable import DeformableAttention, Shapes, cell_centres


def side_shapes(patch_grid: tuple[int, int]) -> Shapes:
    """Maps of the side branch at strides 8, 16 and 32."""
    rows, columns = patch_grid
    return ((2 * rows, 2 * columns), (rows, columns), (rows // 2, columns // 2))


class SpatialPrior(nn.Module):
    """Convolutions from the image to maps of strides 4, 8, 16 and 32."""

    def __init__(self, dim: int, stem_dim: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            *_conv(3, stem_dim, 2), *_conv(stem_dim, stem_dim, 1), *_conv(stem_dim, stem_dim, 1),
            nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
        )  # fmt: skip
        self.conv2 = nn.Sequential(*_conv(stem_dim, 2 * stem_dim, 2))
        self.conv3 = nn.Sequential(*_conv(2 * stem_dim, 4 * stem_dim, 2))
        self.conv4 = nn.Sequential(*_conv(4 * stem_dim, 4 * stem_dim, 2))
        self.fc1 = nn.Conv2d(stem_dim, dim, 1)
        self.fc2 = nn.Conv2d(2 * stem_dim, dim, 1)
        self.fc3 = nn.Conv2d(4 * stem_dim, dim, 1)
        self.fc4 = nn.Conv2d(4 * stem_dim, dim, 1)

    def forward(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Normalised image [B, 3, H, W] -> map of stride 4 [B, C, h, w], tokens [B, h * w, C] of strides 8, 16, 32."""
        c1 = self.stem(image)
        c2 = self.conv2(c1)
        c3 = self.conv3(c2)
        c4 = self.conv4(c3)
        tokens = [fc(x).flatten(2).transpose(1, 2) for fc, x in ((self.fc2, c2), (self.fc3, c3), (self.fc4, c4))]
        return self.fc1(c1), tokens


def _conv(inputs: int, outputs: int, stride: int) -> tuple[nn.Module, nn.Module, nn.Module]:
    return (
        nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class Injector(nn.Module):
    """Patch tokens read from the side branch, through a learned gate."""

    def __init__(self, dim: int, heads: int, patch_grid: tuple[int, int]) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(dim, eps=1e-6)
        self.feat_norm = nn.LayerNorm(dim, eps=1e-6)
        self.attn = DeformableAttention(dim, heads, side_shapes(patch_grid), cell_centres((patch_grid,)))
        self.gamma = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor, side: Tensor) -> Tensor:
        """Patch tokens [B, N, C] and side tokens [B, 21 N / 4, C] -> patch tokens."""
        query = self.query_norm(x)
        return x + self.gamma * (self.attn(query, self.feat_norm(side)) + query)  # mmcv's operator adds its query


class Extractor(nn.Module):
    """Side tokens read from the patch tokens, then a convolutional feed-forward network."""

    def __init__(self, dim: int, heads: int, patch_grid: tuple[int, int]) -> None:
        super().__init__()
        shapes = side_shapes(patch_grid)
        self.query_norm = nn.LayerNorm(dim, eps=1e-6)
        self.feat_norm = nn.LayerNorm(dim, eps=1e-6)
        self.attn = DeformableAttention(dim, heads, (patch_grid,), cell_centres(shapes))
        self.ffn_norm = nn.LayerNorm(dim, eps=1e-6)
        self.ffn = ConvFfn(dim, dim // 4, shapes)

    def forward(self, side: Tensor, x: Tensor) -> Tensor:
        """Side tokens [B, 21 N / 4, C] and patch tokens [B, N, C] -> side tokens."""
        query = self.query_norm(side)
        side = side + self.attn(query, self.feat_norm(x)) + query  # mmcv's operator adds its query
        return side + self.ffn(self.ffn_norm(side))


class ConvFfn(nn.Module):
    """Feed-forward network with a depthwise 3 x 3 convolution, the same on each map, inside."""

    def __init__(self, dim: int, hidden: int, shapes: Shapes) -> None:
        super().__init__()
        self.shapes = shapes
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, sum(h * w), C] -> the same."""
        hidden = self.fc1(x).transpose(1, 2).split([height * width for height, width in self.shapes], dim=2)
        maps = [part.unflatten(2, shape) for part, shape in zip(hidden, self.shapes, strict=True)]
        mixed = [self.dwconv(part).flatten(2) for part in maps]
        return self.fc2(F.gelu(torch.cat(mixed, dim=2).transpose(1, 2)))


class Interaction(nn.Module):
    """One exchange around a run of ViT blocks: inject before it, extract after it."""

    def __init__(self, dim: int, heads: int, patch_grid: tuple[int, int], extra_extractors: int) -> None:
        super().__init__()
        self.injector = Injector(dim, heads, patch_grid)
        self.extractor = Extractor(dim, heads, patch_grid)
        self.extra_extractors = nn.ModuleList(Extractor(dim, heads, patch_grid) for _ in range(extra_extractors))

    def extract(self, side: Tensor, x: Tensor) -> Tensor:
        """Side tokens after all extractors."""
        side = self.extractor(side, x)
        for extractor in self.extra_extractors:
            side = extractor(side, x)
        return side
