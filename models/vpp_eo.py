"""VPP in an encoder-only host: a plain ViT whose last blocks also carry the object queries.

Ideas: patch selection from the frame before, Video Patch Pruning (arXiv:2604.00827); queries as tokens of a plain
ViT, EoMT (arXiv:2503.19108); queries handed on from frame to frame, VidEoMT.

One step is a pure function of image, state and budget; what one frame leaves to the next is all in :class:`State`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models import selection
from models.configs import IMAGE_ONLY, OF_THIS_FRAME, VppEoConfig
from models.mask_head import MaskHead
from models.pruned_host import KeepPredictor, MapSelector, Outputs, PrunedHost, Selection, count_of, state_ok
from models.selectors import NOTHING, Ranking, Refresh, first_draw, make_selector, mask_focus, next_draw
from models.token_subset import TokenSubset
from models.vit import Block, Mlp, PatchEmbed, cosine_patches, resize_pos_embed, sincos_pos_embed
from runtime.budget import BudgetRule
from runtime.errors import ImageSizeError


class State(NamedTuple):
    """What frame t-1 leaves to frame t.

    What the network's selection does not need is None; see :attr:`models.configs.VppEoConfig.selection_state`.

    Attributes:
        keys: Tokens before the first pruned block, [B, N, C].
        keep_logits: Keep and drop logit of each token's deep features, [B, N, 2]; zero where not kept.
        kept: Tokens that were still computed at the prior block, bool [B, N].
        queries: Object queries that the next frame starts from, [B, Q, C].
        final: Features after the last block, [B, N, C]; of a token that was dropped, those of an earlier frame.
        age: Frames since each token last passed every stage, fp32 [B, N].
        focus: Largest mask logit of any object in and around each patch, [B, N].
        draw: Random integers, int64 [B, N].
    """

    keys: Tensor | None
    keep_logits: Tensor | None
    kept: Tensor | None
    queries: Tensor
    final: Tensor | None = None
    age: Tensor | None = None
    focus: Tensor | None = None
    draw: Tensor | None = None

    def of(self, fields: tuple[str, ...]) -> State:
        """The same with those fields alone; None elsewhere."""
        return State(*(value if name in fields else None for name, value in zip(self._fields, self, strict=True)))

    def map(self, function: Callable[[Tensor], Tensor]) -> State:
        """The function of each field that is there."""
        return State(*(None if value is None else function(value) for value in self))

    def tensors(self) -> dict[str, Tensor]:
        """The fields that are there, by name."""
        return {name: value for name, value in zip(self._fields, self, strict=True) if value is not None}


class ExitAdapter(nn.Module):
    """Stands for the blocks that a dropped token missed: one hidden layer that knows at which stage it was dropped.

    A mask head reads all tokens alike; without this it finds, side by side, features of 1, 3, 6, 9 and 12 blocks.
    Starts as the identity.
    """

    def __init__(self, dim: int, stages: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, dim)
        self.stage_bias = nn.Parameter(torch.zeros(stages + 1, dim))

    def forward(self, x: Tensor, kept_stages: Tensor) -> Tensor:
        """Tokens [B, N, C] and the stages that each has passed, int64 [B, N] -> [B, N, C]."""
        return x + self.mlp(self.norm(x) + self.stage_bias[kept_stages])


class VppEo(PrunedHost):
    """Encoder-only VPP network for one image size.

    Args:
        config: Sizes; ``config.image_size`` fixes the patch grid, see :meth:`at_image_size`.

    Raises:
        ImageSizeError: The patch size does not divide the image size.
    """

    state_type = State
    dense_state = ("queries",)

    def __init__(self, config: VppEoConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_grid = patch_grid(config)
        dim = config.embed_dim
        self.patch_embed = PatchEmbed(config.patch_size, dim, config.mean, config.std)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.patch_count, dim))
        self.blocks = nn.ModuleList(Block(dim, config.heads, config.mlp_ratio) for _ in range(config.depth))
        if config.selector == "vpp":
            self.map_selector = MapSelector(dim, self.patch_grid, radius=config.pool_radius)
            self.selectors = nn.ModuleList(KeepPredictor(dim, dim // 4) for _ in config.selection_blocks)
        else:
            self.selector = make_selector(config.selector, dim, config.stages)
        self.refresh = Refresh(self.patch_count, config.refresh) if config.refresh else None
        self.exit_adapter = ExitAdapter(dim, config.stages) if config.pruned == "adapted" else None
        self.queries = nn.Parameter(torch.zeros(config.queries, dim))
        self.query_update = nn.Sequential(nn.LayerNorm(dim, eps=1e-6), nn.Linear(dim, dim))
        self.mask_head = MaskHead(config, self.patch_grid)
        self._init_weights()

    def _init_weights(self) -> None:
        dim, size = self.config.embed_dim, self.config.patch_size
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        if self.exit_adapter is not None:
            nn.init.zeros_(self.exit_adapter.mlp.fc2.weight)
        nn.init.normal_(self.queries, std=0.5)
        with torch.no_grad():
            self.pos_embed.copy_(0.5 * sincos_pos_embed(self.patch_grid, dim))
            patterns = cosine_patches(size, dim)
            self.patch_embed.proj.weight.copy_(2.0 * patterns / size)
            nn.init.zeros_(self.patch_embed.proj.bias)

    def initial_state(self, batch: int) -> State:
        """The state of a stream that has seen nothing: no prior, the learned queries."""
        count, dim = self.patch_count, self.config.embed_dim
        like = self.queries.detach()
        every = State(
            keys=like.new_zeros(batch, count, dim),
            keep_logits=like.new_zeros(batch, count, 2),
            kept=torch.zeros(batch, count, dtype=torch.bool, device=like.device),
            queries=like.expand(batch, -1, -1).clone(),
            final=like.new_zeros(batch, count, dim),
            age=like.new_zeros(batch, count),
            focus=like.new_full((batch, count), NOTHING),
            draw=first_draw(count).to(like.device).repeat(batch, 1),
        )
        return every.of(self.state_fields(Selection.BUDGET))

    @property
    def budget_rule(self) -> BudgetRule:
        """Which budgets the network takes; one that re-uses features computes every token without a prior."""
        stages = self.config.stages
        reset_stages = 1 if self.config.pruned in OF_THIS_FRAME else stages
        return BudgetRule(self.patch_count, stages, self.config.first_stage, reset_stages, self.config.queries)

    @property
    def has_decisions(self) -> bool:
        """True for selectors with a keep and a drop logit."""
        return self.config.selector in ("vpp", *IMAGE_ONLY)

    @property
    def selection_summary(self) -> str:
        """In words: what decides which patches are computed, and what stands for those that are not."""
        refresh = f", {self.config.refresh} % refreshed" if self.config.refresh else ""
        return f"{self.config.selector}, dropped tokens {self.config.pruned}{refresh}"

    def state_fields(self, mode: Selection) -> tuple[str, ...]:
        """Fields of :class:`State` that one step in this mode reads and writes."""
        return self.dense_state if mode is Selection.NONE else (*self.config.selection_state, *self.dense_state)

    def at_image_size(self, image_size: tuple[int, int]) -> VppEo:
        """A copy of the network for another image size (height, width); its position embedding is resampled.

        Raises:
            ImageSizeError: The patch size does not divide the image size.
        """
        resized = VppEo(replace(self.config, image_size=image_size))
        weights = dict(self.state_dict())
        weights["pos_embed"] = resize_pos_embed(weights["pos_embed"], self.patch_grid, resized.patch_grid)
        resized.load_state_dict(weights)
        return resized.train(self.training)

    def with_selection(self, selector: str, pruned: str, refresh: int) -> VppEo:
        """A copy of the network that selects in another way; a selector that it did not have starts untrained."""
        other = VppEo(replace(self.config, selector=selector, pruned=pruned, refresh=refresh))
        own = other.state_dict()
        other.load_state_dict({name: value for name, value in self.state_dict().items() if name in own}, strict=False)
        return other.train(self.training)

    def embed(self, image: Tensor) -> Tensor:
        """uint8 image [B, H, W, 3] -> tokens [B, N, C]."""
        return self.patch_embed(image) + self.pos_embed

    def next_queries(self, queries: Tensor) -> Tensor:
        """Queries that the next frame starts from: the learned ones, moved by what this frame made of them."""
        return self.queries + self.query_update(queries)

    def association(self, tokens: Tensor, state: State) -> Tensor | None:
        """Map-SM's similarities, None where another selector scores."""
        return super().association(tokens, state) if self.config.selector == "vpp" else None

    def stage_scores(self, stage: int, tokens: Tensor, state: State, token_budget: Tensor | None = None) -> Tensor:
        """As :meth:`models.pruned_host.PrunedHost.stage_scores`, for every selector."""
        if self.config.selector == "vpp":
            return super().stage_scores(stage, tokens, state, token_budget)
        return self.selector.stage_scores(stage, tokens)

    def ranking(self, tokens: Tensor, state: State, token_budget: Tensor | None) -> Ranking:
        """What is known of the tokens [B, N, C] before the first stage."""
        scores = None if self.config.selector == "vpp" else self.selector.frame_scores(tokens, state)
        if self.refresh is None:
            return Ranking(scores, None)
        count = self.refresh.count(count_of(token_budget[-1], self.patch_count))
        torch._check(count <= self.patch_count)
        oldest = selection.top_tokens(self.refresh.ranks(state.age), count)
        none = torch.zeros_like(state.age, dtype=torch.bool)
        return Ranking(scores, selection.scatter_tokens(none, oldest, torch.ones_like(oldest, dtype=torch.bool)))

    def ranked(
        self, stage: int, subset: TokenSubset, state: State, ranking: Ranking, token_budget: Tensor | None
    ) -> Tensor:
        """Scores fp32 [B, K] of the subset's tokens, infinite for those that have to stay."""
        if ranking.scores is None:
            scores = self.stage_scores(stage, subset.tokens, state, token_budget)
        else:
            scores = subset.take(ranking.scores)
        if ranking.refreshed is None:
            return scores
        return torch.where(subset.take(ranking.refreshed), float("inf"), scores)

    def instead_of_dropped(self, state: State, last: Tensor, kept_stages: Tensor) -> Tensor | None:
        """Final features [B, N, C] for tokens that are dropped; None for the values that they had then.

        Args:
            last: Those values, [B, N, C].
            kept_stages: Selection stages that each token passed, int64 [B, N].
        """
        if self.exit_adapter is not None:
            return self.exit_adapter(last, kept_stages)
        if self.config.pruned == "background":
            return torch.where(state.focus.unsqueeze(2) > 0, last, state.final)
        return state.final

    def next_memory(self, state: State, passed: Tensor, class_logits: Tensor, mask_logits: Tensor) -> State:
        """The next state with what the selector and the refresh remember, and without what they do not need.

        Args:
            state: The next state, with age and draw as they came in.
            passed: Tokens that passed every stage, bool [B, N].
            class_logits, mask_logits: The frame's answer.
        """
        fields = self.config.selection_state
        if "age" in fields:
            state = state._replace(age=self.refresh.next_age(state.age, passed))
        if "focus" in fields:
            state = state._replace(focus=mask_focus(class_logits, mask_logits))
        if "draw" in fields:
            state = state._replace(draw=next_draw(state.draw))
        return state.of(self.state_fields(Selection.BUDGET))

    def forward(
        self, image: Tensor, state: State, token_budget: Tensor | None = None, mode: Selection = Selection.BUDGET
    ) -> tuple[Outputs, State]:
        """Run one frame.

        Args:
            image: uint8 [B, H, W, 3], RGB.
            state: What the frame before left, or :meth:`initial_state`.
            token_budget: int64 [stages], tokens kept at each stage, nested. ``THRESHOLD`` reads the first alone,
                ``NONE`` takes None. Without a prior the first has to be N.
            mode: How the stages decide.
        """
        config = self.config
        subset = TokenSubset.full(self.embed(image))
        keys, keep_logits, prior_kept, queries = state[:4]
        patches, ranking = self.patch_count, Ranking(None, None)
        counts = token_budget if mode is Selection.BUDGET else None

        for number, block in enumerate(self.blocks):
            if number in config.stage_blocks and mode is not Selection.NONE:
                stage = config.stage_blocks.index(number)
                if stage == 0:
                    keys, ranking = subset.tokens, self.ranking(subset.tokens, state, token_budget)
                if stage < config.first_stage:
                    subset = subset.keep_all(stage)
                else:
                    scores = self.ranked(stage, subset, state, ranking, counts)
                    subset = subset.keep(self.choose(stage, subset, scores, token_budget, mode), stage)
                patches = subset.tokens.shape[1]
            tokens = torch.cat([subset.tokens, queries], dim=1) if number >= config.query_block else subset.tokens
            tokens = block(tokens)
            subset = subset.updated(tokens[:, :patches])
            queries = tokens[:, patches:] if number >= config.query_block else queries
            if number == config.prior_block and mode is not Selection.NONE and config.selector == "vpp":
                keep_logits, prior_kept = self.prior(subset)

        kept_stages, tokens_kept = self.token_counts(subset, mode)
        selecting = mode is not Selection.NONE
        final = subset.merged(self.instead_of_dropped(state, subset.dense, kept_stages) if selecting else None)
        class_logits, mask_logits = self.mask_head(final, queries)
        next_state = state._replace(queries=self.next_queries(queries))
        if selecting:
            next_state = next_state._replace(keys=keys, keep_logits=keep_logits, kept=prior_kept, final=final)
            next_state = self.next_memory(next_state, kept_stages == config.stages, class_logits, mask_logits)
        ok = state_ok(next_state, next_state.queries, mode)
        return Outputs(class_logits, mask_logits, kept_stages, tokens_kept, ok), next_state


def patch_grid(config: VppEoConfig) -> tuple[int, int]:
    """(rows, columns) of patches in one image.

    Raises:
        ImageSizeError: The patch size does not divide the image size.
    """
    height, width = config.image_size
    size = config.patch_size
    if height <= 0 or width <= 0 or height % size or width % size:
        nearest = [max(size, round(side / size) * size) for side in (height, width)]
        raise ImageSizeError(
            f"image size {height} x {width} (height x width) is not divisible by the patch size {size} of "
            f"{config.name}. The nearest that is: {nearest[0]} {nearest[1]}."
        )
    return height // size, width // size
