"""Sizes of the published network."""

from __future__ import annotations

from dataclasses import dataclass

from models.configs import IMAGENET_MEAN, IMAGENET_STD, SelectionStages, unnamed_classes


@dataclass(frozen=True)
class VppRovisConfig(SelectionStages):
    """Sizes of one published network; a checkpoint's tensors tell them all but the image size.

    Attributes:
        name: ``vpp-rovis``.
        classes: Names of the object classes; the class head has one more output, for "no object".
        embed_dim: Token width C of the vision transformer.
        heads: Its attention heads.
        stem_dim: Channels of the spatial prior at stride 4.
        adapter_heads: Heads of the adapter's deformable attention.
        map_hidden: Hidden width of Map-SM's predictor.
        selector_hidden: Hidden width of the selective modules.
        has_selectors: False for a dense checkpoint, which can only run without selection.
        feature_dim: Width of pixel decoder and decoder.
        queries: Learned object queries.
        track_queries: Most track queries that are carried from frame to frame.
        encoder_layers, encoder_ffn: Layers of the pixel decoder and their hidden width.
        decoder_layers, decoder_ffn: Layers of the decoder and their hidden width.
        pretrain_grid: Side of the square patch grid that the position embedding is stored for.
        block_eps: Epsilon of the blocks' LayerNorm: 1e-5 in the sparse network, 1e-6 in the dense one.
        overwritten_keys: Keep the keys as the published inference does, which overwrites them in blocks 1 and 2;
            False keeps the input of block 1, as in training.
        image_size: (height, width), multiples of 32.
        mean, std: Normalisation of RGB values in [0, 1].

    Source: arXiv:2604.00827 and its released checkpoints.
    """

    name: str = "vpp-rovis"
    classes: tuple[str, ...] = unnamed_classes(40)
    embed_dim: int = 192
    heads: int = 3
    depth: int = 12
    mlp_ratio: int = 4
    stem_dim: int = 64
    adapter_heads: int = 6
    map_hidden: int = 96
    selector_hidden: int = 48
    has_selectors: bool = True
    feature_dim: int = 256
    queries: int = 100
    track_queries: int = 30
    encoder_layers: int = 6
    encoder_ffn: int = 1024
    decoder_layers: int = 9
    decoder_ffn: int = 2048
    pretrain_grid: int = 14
    block_eps: float = 1e-5
    overwritten_keys: bool = True
    image_size: tuple[int, int] = (544, 960)
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    patch_size = 16
    points = 4
    head_heads = 8
    map_block = 1
    selection_blocks = (3, 6, 9)
    prior_block = 5
    interactions = ((0, 1, 2), (3, 4, 5), (6, 7, 8), (9, 10, 11))
