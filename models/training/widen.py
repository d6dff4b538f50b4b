"""A wider network that starts where a trained narrower one has arrived: the same answers, and room to get better.

    python -m models.training.widen nano.safetensors tiny-start.safetensors --model vpp-eo-tiny

Training a wider network from nothing takes a multiple of what the narrow one took; from here it goes on learning.
After Net2Net (arXiv:1511.05641), but channels are added, not doubled: what writes to the residual stream writes zeros
to the new channels, what reads them starts random, and so do new heads and hidden units, whose outputs start at zero.

Without selection every reader of the stream begins with a LayerNorm, which takes the mean away: so the writers may be
freed of theirs, the mean stays zero with any number of empty channels, and the variance shrinks by the ratio of the
widths, which the norm's gain takes back. Selectors and exit adapter are not carried over; they start untrained.
"""

from __future__ import annotations

from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor, nn

from models.checkpoints import load_checkpoint, save_checkpoint
from models.configs import CONFIGS, VppEoConfig
from models.mask_head import MaskHead
from models.vit import Block, Mlp
from models.vpp_eo import VppEo
from runtime.errors import CheckpointError, DeployError

ModelName = Enum("ModelName", {name: name for name in CONFIGS}, type=str)  # what the command offers


def widened(model: VppEo, sizes: VppEoConfig, seed: int = 0) -> VppEo:
    """A network of the widths of ``sizes`` that computes without selection what ``model`` does.

    Args:
        model: The narrower network; all but its widths is kept.
        sizes: Gives name, ``embed_dim``, ``heads`` and ``mask_dim``.
        seed: Of the weights that start random.

    Raises:
        CheckpointError: ``sizes`` has no more channels, fewer mask channels, or heads of another width.
    """
    old, new = model.config, sizes
    if new.embed_dim <= old.embed_dim or new.mask_dim < old.mask_dim:
        raise CheckpointError(
            f"{new.name} (C = {new.embed_dim}, {new.mask_dim} mask channels) is not wider than {old.name} "
            f"(C = {old.embed_dim}, {old.mask_dim} mask channels)."
        )
    if new.embed_dim // new.heads != old.embed_dim // old.heads:
        raise CheckpointError(
            f"a head of {new.name} has {new.embed_dim // new.heads} channels, one of {old.name} has "
            f"{old.embed_dim // old.heads}: heads can be added, not widened."
        )
    torch.manual_seed(seed)
    wide = VppEo(replace(old, name=new.name, embed_dim=new.embed_dim, heads=new.heads, mask_dim=new.mask_dim))
    with torch.no_grad():
        _write(wide.patch_embed.proj, model.patch_embed.proj)
        for into, start in ((wide.pos_embed, model.pos_embed), (wide.queries, model.queries)):
            _fill(into, start - start.mean(-1, keepdim=True))
        for block, start in zip(wide.blocks, model.blocks, strict=True):
            _widen_block(block, start)
        _norm(wide.query_update[0], model.query_update[0])
        _write(wide.query_update[1], model.query_update[1])
        _widen_mask_head(wide.mask_head, model.mask_head)
    return wide.train(model.training)


def _widen_block(wide: Block, narrow: Block) -> None:
    _norm(wide.norm1, narrow.norm1)
    for into, start in (
        (wide.attn.qkv.weight, narrow.attn.qkv.weight),
        (wide.attn.qkv.bias, narrow.attn.qkv.bias),
    ):
        _copy(into.unflatten(0, (3, -1)), start.unflatten(0, (3, -1)))  # [3 C, ...] -> [3, C, ...]: heads come last
    _write(wide.attn.proj, narrow.attn.proj)
    _norm(wide.norm2, narrow.norm2)
    _read(wide.mlp.fc1, narrow.mlp.fc1)
    _write(wide.mlp.fc2, narrow.mlp.fc2)


def _widen_mask_head(wide: MaskHead, narrow: MaskHead) -> None:
    _norm(wide.norm, narrow.norm)
    _read(wide.upsample, narrow.upsample)  # rows are [mask channel, 2, 2], so the new channels come last
    _copy(wide.refine.weight, narrow.refine.weight)
    _copy(wide.refine.bias, narrow.refine.bias)
    _widen_kernels(wide.kernels, narrow.kernels)
    _read(wide.classify, narrow.classify)


def _widen_kernels(wide: Mlp, narrow: Mlp) -> None:
    _read(wide.fc1, narrow.fc1)
    for into, start in ((wide.fc2.weight, narrow.fc2.weight), (wide.fc2.bias, narrow.fc2.bias)):
        _fill(into.unflatten(0, (4, -1)), start.unflatten(0, (4, -1)))  # [4 M, ...] -> [4, M, ...]


def _norm(wide: nn.LayerNorm, narrow: nn.LayerNorm) -> None:
    """The new channels have gain 1 and bias 0, as they are made."""
    share = narrow.weight.shape[0] / wide.weight.shape[0]
    _copy(wide.weight, narrow.weight * share**0.5)
    _copy(wide.bias, narrow.bias)


def _read(wide: nn.Linear, narrow: nn.Linear) -> None:
    """What reads new channels, which are zero, and what new units compute stays random."""
    _copy(wide.weight, narrow.weight)
    _copy(wide.bias, narrow.bias)


def _write(wide: nn.Linear | nn.Conv2d, narrow: nn.Linear | nn.Conv2d) -> None:
    """What is written to the residual stream: of zero mean over its channels, and nothing to the new ones."""
    _fill(wide.weight, narrow.weight - narrow.weight.mean(0))
    _fill(wide.bias, narrow.bias - narrow.bias.mean())


def _fill(into: Tensor, start: Tensor) -> None:
    into.zero_()
    _copy(into, start)


def _copy(into: Tensor, start: Tensor) -> None:
    into[tuple(slice(size) for size in start.shape)] = start


def main(
    narrow: Annotated[Path, typer.Argument(help="Checkpoint of the trained network.")],
    wide: Annotated[Path, typer.Argument(help="The checkpoint to write.")],
    model: Annotated[ModelName, typer.Option(help="Configuration whose widths it gets.")] = ModelName["vpp-eo-tiny"],
    seed: Annotated[int, typer.Option(help="Of the weights that start random.")] = 0,
) -> None:
    """Write a wider network that gives the answers of a trained narrower one."""
    try:
        save_checkpoint(widened(load_checkpoint(narrow), CONFIGS[model.value], seed), wide)
    except DeployError as error:
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        raise typer.Exit(error.exit_code) from error


if __name__ == "__main__":
    typer.run(main)
