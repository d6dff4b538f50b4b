"""What all hosts of Video Patch Pruning share: the selectors, how a stage chooses, and the prior for the next frame.

Source: arXiv:2604.00827; a host is the network around it, e.g. :mod:`models.vpp_eo` or :mod:`models.vpp_rovis`.
"""

from __future__ import annotations

from enum import Enum
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from typing_extensions import Self

from models import selection
from models.token_subset import TokenSubset
from models.vit import Mlp
from runtime.budget import BudgetRule
from runtime.manifest import TrackerSettings, TrackQuerySettings

PUBLISHED_POOL_RADIUS = 4  # 9 x 9 patches


class Selection(str, Enum):
    """How a selection stage decides."""

    BUDGET = "budget"  # the K highest scores at every stage, K from ``token_budget``
    THRESHOLD = "threshold"  # Map-SM by K; the selective modules keep where the keep logit wins (published)
    NONE = "none"  # no selection operator at all: the dense network


class Prior(Protocol):
    """The part of a host's state that Map-SM reads.

    Attributes:
        keys: Tokens before the first pruned block, [B, N, C].
        keep_logits: Keep and drop logit of each token's deep features, [B, N, 2]; zero where not kept.
        kept: Tokens that were still computed at the prior block, bool [B, N].
    """

    @property
    def keys(self) -> Tensor:
        """[B, N, C]."""

    @property
    def keep_logits(self) -> Tensor:
        """[B, N, 2]."""

    @property
    def kept(self) -> Tensor:
        """bool [B, N]."""


class Outputs(NamedTuple):
    """What one frame gives, whatever the host.

    Attributes:
        class_logits: [B, Q, classes + 1]; the last is "no object".
        mask_logits: [B, Q, H / 4, W / 4]; a pixel belongs to the query where it is positive.
        kept_stages: int64 [B, N], selection stages that each token passed, 0..S.
        tokens_kept: int64 [B, S], tokens that each stage kept.
        state_ok: bool [B], the next state is finite and keeps at least one token.
    """

    class_logits: Tensor
    mask_logits: Tensor
    kept_stages: Tensor
    tokens_kept: Tensor
    state_ok: Tensor


class KeepPredictor(nn.Module):
    """Two logits per token, keep and drop, from its features."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, hidden, 2)

    def forward(self, x: Tensor) -> Tensor:
        """[B, K, C] -> [B, K, 2]."""
        return self.mlp(self.norm(x))


class MapSelector(nn.Module):
    """Map-SM: each token takes the keep logits of the most similar token of the frame before.

    The published module copies deep features along the association and then applies LayerNorm and MLP. Both act on
    each row alone, so they commute with the copy: the logits are computed once, at frame t-1, and two numbers per
    token are carried instead of C.
    """

    distance_table: Tensor
    distance_rows: Tensor
    row_pool: Tensor
    column_pool: Tensor

    def __init__(
        self, dim: int, patch_grid: tuple[int, int], hidden: int | None = None, radius: int = PUBLISHED_POOL_RADIUS
    ) -> None:
        super().__init__()
        self.predictor = KeepPredictor(dim, dim // 2 if hidden is None else hidden)
        self.register_buffer("distance_table", selection.distance_table(patch_grid), persistent=False)
        self.register_buffer("distance_rows", selection.distance_rows(patch_grid), persistent=False)
        for name, size in zip(("row", "column"), patch_grid, strict=True):
            self.register_buffer(f"{name}_pool", selection.mean_pool_matrix(size, radius), persistent=False)

    def similarity(self, tokens: Tensor, keys: Tensor, bias: Tensor) -> Tensor:
        """Association logits fp32 [B, K, N], see :func:`models.selection.association_logits`."""
        return selection.association_logits(tokens, keys, bias)

    def association(self, tokens: Tensor, state: Prior) -> Tensor:
        """Association logits fp32 [B, N, N] of the tokens with those of the frame before."""
        bias = selection.distance_bias(self.distance_table, self.distance_rows, state.kept)
        return self.similarity(tokens, state.keys, bias).transpose(1, 2)

    def smooth(self, scores: Tensor) -> Tensor:
        """Mean of the scores [B, N] over a window of patches."""
        return selection.smooth_scores(scores, self.row_pool, self.column_pool)

    def forward(self, tokens: Tensor, state: Prior, key_rows: int | None = None) -> Tensor:
        """Ranking score [B, N], fp32, of tokens [B, N, C].

        Args:
            key_rows: Rows of patches that hold as many tokens as were kept, or more: only so many keys are compared
                with, which changes nothing. If more were kept, those that score highest. None: all N.
        """
        columns = self.distance_table.shape[1]
        keys, kept, scores, rows = state.keys, state.kept, selection.keep_score(state.keep_logits), self.distance_rows
        if key_rows is not None:
            chosen = selection.top_tokens(torch.where(kept, scores, float("-inf")), key_rows * columns)
            keys, kept, scores = (selection.gather_tokens(x, chosen) for x in (keys, kept, scores))
            rows = rows.index_select(0, chosen.flatten()).unflatten(0, chosen.shape)  # [B, K, h]
        bias = selection.distance_bias(self.distance_table, rows, kept)
        matches = selection.most_similar(self.similarity(tokens, keys, bias), columns)
        return self.smooth(selection.gather_tokens(scores, matches))


class PrunedHost(nn.Module):
    """A network with a Map-SM and selective modules; one step is a pure function of image, state and budget.

    A subclass has a ``config`` that names the blocks of the stages; one that selects as published builds
    ``map_selector`` and ``selectors``.

    Attributes:
        state_type: Named tuple of what one frame leaves to the next; has the fields of :class:`Prior`.
        outputs_type: Named tuple of what one frame gives; has the fields of :class:`Outputs`.
        dense_state: Fields of the state that the network carries without any selection.
        host_state: Fields that the program around the graph writes between two frames, each with the output that it
            takes them from, or None.
        has_inner_decisions: The network decides about more than tokens, so that rounding may show beyond itself.
        compares_all: Map-SM compares with all N patches of the frame before, as published. False in use: with as many
            as the budget keeps at the prior block. That finds the same, except in the frame after the budget was
            lowered, which compares with those that scored highest.
        inner_margin: Where those decisions cut instead of at 0, over the largest value; 0 in use. A parity check moves
            it a little to see how far near-ties carry.
    """

    state_type: ClassVar[Any]
    outputs_type: ClassVar[Any] = Outputs
    dense_state: ClassVar[tuple[str, ...]]
    host_state: ClassVar[dict[str, str | None]] = {}
    has_inner_decisions: ClassVar[bool] = False
    compares_all: bool = False
    inner_margin: float = 0.0
    config: Any
    patch_grid: tuple[int, int]
    map_selector: MapSelector
    selectors: nn.ModuleList

    @property
    def patch_count(self) -> int:
        """Patch tokens N of one image."""
        return self.patch_grid[0] * self.patch_grid[1]

    @property
    def budget_rule(self) -> BudgetRule:
        """Which budgets the network takes."""
        return BudgetRule(self.patch_count, self.config.stages)

    @property
    def has_decisions(self) -> bool:
        """Whether a stage can decide by itself; a score that only ranks has no threshold."""
        return True

    @property
    def selection_summary(self) -> str:
        """In words: what decides which patches are computed, and what stands for those that are not."""
        return "vpp, dropped tokens stale"

    def state_fields(self, mode: Selection) -> tuple[str, ...]:
        """Fields of the state that one step in this mode reads and writes."""
        return self.dense_state if mode is Selection.NONE else tuple(self.state_type._fields)

    @property
    def has_selectors(self) -> bool:
        """Whether the weights of the selectors were trained; without them the network only runs dense."""
        return True

    def initial_state(self, batch: int) -> Any:
        """The state of a stream that has seen nothing."""
        raise NotImplementedError

    def at_image_size(self, image_size: tuple[int, int]) -> Self:
        """A copy of the network for another image size (height, width).

        Raises:
            ImageSizeError: The network's strides do not divide the image size.
        """
        raise NotImplementedError

    def tracker_settings(self) -> TrackerSettings | TrackQuerySettings:
        """How the outputs become tracks, for the manifest."""
        return TrackerSettings()

    def example_tracks(self, outputs: Any, state: Any) -> Any:
        """The next state as a tracker might hand it on, for checks of a graph; the same where the graph writes all."""
        return state

    def stage_scores(self, stage: int, tokens: Tensor, state: Prior, token_budget: Tensor | None = None) -> Tensor:
        """Ranking score fp32 [B, K] of the tokens [B, K, C] that stage ``stage`` chooses from.

        Args:
            token_budget: int64 [stages], where all stages keep to it: Map-SM then compares with no more tokens of the
                frame before than this one keeps at the prior block, see :attr:`compares_all`.
        """
        if stage == 0:
            return self.map_selector(tokens, state, self._key_rows(token_budget))
        return selection.keep_score(self.selectors[stage - 1](tokens))

    def association(self, tokens: Tensor, state: Prior) -> Tensor | None:
        """Map-SM's similarities [B, N, N] of the tokens with those of the frame before; None without a Map-SM."""
        return self.map_selector.association(tokens, state)

    def choose(
        self, stage: int, subset: TokenSubset, scores: Tensor, token_budget: Tensor | None, mode: Selection
    ) -> Tensor:
        """Positions int64 [B, K] within the subset's tokens that stay, by their scores [B, tokens]."""
        if mode is Selection.THRESHOLD and stage > 0:
            return selection.kept_tokens(scores)
        assert token_budget is not None
        return selection.top_tokens(scores, count_of(token_budget[stage], subset.tokens.shape[1]))

    def _key_rows(self, token_budget: Tensor | None) -> int | None:
        """Rows of the patch grid that hold the tokens which this budget keeps at the prior block; None: all rows."""
        kept_at_reset = self.config.prior_stage < self.budget_rule.reset_stages  # then a first frame keeps all there
        if token_budget is None or kept_at_reset or self.compares_all:
            return None
        rows, columns = self.patch_grid
        return count_of((token_budget[self.config.prior_stage] + columns - 1) // columns, rows)

    def prior(self, subset: TokenSubset) -> tuple[Tensor, Tensor]:
        """Keep logits [B, N, 2] and kept tokens bool [B, N] for the next frame, from the tokens at the prior block."""
        logits = self.map_selector.predictor(subset.tokens)
        if subset.indices is None:
            return logits, torch.ones_like(logits[..., 0], dtype=torch.bool)
        dense = logits.new_zeros(*subset.kept_stages.shape, 2)
        return selection.scatter_tokens(dense, subset.indices, logits), subset.kept_stages > self.config.prior_stage

    def token_counts(self, subset: TokenSubset, mode: Selection) -> tuple[Tensor, Tensor]:
        """``kept_stages`` and ``tokens_kept`` of :class:`Outputs`; without selection every token passes every stage."""
        stages = self.config.stages
        kept_stages = subset.kept_stages if mode is not Selection.NONE else subset.kept_stages + stages
        counts = (kept_stages.unsqueeze(2) > torch.arange(stages, device=kept_stages.device)).sum(1)
        return kept_stages, counts


def state_ok(state: Prior, carried: Tensor, mode: Selection) -> Tensor:
    """Finite and not empty, bool [B]. A sum is NaN or infinite if one of its terms is.

    Args:
        carried: What else goes to the next frame, [B, Q, C].
    """
    total = carried.float().sum((1, 2))
    if mode is Selection.NONE:
        return total.abs() < float("inf")
    for name in ("keys", "keep_logits", "final"):
        if (value := getattr(state, name, None)) is not None:
            total = total + value.float().sum((1, 2))
    finite = total.abs() < float("inf")
    return finite if state.kept is None else finite & state.kept.any(1)


def count_of(entry: Tensor, available: int) -> int:
    """A budget entry as a size that stays dynamic in the exported graph."""
    count = entry.item()
    torch._check(count >= 1)
    torch._check(count <= available)
    return count
