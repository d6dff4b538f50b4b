"""An auxiliary per-pixel task, which speeds up learning from scratch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.vpp_eo import VppEo

BACKGROUND_WEIGHT = 0.1  # of a background pixel; most pixels are background
CENTRE_WEIGHT = 5.0  # of the distance to the object's centre


class PixelHead(nn.Module):
    """Class of each pixel at stride 8 and the way to its object's centre, from the final tokens.

    Speeds up learning from scratch, which set prediction alone makes slow; it is thrown away after training.
    """

    def __init__(self, model: VppEo) -> None:
        super().__init__()
        self.patch_grid = model.patch_grid
        self.classes = len(model.config.classes) + 1
        self.predict = nn.Linear(model.config.embed_dim, 4 * (self.classes + 2))

    def loss(self, tokens: Tensor, label_map: Tensor, centre_map: Tensor) -> Tensor:
        """Cross entropy, and distance to the centre in units of the frame height, of tokens [B, N, C].

        Args:
            label_map: Class index int64 [B, H / 8, W / 8]; the last is background.
            centre_map: Offset (x, y) from a pixel to the centre of its object, float [B, 2, H / 8, W / 8].
        """
        grid = self.predict(tokens).unflatten(-1, (-1, 2, 2)).unflatten(1, self.patch_grid)
        pixels = grid.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3).float()
        weight = torch.ones(self.classes)
        weight[-1] = BACKGROUND_WEIGHT
        classes, centres = pixels.split((self.classes, 2), dim=1)
        on_object = (label_map < self.classes - 1).unsqueeze(1)
        distance = ((centres - centre_map).abs() * on_object).sum() / on_object.sum().clamp(min=1)
        return F.cross_entropy(classes, label_map, weight) + CENTRE_WEIGHT * distance
