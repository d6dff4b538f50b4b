"""Reference vectors of a bundle: a short clip and what torch makes of it, so that a device needs no torch to verify."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from export.check import Oracle, named_state
from models.pruned_host import PrunedHost, Selection
from runtime.reference import MASK_STRIDE

FRAMES = 8


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


def write_reference(model: PrunedHost, path: Path, budget: tuple[int, ...], mode: Selection) -> None:
    """Run torch over the synthetic clip and write inputs, state, scores and outputs of every frame.

    Mask logits are stored at every ``MASK_STRIDE``-th row and column.
    """
    oracle, state = Oracle(model), model.initial_state(1)
    arrays: dict[str, NDArray[np.generic]] = {"frames": np.array(FRAMES)}
    for t, frame in enumerate(synthetic_frames(model.config.image_size)):
        used = model.budget_rule.at_reset(budget) if t == 0 else budget
        arrays |= {f"{t}.state.{name}": value for name, value in named_state(model, state, mode).items()}
        outputs, state = oracle.run(torch.from_numpy(frame)[None], state, used, mode)
        arrays |= {f"{t}.image": frame, f"{t}.budget": np.array(used), f"{t}.tied_match": np.array(oracle.tied_match)}
        arrays |= {f"{t}.scores.{stage}": scores for stage, scores in enumerate(oracle.scores)}
        for name, value in outputs._asdict().items():
            stored = value[..., ::MASK_STRIDE, ::MASK_STRIDE] if name == "mask_logits" else value
            arrays[f"{t}.output.{name}"] = stored.numpy()
        # the state that this frame leaves is stored as the next frame's input; the last one's is not compared
    np.savez_compressed(path, **arrays)
