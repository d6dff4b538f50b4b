"""Losses of the encoder-only host: set prediction over a clip, and the keep-ratio terms of the selectors."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

CLASS_WEIGHT, MASK_WEIGHT, DICE_WEIGHT, NO_OBJECT_WEIGHT = 2.0, 5.0, 5.0, 0.1  # Mask2Former's, as VPP uses them
RATIO_WEIGHT, MAP_RATIO_WEIGHT, MAP_RATIO_TARGET = 40.0, 10.0, 0.5  # Video Patch Pruning, arXiv:2604.00827


@dataclass
class Identities:
    """Which query carries which object of one clip; grows as objects appear.

    An object keeps the query that it was matched to first, for the whole clip; a new object is matched among the
    queries that no other object holds, so that a query's index is an identity at inference.
    """

    query_of: dict[int, int] = field(default_factory=dict)

    def match(self, cost: Tensor, objects: list[int]) -> list[int | None]:
        """Query of each object in ``objects``, None once no query is free; ``cost`` is float [Q, len(objects)]."""
        new = [column for column, name in enumerate(objects) if name not in self.query_of]
        taken = set(self.query_of.values())
        free = [query for query in range(cost.shape[0]) if query not in taken]
        values = np.nan_to_num(cost.detach().float().cpu().numpy(), nan=1e4, posinf=1e4, neginf=-1e4)
        rows, columns = linear_sum_assignment(values[np.ix_(free, new)])
        for row, column in zip(rows, columns, strict=True):
            self.query_of[objects[new[column]]] = free[row]
        return [self.query_of.get(name) for name in objects]

    def forget(self) -> None:
        """Start anew, as the runtime does after a scene cut."""
        self.query_of.clear()


def pairwise_cost(class_logits: Tensor, mask_logits: Tensor, labels: Tensor, masks: Tensor) -> Tensor:
    """Matching cost [Q, O] of queries (class_logits [Q, classes + 1], mask_logits [Q, h, w]) and objects.

    Args:
        labels: int64 [O].
        masks: float [O, h, w] in [0, 1].
    """
    pixels = mask_logits.flatten(1)
    targets = masks.flatten(1)
    count = pixels.shape[1]
    positive = F.softplus(-pixels) @ targets.T  # cross entropy where the object is
    negative = F.softplus(pixels) @ (1.0 - targets).T
    probability = pixels.sigmoid()
    overlap = 2.0 * probability @ targets.T
    dice = 1.0 - (overlap + 1.0) / (probability.sum(1)[:, None] + targets.sum(1)[None] + 1.0)
    likelihood = class_logits.softmax(-1)[:, labels]
    return MASK_WEIGHT * (positive + negative) / count + DICE_WEIGHT * dice - CLASS_WEIGHT * likelihood


def dice_loss(mask_logits: Tensor, masks: Tensor) -> Tensor:
    """1 - Dice overlap per object [O] of mask_logits and masks, both [O, h, w]."""
    probability = mask_logits.sigmoid().flatten(1)
    targets = masks.flatten(1)
    return 1.0 - (2.0 * (probability * targets).sum(1) + 1.0) / (probability.sum(1) + targets.sum(1) + 1.0)


def set_loss(class_logits: Tensor, mask_logits: Tensor, queries: list[int], labels: Tensor, masks: Tensor) -> Tensor:
    """Weighted class, mask and Dice loss of one frame whose object i is carried by query ``queries[i]``.

    Args:
        class_logits: [Q, classes + 1].
        mask_logits: [Q, h, w].
        labels: int64 [O].
        masks: float [O, h, w] in [0, 1].
    """
    classes = class_logits.shape[1] - 1
    target = torch.full((class_logits.shape[0],), classes, device=labels.device)
    target[queries] = labels
    weight = torch.ones(classes + 1, device=labels.device)
    weight[-1] = NO_OBJECT_WEIGHT
    loss = CLASS_WEIGHT * F.cross_entropy(class_logits, target, weight)
    if queries:
        matched = mask_logits[queries]
        loss = loss + MASK_WEIGHT * F.binary_cross_entropy_with_logits(matched, masks)
        loss = loss + DICE_WEIGHT * dice_loss(matched, masks).mean()
    return loss


def ratio_loss(map_probability: Tensor | None, stage_masks: list[Tensor], targets: list[float]) -> Tensor:
    """Pull the two-logit decisions to their keep ratios, so that the ``threshold`` mode keeps about as many.

    Args:
        map_probability: Map-SM's soft keep probability [B, N], or None on a frame without a prior.
        stage_masks: Straight-through keep decision [B, N] of each selective module.
        targets: Keep ratio of each selective module.

    Source: methods of arXiv:2604.00827: Map-SM's mean is pulled to 0.5 whatever its keep ratio, with weight 10;
    the sum is divided by the sum of weights and multiplied by 40.
    """
    terms = [(mask.mean() - target) ** 2 for mask, target in zip(stage_masks, targets, strict=True)]
    weights = float(len(terms))
    if map_probability is not None:
        terms.append(MAP_RATIO_WEIGHT * (map_probability.mean() - MAP_RATIO_TARGET) ** 2)
        weights += MAP_RATIO_WEIGHT
    return RATIO_WEIGHT * torch.stack(terms).sum() / weights


def focus_loss(scores: list[Tensor], object_patches: Tensor) -> Tensor:
    """Cross entropy between the stages' scores and where objects are.

    Not part of the published recipe, where selectors learn through the task alone. Measured with untrained
    selectors on a dense ``vpp-eo-nano``: through the task, with this loss added at weight 40, the stage at block 3 kept
    37 % of the object patches at a keep ratio of 0.55 after 300 steps (chance: 56 %). With this loss alone the four
    stages kept 99, 99, 99 and 95 % after 60 steps (``docs/accuracy.md``).

    Args:
        scores: Ranking score [B, N] of each stage; above 0 is "keep".
        object_patches: Patches that hold a part of an object, bool [B, N].
    """
    target = object_patches.float()
    return torch.stack([F.binary_cross_entropy_with_logits(score.float(), target) for score in scores]).mean()


def distillation_loss(
    class_logits: Tensor, mask_logits: Tensor, features: Tensor, teacher: tuple[Tensor, Tensor, Tensor]
) -> Tensor:
    """How far a pruned frame is from the dense network's: classes, masks and final features, summed.

    Query q of one is query q of the other, since the pruned network starts from the dense one's weights. Classes:
    Kullback-Leibler divergence of each query, object queries counting as much as all others together. Masks: cross
    entropy against the teacher's probabilities, weighted by how sure the teacher is of an object. Features: mean
    squared difference after LayerNorm, over all tokens, those that were dropped too.

    Args:
        class_logits: [B, Q, classes + 1].
        mask_logits: [B, Q, h, w].
        features: [B, N, C].
        teacher: The same three of the dense network.
    """
    classes, masks, wanted = (value.detach().float() for value in teacher)
    probability = classes.softmax(-1)
    is_object = 1.0 - probability[..., -1]  # [B, Q]
    divergence = F.kl_div(class_logits.float().log_softmax(-1), probability, reduction="none").sum(-1)
    rest = 1.0 - is_object
    loss = (divergence * is_object).sum() / is_object.sum().clamp(min=1.0)
    loss = loss + (divergence * rest).sum() / rest.sum().clamp(min=1.0)
    entropy = F.binary_cross_entropy_with_logits(mask_logits.float(), masks.sigmoid(), reduction="none").mean((2, 3))
    loss = loss + MASK_WEIGHT * (entropy * is_object).sum() / is_object.sum().clamp(min=1.0)
    width = features.shape[-1:]
    return loss + F.mse_loss(F.layer_norm(features.float(), width), F.layer_norm(wanted, width))
