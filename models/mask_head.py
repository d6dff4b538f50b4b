"""The mask head of the encoder-only host: class and mask logits of queries over a dense token map."""

from __future__ import annotations

from torch import Tensor, nn

from models.configs import VppEoConfig
from models.vit import Mlp


class CellLinear(nn.Linear):
    """A linear map of each token to the 2 x 2 pixels of its cell, channels last, so that whole pixels move.

    Rows of the weight are [M, 2, 2], those of a transposed convolution; as [2, 2, M] in a graph, which stores them so.
    """

    def __init__(self, dim: int, channels: int, patch_grid: tuple[int, int]) -> None:
        super().__init__(dim, 4 * channels)
        self.patch_grid = patch_grid

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [B, h * w, C] -> map [B, 2h, 2w, M]."""
        weight, bias = (x.unflatten(0, (-1, 4)).transpose(0, 1).flatten(0, 1) for x in (self.weight, self.bias))
        cells = nn.functional.linear(tokens, weight, bias).unflatten(2, (2, 2, -1)).unflatten(1, self.patch_grid)
        return cells.transpose(2, 3).flatten(3, 4).flatten(1, 2)  # [B, h, w, 2, 2, M] -> [B, 2h, 2w, M]


class MaskHead(nn.Module):
    """Class logits and stride-4 mask logits of queries over a dense token map.

    Tokens are brought to stride 8 once; each query then gives four kernels, one for each pixel of a 2 x 2 cell at
    stride 4. That equals another linear upsampling followed by a product with one kernel, at half of the work,
    because the two linear maps commute.
    """

    def __init__(self, config: VppEoConfig, patch_grid: tuple[int, int]) -> None:
        super().__init__()
        dim, mask_dim = config.embed_dim, config.mask_dim
        self.feature_grid = 2 * patch_grid[0], 2 * patch_grid[1]
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.upsample = CellLinear(dim, mask_dim, patch_grid)
        self.refine = nn.Conv2d(mask_dim, mask_dim, kernel_size=3, padding=1, groups=mask_dim)
        self.kernels = Mlp(dim, dim, 4 * mask_dim)
        self.classify = nn.Linear(dim, len(config.classes) + 1)

    def features(self, tokens: Tensor) -> Tensor:
        """Dense tokens [B, N, C] -> mask features [B, P, M] of the P = H / 8 * W / 8 pixels."""
        x = self.upsample(self.norm(tokens))
        refined = self.refine(nn.functional.gelu(x).permute(0, 3, 1, 2))  # [B, 2h, 2w, M] -> [B, M, 2h, 2w]
        # added as rows of pixels: OpenVINO would bring two maps into another layout first
        return x.flatten(1, 2) + refined.permute(0, 2, 3, 1).flatten(1, 2)

    def forward(self, tokens: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Dense tokens [B, N, C] and queries [B, Q, C] -> class logits, mask logits."""
        queries = self.norm(queries)
        features = self.features(tokens)
        kernels = self.kernels(queries).unflatten(-1, (4, -1)).flatten(1, 2)  # [B, Q * 4, M]
        logits = kernels @ features.transpose(1, 2)  # [B, Q * 4, P]
        return self.classify(queries), nn.functional.pixel_shuffle(logits.unflatten(2, self.feature_grid), 2)
