"""What each exact rewrite of the published network buys: the straightforward part against ours, both in torch.

    python -m benchmarks.rewrites

Tiny at 960 x 544 with random weights; plain parts are those of ``tests/models/published_vpp.py``. Tests show that the
parts agree; here they take turns and only their time counts.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
import typer
from torch import Tensor

from benchmarks.published import IMAGE_SIZE, KEEP_RATIO, measure
from benchmarks.speed import RESULTS, machine
from models.selection import top_tokens
from models.token_subset import TokenSubset
from models.vpp_rovis.config import VppRovisConfig
from models.vpp_rovis.network import RovisState, VppRovis
from models.vpp_rovis.pixel_decoder import PixelDecoder
from models.vpp_rovis.published import load_published
from tests.models import published_vpp as plain
from tests.models.published_files import random_published, save_published

Part = Callable[[], object]


class Pair(NamedTuple):
    """The same computation twice."""

    plain: Part
    ours: Part


class Network(NamedTuple):
    """Both formulations with the same weights."""

    model: VppRovis
    backbone: plain.Weights
    head: plain.Weights


def load_both(folder: Path) -> Network:
    """Random weights in the released layout, read by both."""
    weights = random_published(VppRovisConfig())
    model = load_published(save_published(folder / "tiny.pth", weights)).at_image_size(IMAGE_SIZE)
    return Network(model, *(plain.part(weights, f"detector.{name}.") for name in ("backbone", "panoptic_head")))


def map_selector(network: Network) -> Pair:
    """Two logits gathered and a distance by broadcasting; plain: one-hot times deep features, distance from scratch."""
    model, (tokens, keys, deep) = network.model, (torch.randn(3, 1, network.model.patch_count, 192))
    count, kept = int(model.patch_count * KEEP_RATIO), torch.rand(1, model.patch_count) < 0.5
    weights = plain.part(network.backbone, "interactions.0.matching_module.")
    prior = plain.Prior(keys, deep, kept)
    logits = model.map_selector.predictor(deep)
    state = RovisState(keys, logits, kept, torch.empty(0), torch.empty(0))
    return Pair(
        lambda: plain.map_selector(weights, tokens, prior, model.patch_grid, count),
        lambda: top_tokens(model.map_selector(tokens, state), count),
    )


def three_blocks(network: Network) -> Pair:
    """One gather and one scatter around the blocks of a stage; plain: around every block."""
    model, tokens = network.model, torch.randn(1, network.model.patch_count, 192)
    kept = torch.rand(1, model.patch_count) < 0.56
    chosen = kept[0].nonzero().T

    def plain_blocks() -> Tensor:
        x = tokens
        for number in (3, 4, 5):
            x = x.clone()
            weights = plain.part(network.backbone, f"blocks.{number}.TransformerEncoderLayer.")
            x[kept] = plain.block(weights, x[kept][None], heads=3)[0]
        return x

    def our_blocks() -> Tensor:
        subset = TokenSubset.full(tokens).keep(chosen, 0)
        for number in (3, 4, 5):
            subset = subset.updated(model.blocks[number](subset.tokens))
        return subset.merged()

    return Pair(plain_blocks, our_blocks)


def deformable(network: Network) -> Pair:
    """Offsets and weights in one product, the weighted sum along queries; plain: as the definition has it."""
    decoder = network.model.pixel_decoder
    count = sum(height * width for height, width in decoder.shapes)
    queries, values = torch.randn(2, 1, count, 256)
    centres = torch.cat([plain.centres(*shape) for shape in decoder.shapes])
    weights = plain.part(network.head, "pixel_decoder.encoder.layers.0.attentions.0.")
    shapes = list(decoder.shapes)
    return Pair(
        lambda: plain.deformable_attention(weights, queries, centres, values, shapes, plain.HEADS),
        lambda: decoder.layers[0].attn(queries, values),
    )


def masks_and_decoder(network: Network) -> Pair:
    """Masks of a layer at that layer's size, kernels through the 1 x 1 convolution; plain: full masks ten times.

    The pixel decoder runs without its encoder, so that nine layers of the decoder and the masks remain.
    """
    model, config = network.model, network.model.config
    rows, columns = model.patch_grid
    shapes = ((4 * rows, 4 * columns), (2 * rows, 2 * columns), (rows, columns), (rows // 2, columns // 2))
    maps = [torch.randn(1, config.embed_dim, *shape) for shape in shapes]
    short = PixelDecoder(config.embed_dim, config.feature_dim, config.head_heads, 0, config.encoder_ffn, shapes).eval()
    short.load_state_dict(model.pixel_decoder.state_dict(), strict=False)
    none = torch.zeros(1, 0, config.feature_dim)

    def ours() -> object:
        features, memories = short(maps)
        return model.mask_decoder(features, short.mask_feature, memories, none, torch.zeros(1, 0, dtype=torch.bool))

    return Pair(lambda: plain.head(network.head, maps, none[0], none[0], 0, config.decoder_layers), ours)


PARTS: dict[str, Callable[[Network], Pair]] = {
    "Map-SM": map_selector,
    "three blocks of a stage": three_blocks,
    "deformable attention of the pixel decoder, one of six": deformable,
    "masks and decoder": masks_and_decoder,
}


def main(
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    rounds: Annotated[int, typer.Option(min=3, help="Measured rounds.")] = 15,
) -> None:
    """Measure and write ``benchmarks/results/published-rewrites.json``."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        network = load_both(Path(name))
        pairs = {part: make(network) for part, make in PARTS.items()}
        rows = {(part, side): getattr(pair, side) for part, pair in pairs.items() for side in Pair._fields}
        times = {key: float(np.median(values)) for key, values in measure(rows, rounds).items()}
    result = {
        "machine": machine(),
        "threads": threads,
        "rounds": rounds,
        "rows": {
            part: {
                "plain_ms": round(times[part, "plain"], 2),
                "ours_ms": round(times[part, "ours"], 2),
                "speed_up": round(times[part, "plain"] / times[part, "ours"], 3),
            }
            for part in PARTS
        },
    }
    (RESULTS / "published-rewrites.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    typer.run(main)
