"""The published network as one step: image, state and budget in; objects and the next state out."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.pruned_host import KeepPredictor, MapSelector, PrunedHost, Selection, state_ok
from models.selection import gather_tokens
from models.token_subset import TokenSubset
from models.vit import Block
from models.vpp_rovis.adapter import Interaction, SpatialPrior, side_shapes
from models.vpp_rovis.config import VppRovisConfig
from models.vpp_rovis.mask_decoder import MaskDecoder
from models.vpp_rovis.pixel_decoder import PixelDecoder
from runtime.errors import ImageSizeError
from runtime.manifest import TrackQuerySettings

COARSEST_STRIDE = 32


class RovisState(NamedTuple):
    """What frame t-1 leaves to frame t; the first three as :class:`models.pruned_host.Prior`.

    Attributes:
        track_queries: Queries of the objects followed, [B, T, C]; the tracker chooses them.
        track_valid: Which of the T there are, bool [B, T].
    """

    keys: Tensor
    keep_logits: Tensor
    kept: Tensor
    track_queries: Tensor
    track_valid: Tensor


class RovisOutputs(NamedTuple):
    """What one frame gives: :class:`models.pruned_host.Outputs`, and the queries [B, Q + T, C] behind them."""

    class_logits: Tensor
    mask_logits: Tensor
    kept_stages: Tensor
    tokens_kept: Tensor
    state_ok: Tensor
    queries: Tensor


class VppRovis(PrunedHost):
    """ViT-Adapter backbone with patch selection, Mask2Former head, track queries; for one image size.

    Raises:
        ImageSizeError: 32 does not divide the image size.
    """

    state_type = RovisState
    outputs_type = RovisOutputs
    dense_state = ("track_queries", "track_valid")
    has_inner_decisions = True  # the decoder's attention masks
    host_state = {"track_queries": "queries", "track_valid": None}  # noqa: RUF012  # a class attribute of the base

    mean: Tensor
    std: Tensor

    def __init__(self, config: VppRovisConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_grid = rows, columns = _patch_grid(config)
        dim = config.embed_dim
        self.register_buffer("mean", 255 * torch.tensor(config.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(config.std).view(3, 1, 1), persistent=False)
        self.patch_embed = nn.Conv2d(3, dim, config.patch_size, stride=config.patch_size)
        self.pos_embed = nn.Parameter(torch.zeros(1, config.pretrain_grid**2 + 1, dim))  # the first is a class token's
        self.spatial_prior = SpatialPrior(dim, config.stem_dim)
        self.level_embed = nn.Parameter(torch.zeros(3, dim))
        self.blocks = nn.ModuleList(
            Block(dim, config.heads, config.mlp_ratio, eps=config.block_eps) for _ in range(config.depth)
        )
        last = len(config.interactions) - 1
        self.interactions = nn.ModuleList(
            Interaction(dim, config.adapter_heads, self.patch_grid, 2 if index == last else 0)
            for index in range(last + 1)
        )
        self.map_selector = MapSelector(dim, self.patch_grid, config.map_hidden)
        self.selectors = nn.ModuleList(KeepPredictor(dim, config.selector_hidden) for _ in config.selection_blocks)
        self.up = nn.ConvTranspose2d(dim, dim, 2, stride=2)
        self.norms = nn.ModuleList(nn.BatchNorm2d(dim) for _ in range(4))
        shapes = ((4 * rows, 4 * columns), *side_shapes(self.patch_grid))
        self.pixel_decoder = PixelDecoder(
            dim, config.feature_dim, config.head_heads, config.encoder_layers, config.encoder_ffn, shapes
        )
        self.mask_decoder = MaskDecoder(
            config.feature_dim, config.head_heads, config.decoder_layers, config.decoder_ffn, len(config.classes),
            config.queries, self.pixel_decoder.shapes,
        )  # fmt: skip

    @property
    def has_selectors(self) -> bool:
        """False for a checkpoint from before the sparse stage."""
        return self.config.has_selectors

    def initial_state(self, batch: int) -> RovisState:
        """The state of a stream that has seen nothing: no prior, no track."""
        config, count = self.config, self.patch_count
        like = self.pos_embed.detach()
        return RovisState(
            keys=like.new_zeros(batch, count, config.embed_dim),
            keep_logits=like.new_zeros(batch, count, 2),
            kept=torch.zeros(batch, count, dtype=torch.bool, device=like.device),
            track_queries=like.new_zeros(batch, config.track_queries, config.feature_dim),
            track_valid=torch.zeros(batch, config.track_queries, dtype=torch.bool, device=like.device),
        )

    def at_image_size(self, image_size: tuple[int, int]) -> VppRovis:
        """The network for another image size (height, width), with the same weights.

        Raises:
            ImageSizeError: 32 does not divide the image size.
        """
        resized = VppRovis(replace(self.config, image_size=image_size))
        resized.load_state_dict(self.state_dict())
        return resized.train(self.training)

    def tracker_settings(self) -> TrackQuerySettings:
        """The published tracker's thresholds."""
        return TrackQuerySettings(learned_queries=self.config.queries)

    def example_tracks(self, outputs: RovisOutputs, state: RovisState) -> RovisState:
        """Carry the first three queries on."""
        queries, valid = state.track_queries.clone(), torch.zeros_like(state.track_valid)
        count = min(3, valid.shape[1])
        queries[:, :count], valid[:, :count] = outputs.queries[:, :count], True
        return state._replace(track_queries=queries, track_valid=valid)

    def forward(
        self, image: Tensor, state: RovisState, token_budget: Tensor | None = None, mode: Selection = Selection.BUDGET
    ) -> tuple[RovisOutputs, RovisState]:
        """Run one frame.

        Args:
            image: uint8 [B, H, W, 3], RGB; or float [B, H, W, 3], normalised already.
            state: What the frame before left, with the track queries that the tracker chose.
            token_budget, mode: See :class:`models.vpp_eo.VppEo`.

        Returns:
            The next state's track queries are those that came in: the tracker replaces them.
        """
        maps, subset, (keys, keep_logits, kept) = self.backbone(image, state, token_budget, mode)
        features, memories = self.pixel_decoder(maps)
        self.mask_decoder.margin = self.inner_margin
        classes, masks, queries = self.mask_decoder(
            features, self.pixel_decoder.mask_feature, memories, state.track_queries, state.track_valid
        )
        next_state = RovisState(keys, keep_logits, kept, state.track_queries, state.track_valid)
        kept_stages, tokens_kept = self.token_counts(subset, mode)
        ok = state_ok(next_state, queries, mode)
        return RovisOutputs(classes, masks, kept_stages, tokens_kept, ok, queries), next_state

    def backbone(
        self, image: Tensor, state: RovisState, token_budget: Tensor | None, mode: Selection
    ) -> tuple[list[Tensor], TokenSubset, tuple[Tensor, Tensor, Tensor]]:
        """Maps [B, C, h, w] of strides 4, 8, 16, 32, the tokens kept, and the prior (keys, keep logits, kept)."""
        config = self.config
        pixels = self._normalised(image)
        stem, side_maps = self.spatial_prior(pixels)
        side = torch.cat([tokens + level for tokens, level in zip(side_maps, self.level_embed, strict=True)], dim=1)
        x = self.patch_embed(pixels).flatten(2).transpose(1, 2) + self._positions()
        subset = TokenSubset.full(x)
        keys, keep_logits, kept = state.keys, state.keep_logits, state.kept
        counts = token_budget if mode is Selection.BUDGET else None
        for interaction, numbers in zip(self.interactions, config.interactions, strict=True):
            subset = _with_all(subset, interaction.injector(subset.merged(), side))
            for number in numbers:
                if number in config.stage_blocks and mode is not Selection.NONE:
                    stage = config.stage_blocks.index(number)
                    keys = subset.tokens if stage == 0 else keys
                    scores = self.stage_scores(stage, subset.tokens, state, counts)
                    subset = subset.keep(self.choose(stage, subset, scores, token_budget, mode), stage)
                subset = subset.updated(self.blocks[number](subset.tokens))
            x = subset.merged()
            if mode is not Selection.NONE:
                if config.overwritten_keys and config.map_block in numbers:
                    keys = x
                if config.prior_block in numbers:
                    keep_logits, kept = self.prior(subset)
            side = interaction.extract(side, x)
        return self._pyramid(stem, side, x), subset, (keys, keep_logits, kept)

    def _normalised(self, image: Tensor) -> Tensor:
        """[B, 3, H, W], zero mean."""
        pixels = image.to(self.mean.dtype).permute(0, 3, 1, 2)  # in this order: TensorRT moves no bytes
        return pixels if image.is_floating_point() else (pixels - self.mean) / self.std

    def _positions(self) -> Tensor:
        side = self.config.pretrain_grid
        grid = self.pos_embed[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, self.patch_grid, mode="bicubic", align_corners=False)
        return grid.flatten(2).transpose(1, 2)

    def _pyramid(self, stem: Tensor, side: Tensor, x: Tensor) -> list[Tensor]:
        shapes = side_shapes(self.patch_grid)
        parts = side.transpose(1, 2).split([rows * columns for rows, columns in shapes], dim=2)
        maps = [part.unflatten(2, shape) for part, shape in zip(parts, shapes, strict=True)]
        maps = [self.up(maps[0]) + stem, *maps]
        tokens = x.transpose(1, 2).unflatten(2, self.patch_grid)
        return [
            norm(part + F.interpolate(tokens, part.shape[2:], mode="bilinear", align_corners=False))
            for norm, part in zip(self.norms, maps, strict=True)
        ]


def _with_all(subset: TokenSubset, dense: Tensor) -> TokenSubset:
    """The same choice of tokens, with new values of all tokens [B, N, C]."""
    tokens = dense if subset.indices is None else gather_tokens(dense, subset.indices)
    return replace(subset, tokens=tokens, dense=dense)


def _patch_grid(config: VppRovisConfig) -> tuple[int, int]:
    height, width = config.image_size
    if height <= 0 or width <= 0 or height % COARSEST_STRIDE or width % COARSEST_STRIDE:
        nearest = [max(32, round(side / COARSEST_STRIDE) * COARSEST_STRIDE) for side in (height, width)]
        raise ImageSizeError(
            f"image size {height} x {width} (height x width) is not divisible by {COARSEST_STRIDE}, the coarsest "
            f"stride of {config.name}. The nearest that is: {nearest[0]} {nearest[1]}."
        )
    return height // config.patch_size, width // config.patch_size
