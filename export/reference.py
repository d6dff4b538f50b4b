"""Reference vectors of a bundle: a short clip and what torch makes of it, so that a device needs no torch to verify."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from export.check import Oracle, named_state
from models.pruned_host import PrunedHost, Selection
from runtime.reference import MASK_STRIDE

FRAMES = 8
PRESET_STRIDE = 2  # frames 0, 2, 4, 6: one without a prior and three with


def synthetic_frames(image_size: tuple[int, int], count: int = FRAMES, seed: int = 0) -> Iterator[NDArray[np.uint8]]:
    """Smooth random patterns drifting over a smooth background, uint8 [H, W, 3] each; the same for the same seed."""
    height, width = image_size
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32) / 32.0
    waves = rng.uniform(-1.5, 1.5, (3, 4, 2))
    phases = rng.uniform(0, 6.28, (3, 4))
    drift = rng.uniform(-0.4, 0.4, (3, 4))
    for t in range(count):
        channels = [
            sum(np.sin(a * y + b * x + p + d * t) for (a, b), p, d in zip(waves[c], phases[c], drift[c], strict=True))
            for c in range(3)
        ]
        yield (np.stack(channels, axis=-1) * 30 + 128).clip(0, 255).astype(np.uint8)


def write_reference(
    model: PrunedHost, path: Path, presets: dict[str, tuple[int, ...]], default: str, mode: Selection
) -> None:
    """Run torch over the synthetic clip and write inputs, state, scores and outputs of every frame.

    The clip runs at the default preset; the other presets start from its state at every ``PRESET_STRIDE``-th frame.
    Mask logits are stored at every ``MASK_STRIDE``-th row and column.
    """
    oracle, state, rule = Oracle(model), model.initial_state(1), model.budget_rule
    arrays: dict[str, NDArray[np.generic]] = {"frames": np.array(FRAMES)}
    for t, frame in enumerate(synthetic_frames(model.config.image_size)):
        image, before = torch.from_numpy(frame)[None], state
        budgets = {name: rule.at_reset(budget) if t == 0 else budget for name, budget in presets.items()}
        arrays |= {f"{t}.state.{name}": value for name, value in named_state(model, before, mode).items()}
        arrays[f"{t}.image"] = frame
        outputs, state = oracle.run(image, before, budgets[default], mode)
        arrays |= _vectors(f"{t}.", oracle, outputs, budgets[default])
        arrays |= _explained(f"{t}.", oracle.sensitivity(image, before, budgets[default], mode, outputs.kept_stages))
        # the state that this frame leaves is stored as the next frame's input; the last one's is not compared
        following = named_state(model, state, mode)
        for name in presets if t % PRESET_STRIDE == 0 else ():
            if name != default:
                outputs, other = oracle.run(image, before, budgets[name], mode)
                arrays |= _vectors(f"{name}:{t}.", oracle, outputs, budgets[name])
                moved = oracle.sensitivity(image, before, budgets[name], mode, outputs.kept_stages)
                arrays |= _explained(f"{name}:{t}.", moved)
                arrays |= {
                    f"{name}:{t}.next.{field}": value
                    for field, value in named_state(model, other, mode).items()
                    if not np.array_equal(value, following[field])
                }
    np.savez_compressed(path, **arrays)


def _vectors(prefix: str, oracle: Oracle, outputs: Any, budget: tuple[int, ...]) -> dict[str, NDArray[np.generic]]:
    """What the oracle's last step gave, under names with this prefix."""
    arrays = {f"{prefix}budget": np.array(budget), f"{prefix}tied_match": np.array(oracle.tied_match)}
    arrays |= {f"{prefix}scores.{stage}": scores for stage, scores in enumerate(oracle.scores)}
    for name, value in outputs._asdict().items():
        stored = value[..., ::MASK_STRIDE, ::MASK_STRIDE] if name == "mask_logits" else value
        arrays[f"{prefix}output.{name}"] = stored.numpy()
    return arrays


def _explained(prefix: str, moved: dict[str, float]) -> dict[str, NDArray[np.generic]]:
    """How far near-ties inside the network move each output: an engine in fp32 may differ by as much more."""
    return {f"{prefix}explained.{name}": np.array(value) for name, value in moved.items() if value}
