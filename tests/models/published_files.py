"""Checkpoints in the published layout: the reference network's, and random ones of any size."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.vpp_rovis.config import VppRovisConfig
from models.vpp_rovis.network import VppRovis
from models.vpp_rovis.published import dead_tensors, renamed

REFERENCE_FILE = Path(__file__).parents[1] / "data" / "vpp_rovis_micro.npz"
IMAGE_SIZE = (96, 160)
FRAMES = 5
STAGE_OF_BLOCK = np.array([0, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4])  # stages that a token has passed when a block runs it


def reference() -> dict[str, np.ndarray]:
    """The reference vectors."""
    with np.load(REFERENCE_FILE, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def reference_weights(vectors: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """The reference network's state dict, published names."""
    return {name[2:]: torch.from_numpy(value) for name, value in vectors.items() if name.startswith("w/")}


def save_published(path: Path, weights: dict[str, Tensor], **extra: Any) -> Path:
    """A file as the trainer wrote it."""
    torch.save({"state_dict": weights, "meta": {}, **extra}, path)
    return path


def random_published(config: VppRovisConfig, seed: int = 0) -> dict[str, Tensor]:
    """Random weights of a network of these sizes under the published names, dead tensors included."""
    torch.manual_seed(seed)
    ours = VppRovis(config).state_dict()
    dead = {"init_mlp.weight": (config.map_hidden, config.embed_dim)}
    weights = {}
    for name in _published_names(config):
        if dead_tensors([name]):
            shape = next((shape for end, shape in dead.items() if name.endswith(end)), (config.embed_dim,))
            weights[name] = torch.ones(shape)
            continue
        value = ours[renamed(name)]
        empty = value.is_floating_point() and not value.any() and "running_mean" not in name
        weights[name] = 0.3 * torch.randn_like(value) if empty else value
        if name.endswith("sampling_offsets.bias"):
            weights[name] = 2.0 * torch.randn_like(value)
    return weights


def _published_names(config: VppRovisConfig) -> list[str]:
    """The reference network's names, with as many layers as this network has."""
    names = []
    for name in reference_weights(reference()):
        layer = re.search(r"(encoder|transformer_decoder)\.layers\.(\d+)\.", name)
        if layer is None:
            names.append(name)
        elif layer[2] == "0":
            count = config.encoder_layers if layer[1] == "encoder" else config.decoder_layers
            names += [name.replace(layer[0], f"{layer[1]}.layers.{index}.") for index in range(count)]
    return names
