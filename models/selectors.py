"""Other ways than VPP's of deciding which patches are computed, behind the same budget and state.

======================  ====================================================================================
``svit``                the image alone, two-layer gates from block 3 on (SViT, arXiv:2306.07050)
``dynamicvit``          the image alone, predictors with a global half, from block 3 on (arXiv:2106.02034)
``masks``               what the frame before took for objects, dilated (the idea of MaskVD, arXiv:2407.12067)
``difference``          how much a token has changed since the frame before
``random``              chance, drawn from a state of its own, so that a graph stays deterministic
======================  ====================================================================================

All are nested at blocks 1, 3, 6 and 9, as VPP's stages are: SViT's own gates may take a dropped token back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import selection
from models.pruned_host import KeepPredictor

PATCH_CELLS = 4  # a patch of 16 pixels is 4 x 4 cells of the mask logits
NOTHING = -20.0  # mask logit where no object is
_MULTIPLIER, _MODULUS = 48271, 2**31 - 1  # Park and Miller's minimal standard generator, 1993 constants


class SelectorState(Protocol):
    """The part of the state that these selectors read; see :class:`models.vpp_eo.State`."""

    @property
    def keys(self) -> Tensor:
        """[B, N, C]."""

    @property
    def focus(self) -> Tensor:
        """[B, N]."""

    @property
    def draw(self) -> Tensor:
        """int64 [B, N]."""


@dataclass(frozen=True)
class Ranking:
    """What a frame knows of its tokens before the first of them is dropped.

    Attributes:
        scores: [B, N] for all stages; None where each stage scores the tokens that it finds.
        refreshed: bool [B, N], tokens that have waited longest and pass every stage; None without a refresh share.
    """

    scores: Tensor | None
    refreshed: Tensor | None


class Selector(nn.Module):
    """Scores tokens; one of the two methods is a subclass's."""

    def frame_scores(self, tokens: Tensor, state: SelectorState) -> Tensor | None:
        """Scores fp32 [B, N] for all stages, from the tokens [B, N, C] before the first of them."""
        return None

    def stage_scores(self, stage: int, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Scores fp32 [B, K] of the tokens [B, K, C] that stage ``stage``, from 1, chooses from.

        Args:
            mask: In the form that trains, where no token is removed: 1 for those still there, else 0, [B, N].
        """
        raise NotImplementedError


class ImageGates(Selector):
    """SViT's gates: a two-layer network on each token at the stages after the first."""

    def __init__(self, dim: int, stages: int) -> None:
        super().__init__()
        self.predictors = nn.ModuleList(KeepPredictor(dim, dim // 4) for _ in range(stages - 1))

    def stage_scores(self, stage: int, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Difference of the keep and the drop logit."""
        return selection.keep_score(self.predictors[stage - 1](tokens))


class GlobalPredictor(nn.Module):
    """DynamicViT's predictor: half of the channels of a token, half of the mean over the tokens."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.expand = nn.Linear(dim, dim)
        self.first = nn.Linear(dim, dim // 2)
        self.second = nn.Linear(dim // 2, dim // 4)
        self.last = nn.Linear(dim // 4, 2)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, K, C] -> keep and drop logit [B, K, 2]; the mean is over the tokens where ``mask`` [B, K] is 1."""
        local, other = F.gelu(self.expand(self.norm(x))).chunk(2, dim=2)
        if mask is None:
            mean = other.mean(1, keepdim=True)
        else:
            weight = mask.detach().unsqueeze(2)
            mean = (other * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True)
        x = torch.cat([local, mean.expand_as(other)], dim=2)
        return self.last(F.gelu(self.second(F.gelu(self.first(x)))))


class GlobalGates(ImageGates):
    """DynamicViT's predictors at the stages after the first; the mean is over the tokens that are still there."""

    def __init__(self, dim: int, stages: int) -> None:
        super().__init__(dim, stages)
        self.predictors = nn.ModuleList(GlobalPredictor(dim) for _ in range(stages - 1))

    def stage_scores(self, stage: int, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Difference of the keep and the drop logit."""
        return selection.keep_score(self.predictors[stage - 1](tokens, mask))


class PreviousMasks(Selector):
    """Largest mask logit of an object of the frame before in and around the patch."""

    def frame_scores(self, tokens: Tensor, state: SelectorState) -> Tensor:
        """The state's focus."""
        return state.focus.float()


class FrameDifference(Selector):
    """Mean change of a token's features since the frame before."""

    def frame_scores(self, tokens: Tensor, state: SelectorState) -> Tensor:
        """Mean over the channels."""
        return (tokens.float() - state.keys.float()).abs().mean(2)


class RandomDraw(Selector):
    """A number in (0, 1) for each token, anew in each frame."""

    def frame_scores(self, tokens: Tensor, state: SelectorState) -> Tensor:
        """The state's draw."""
        return state.draw.float() / _MODULUS


def make_selector(name: str, dim: int, stages: int) -> Selector:
    """The selector of that name, ``vpp`` excepted, which the host itself has."""
    if name in ("svit", "dynamicvit"):
        return (ImageGates if name == "svit" else GlobalGates)(dim, stages)
    return {"masks": PreviousMasks, "difference": FrameDifference, "random": RandomDraw}[name]()


# --- what the state becomes -----------------------------------------------------------------------------------------


def mask_focus(class_logits: Tensor, mask_logits: Tensor) -> Tensor:
    """Largest mask logit of any object in a patch and its eight neighbours, [B, N].

    Args:
        class_logits: [B, Q, classes + 1]; the last is "no object".
        mask_logits: [B, Q, H / 4, W / 4].
    """
    is_object = class_logits[..., :-1].amax(2) > class_logits[..., -1]
    shown = torch.where(is_object[:, :, None, None], mask_logits, NOTHING).amax(1, keepdim=True)
    patches = F.max_pool2d(shown, PATCH_CELLS)
    return F.max_pool2d(patches, 3, stride=1, padding=1).flatten(1)


def first_draw(patch_count: int) -> Tensor:
    """Where the random numbers of each token start, int64 [N] in 1..2^31 - 2."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, _MODULUS, (patch_count,), generator=generator)


def next_draw(draw: Tensor) -> Tensor:
    """The number after ``draw``, int64."""
    return draw * _MULTIPLIER % _MODULUS


class Refresh(nn.Module):
    """Which tokens have waited longest since they last passed every stage.

    Ranked by ``age * N + order``, exact in fp32 as long as the age stays below :attr:`oldest`; the order of equal ages
    is fixed and mixed, so that a refreshed token's neighbours are refreshed at other times.
    """

    order: Tensor

    def __init__(self, patch_count: int, percent: int) -> None:
        super().__init__()
        self.percent = percent
        self.oldest = 2**24 // patch_count - 1
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("order", torch.randperm(patch_count, generator=generator).float(), persistent=False)

    def ranks(self, age: Tensor) -> Tensor:
        """Distinct integers in fp32 [B, N]; the oldest is the largest."""
        return age * self.order.shape[0] + self.order

    def count(self, last_count: int | Tensor) -> int | Tensor:
        """Tokens that are refreshed, of the ``last_count`` that the last stage keeps."""
        return last_count * self.percent // 100

    def next_age(self, age: Tensor, passed: Tensor) -> Tensor:
        """Frames since each token last passed every stage, [B, N]."""
        return torch.where(passed, 0.0, (age + 1.0).clamp(max=float(self.oldest)))
