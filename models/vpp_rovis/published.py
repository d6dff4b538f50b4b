"""Reading the released checkpoints: their names, their sizes, and what mmengine puts around the weights."""

from __future__ import annotations

import logging
import pickle
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.configs import unnamed_classes
from models.vpp_rovis.config import VppRovisConfig
from models.vpp_rovis.network import VppRovis
from models.weight_fit import check_fit
from runtime.errors import CheckpointError

logger = logging.getLogger(__name__)

# Tensors that the published code stores and never uses.
DEAD = re.compile(r"backbone\.interactions\.0\.matching_module\.(init_mlp|norm_input)\.")

SELECTORS = ("map_selector.", "selectors.")  # what a dense checkpoint lacks

# Published name -> name of ours, in order; what no rule changes keeps its name.
RENAMES = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"^detector\.", ""),
        (r"^backbone\.patch_embed\.proj\.", "patch_embed."),
        (r"^backbone\.blocks\.(\d+)\.TransformerEncoderLayer\.", r"backbone.blocks.\1."),
        (r"\.self_attn\.in_proj_", ".attn.qkv."),
        (r"\.self_attn\.out_proj\.", ".attn.proj."),
        (r"^(backbone\.blocks\.\d+)\.linear([12])\.", r"\1.mlp.fc\2."),
        (r"^backbone\.spm\.", "spatial_prior."),
        (r"\.dwconv\.dwconv\.", ".dwconv."),
        (r"^backbone\.interactions\.0\.matching_module\.norm_selector\.", "map_selector.predictor.norm."),
        (r"^backbone\.interactions\.0\.matching_module\.selector\.", "map_selector.predictor.mlp."),
        (r"^backbone\.selective_modules\.", "selectors."),
        (r"^backbone\.norm([1-4])\.", lambda match: f"norms.{int(match[1]) - 1}."),
        (r"^backbone\.", ""),
        (r"^panoptic_head\.pixel_decoder\.encoder\.layers\.(\d+)\.attentions\.0\.", r"pixel_decoder.layers.\1.attn."),
        (r"^panoptic_head\.pixel_decoder\.encoder\.", "pixel_decoder."),
        (r"^panoptic_head\.pixel_decoder\.(lateral|output)_convs\.0\.", r"pixel_decoder.\1_conv."),
        (r"^panoptic_head\.pixel_decoder\.level_encoding\.weight$", "pixel_decoder.level_encoding"),
        (r"^panoptic_head\.pixel_decoder\.", "pixel_decoder."),
        (r"^panoptic_head\.transformer_decoder\.", "mask_decoder."),
        (r"^panoptic_head\.(query_embed|query_feat|level_embed)\.weight$", r"mask_decoder.\1"),
        (r"^panoptic_head\.", "mask_decoder."),
        (r"\.attentions\.0\.attn\.in_proj_", ".cross_attn.qkv."),
        (r"\.attentions\.1\.attn\.in_proj_", ".self_attn.qkv."),
        (r"\.attentions\.0\.attn\.out_proj\.", ".cross_attn.proj."),
        (r"\.attentions\.1\.attn\.out_proj\.", ".self_attn.proj."),
        (r"\.ffns\.0\.layers\.0\.0\.", ".fc1."),
        (r"\.ffns\.0\.layers\.1\.", ".fc2."),
        (r"\.norms\.([0-2])\.", lambda match: f".norm{int(match[1]) + 1}."),
    )
)


def renamed(name: str) -> str:
    """Our name of a published tensor.

    >>> renamed("detector.backbone.blocks.3.TransformerEncoderLayer.self_attn.in_proj_weight")
    'blocks.3.attn.qkv.weight'
    >>> renamed("detector.panoptic_head.transformer_decoder.layers.0.attentions.1.attn.out_proj.bias")
    'mask_decoder.layers.0.self_attn.proj.bias'
    """
    for pattern, replacement in RENAMES:
        name = pattern.sub(replacement, name)
    return name


def load_published(path: Path) -> VppRovis:
    """Build the network that a released checkpoint holds, in evaluation mode; sizes are read off its tensors.

    Dense checkpoints, from before the sparse stage, have no selectors: ``has_selectors`` of the result's
    configuration is False, and it can only be exported dense.

    Raises:
        CheckpointError: The file is no such checkpoint, or tensors are missing, extra or of another shape (all listed).
    """
    content = _read(path)
    published = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(published, dict) or not all(isinstance(value, Tensor) for value in published.values()):
        raise CheckpointError(f"{path} holds no state dict: expected a dict of tensors, alone or under 'state_dict'.")
    if dead := dead_tensors(list(published)):
        logger.info("left out of %s, as no computation uses them: %s", path, ", ".join(dead))
    weights = {renamed(name): value.float() for name, value in published.items() if name not in dead}
    try:
        config = _config(weights, _class_names(content))
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(
            f"{path} holds no published VPP network: the tensors that tell its sizes are missing or odd ({error})."
        ) from error
    model = VppRovis(config)
    check_fit(path, model.state_dict(), weights, optional=() if config.has_selectors else SELECTORS)
    model.load_state_dict(weights, strict=config.has_selectors)
    return model.eval()


def dead_tensors(names: list[str]) -> list[str]:
    """Those of the published tensor names that no computation uses."""
    return [name for name in names if DEAD.search(name)]


def _config(weights: dict[str, Tensor], classes: tuple[str, ...] | None) -> VppRovisConfig:
    """Sizes from shapes; what no shape tells is the published value."""
    config = VppRovisConfig()
    embed_dim = weights["patch_embed.weight"].shape[0]
    count = weights["mask_decoder.cls_embed.bias"].shape[0] - 1
    if classes is None or len(classes) != count:
        classes = unnamed_classes(count)
    has_selectors = "map_selector.predictor.mlp.fc1.weight" in weights
    selectors = {}
    if has_selectors:
        selectors = {
            "map_hidden": weights["map_selector.predictor.mlp.fc1.weight"].shape[0],
            "selector_hidden": weights["selectors.0.mlp.fc1.weight"].shape[0],
        }
    return replace(
        config,
        classes=classes,
        embed_dim=embed_dim,
        heads=max(3, embed_dim // 64),
        depth=_layers(weights, "blocks"),
        mlp_ratio=weights["blocks.0.mlp.fc1.weight"].shape[0] // embed_dim,
        stem_dim=weights["spatial_prior.stem.0.weight"].shape[0],
        adapter_heads=weights["interactions.0.extractor.attn.attention_weights.bias"].shape[0] // config.points,
        feature_dim=weights["pixel_decoder.mask_feature.weight"].shape[0],
        queries=weights["mask_decoder.query_feat"].shape[0],
        encoder_layers=_layers(weights, "pixel_decoder.layers"),
        encoder_ffn=weights["pixel_decoder.layers.0.fc1.weight"].shape[0],
        decoder_layers=_layers(weights, "mask_decoder.layers"),
        decoder_ffn=weights["mask_decoder.layers.0.fc1.weight"].shape[0],
        pretrain_grid=round((weights["pos_embed"].shape[1] - 1) ** 0.5),
        has_selectors=has_selectors,
        block_eps=1e-5 if has_selectors else 1e-6,
        **selectors,
    )


def _layers(weights: dict[str, Tensor], prefix: str) -> int:
    return len({name[len(prefix) + 1 :].split(".")[0] for name in weights if name.startswith(f"{prefix}.")})


def _class_names(content: dict[str, Any]) -> tuple[str, ...] | None:
    """Names that mmengine stores under ``meta``."""
    meta = content.get("meta")
    data = meta.get("dataset_meta") if isinstance(meta, dict) else None
    names = data.get("classes", data.get("CLASSES")) if isinstance(data, dict) else None
    return tuple(map(str, names)) if isinstance(names, (tuple, list)) else None


# --- files as mmengine writes them ----------------------------------------------------------------------------------

_ALLOWED = {
    ("collections", "OrderedDict"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch", "Size"),
}


class Inert:
    """Stands for an object of a class that is not loaded: takes whatever the file says about it and does nothing."""

    def __init__(self, *args: object, **kwargs: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...

    def __setitem__(self, key: object, value: object) -> None: ...

    def append(self, value: object) -> None:
        """Take an element of a list."""

    def extend(self, values: object) -> None:
        """Take elements of a list."""

    def add(self, value: object) -> None:
        """Take an element of a set."""


class RestrictedUnpickler(pickle.Unpickler):
    """Builds tensors and plain containers; every other class or function becomes :class:`Inert`, and none is called."""

    def find_class(self, module: str, name: str) -> Any:
        """The few names that tensors need; an inert stand-in for all others."""
        if (module, name) in _ALLOWED:
            return super().find_class(module, name)
        return type(name.rpartition(".")[2], (Inert,), {"__module__": module})


class _RestrictedPickle:
    """What ``torch.load`` takes as a pickle module."""

    Unpickler = RestrictedUnpickler
    UnpicklingError = pickle.UnpicklingError
    __name__ = "restricted pickle"

    @staticmethod
    def load(file: Any, **kwargs: Any) -> Any:
        """As ``pickle.load``."""
        return RestrictedUnpickler(file, **kwargs).load()


def _read(path: Path) -> Any:
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint at {path}.")
    try:
        return torch.load(path, map_location="cpu", weights_only=False, pickle_module=_RestrictedPickle)
    except Exception as error:  # torch reports a foreign file by whatever its zip and pickle readers raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} is not a checkpoint that torch can read: {reason}") from error
