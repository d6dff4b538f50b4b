"""What a training clip shows, in the forms that the losses take."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from models.training.losses import Identities
from models.training.youtube_vis import Target

PATCH = 16  # pixels, of every configuration


class ClipTargets:
    """The targets of one training clip of T frames with O objects.

    Args:
        target: Labels, and masks at the size of the picture.
        classes: How many there are; that number stands for background.

    Attributes:
        labels: int64 [O].
        masks: Share of each cell that an object covers, float [O, T, H / 4, W / 4].
        visible: Whether an object is seen at all, bool [O, T].
        label_maps: Class of each cell, int64 [T, H / 8, W / 8].
        centre_maps: Way (x, y) from each cell to the centre of its object, in units of H, float [T, 2, H / 8, W / 8].
        object_patches: Patches that hold a part of an object, bool [T, N].
        identities: Which query carries which object.
    """

    def __init__(self, target: Target, classes: int) -> None:
        masks = target["masks"].float()
        self.labels = target["labels"]
        self.masks = F.avg_pool2d(masks, 4) if len(masks) else masks.new_zeros(0, *masks.shape[1:2], 1, 1)
        self.visible = masks.flatten(2).any(2)  # [O, T]
        frames, height, width = masks.shape[1:]
        self.label_maps = torch.full((frames, height // 8, width // 8), classes)
        self.centre_maps = torch.zeros(frames, 2, height // 8, width // 8)
        for label, mask in zip(self.labels, masks, strict=True):
            small = F.avg_pool2d(mask, 8)
            self.label_maps[small > 0.5] = label
            self.centre_maps = torch.where((small > 0.5).unsqueeze(1), _to_centre(small), self.centre_maps)
        covered = masks.any(0) if len(masks) else masks.new_zeros(frames, height, width)
        self.object_patches = F.max_pool2d(covered.float().unsqueeze(1), PATCH).flatten(1) > 0  # [T, N]
        self.identities = Identities()


def _to_centre(mask: Tensor) -> Tensor:
    """Offset (x, y) of each pixel to the centre of mass of mask [T, h, w], in units of h: [T, 2, h, w]."""
    height, width = mask.shape[1:]
    place = torch.stack(torch.meshgrid(torch.arange(width), torch.arange(height), indexing="xy")) / height
    mass = mask.sum((1, 2)).clamp(min=1e-6)
    return torch.einsum("thw,chw->tc", mask, place)[:, :, None, None] / mass[:, None, None, None] - place
