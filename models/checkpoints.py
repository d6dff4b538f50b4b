"""Reading and writing checkpoints: safetensors with the configuration in its metadata, or a plain torch file.

Nothing in a checkpoint is ever executed: torch files are read with ``weights_only``.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from dataclasses import asdict, replace
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.configs import CONFIGS, VppEoConfig
from models.pruned_host import PrunedHost
from models.vpp_eo import VppEo, patch_grid
from models.vpp_rovis.published import load_published
from models.weight_fit import check_fit
from runtime.errors import CheckpointError

_CONFIG_KEY = "config"
PUBLISHED = "vpp-rovis"


def save_checkpoint(model: VppEo, path: Path, *, half: bool = False, notes: dict[str, str] | None = None) -> None:
    """Write the weights and the configuration as safetensors, whole or not at all.

    Args:
        half: Store fp16; they are read back as fp32.
        notes: Further metadata, for example the training command.
    """
    dtype = torch.float16 if half else torch.float32
    weights = {name: value.detach().to("cpu", dtype).contiguous() for name, value in model.state_dict().items()}
    metadata = {_CONFIG_KEY: json.dumps(asdict(model.config)), **(notes or {})}
    partial = path.with_name(f".{path.name}.partial")
    save_file(weights, partial, metadata=metadata)
    os.replace(partial, path)


def load_checkpoint(path: Path, model_name: str | None = None) -> VppEo:
    """Build the network that a checkpoint holds, in evaluation mode.

    Args:
        path: ``.safetensors``, or a torch file holding a state dict, alone or under ``state_dict`` or ``model``.
        model_name: Configuration for a file that does not carry its own; its class count is read off the weights.

    Raises:
        CheckpointError: The file is missing or no checkpoint, has no configuration and none was named, or its
            weights do not fit; all that is missing, extra or of another shape is listed.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint at {path}.")
    weights, metadata = _read_safetensors(path) if _is_safetensors(path) else _read_torch(path)
    config = _config(path, weights, metadata, model_name)
    try:
        patch_grid(config)
        model = VppEo(config)
    except Exception as error:
        raise CheckpointError(f"{path} names a configuration that cannot be built: {error}") from error
    check_fit(path, model.state_dict(), weights)
    model.load_state_dict({name: value.float() for name, value in weights.items()})
    return model.eval()


def load_host(path: Path, model_name: str | None = None) -> PrunedHost:
    """Build the network of whatever host a checkpoint holds; see :func:`load_checkpoint`.

    Args:
        model_name: ``vpp-rovis`` for a released checkpoint of the published network.

    Raises:
        CheckpointError: As :func:`load_checkpoint`.
    """
    return load_published(path) if model_name == PUBLISHED else load_checkpoint(path, model_name)


def weight_hash(model: torch.nn.Module) -> str:
    """SHA-256 over the names, shapes and fp32 values of all weights, in name order."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _is_safetensors(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"  # eight bytes of header length, then JSON


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        return load_file(path), metadata
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error


def _read_torch(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"{path} holds more than weights, or is no checkpoint; nothing in it was executed ({reason}) "
            "Save the state dict alone: torch.save(model.state_dict(), path)."
        ) from error
    except Exception as error:  # torch reports a foreign file by whatever its zip and pickle readers raise
        raise CheckpointError(f"{path} is not a checkpoint that torch can read: {error}") from error
    metadata: dict[str, str] = {}
    if isinstance(content, dict) and isinstance(content.get(_CONFIG_KEY), str):
        metadata[_CONFIG_KEY] = content[_CONFIG_KEY]
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content or not all(map(_is_weight, content.items())):
        raise CheckpointError(f"{path} holds no state dict: expected a dict of tensors, alone or under 'state_dict'.")
    return content, metadata


def _is_weight(entry: tuple[object, object]) -> bool:
    return isinstance(entry[0], str) and isinstance(entry[1], Tensor)


def _config(path: Path, weights: dict[str, Tensor], metadata: dict[str, str], model_name: str | None) -> VppEoConfig:
    if _CONFIG_KEY in metadata:
        try:
            fields = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(metadata[_CONFIG_KEY]).items()}
            config = VppEoConfig(**fields)
        except (TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{path}: its configuration cannot be read: {error}") from error
        if model_name is not None and model_name != config.name:
            raise CheckpointError(f"{path} holds a {config.name}, not the {model_name} that was asked for.")
        return config
    if model_name is None:
        raise CheckpointError(
            f"{path} does not say which model it holds. Name it with --model, one of "
            f"{', '.join([*CONFIGS, PUBLISHED])}."
        )
    if model_name not in CONFIGS:
        raise CheckpointError(f"no model is called {model_name!r}; there are {', '.join([*CONFIGS, PUBLISHED])}.")
    config = CONFIGS[model_name]
    head = weights.get("mask_head.classify.bias")
    if head is None or head.ndim != 1 or head.shape[0] < 2:
        return config
    return replace(config, classes=tuple(f"class {index}" for index in range(head.shape[0] - 1)))
