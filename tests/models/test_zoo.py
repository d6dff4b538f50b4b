"""The shipped checkpoint does what its card says, on scenes that it has not seen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from models.checkpoints import load_checkpoint
from models.training.scenes import CLASSES, render_clip
from models.training.validation import SCENES
from runtime.budget import reset_budget, token_budget
from runtime.manifest import TrackerSettings
from runtime.tracks import Tracker

ZOO = Path(__file__).parents[2] / "models" / "zoo"
CHECKPOINTS = sorted(ZOO.glob("*.safetensors"))
HELD_OUT_SEEDS = range(900, 903)  # training scenes have the seeds from 300 000 000


def test_every_checkpoint_is_small_and_has_a_card():
    assert CHECKPOINTS
    card = (ZOO / "README.md").read_text()
    for path in CHECKPOINTS:
        assert path.stat().st_size <= 12 * 2**20
        assert path.name in card


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "keep_ratio", "least_found"),
    [("nano", 1.0, 0.6), ("nano", 0.55, 0.5), ("tiny", 1.0, 0.5), ("tiny", 0.55, 0.5)],
)
def test_finds_held_out_objects(size, keep_ratio, least_found):
    """What the card says, with room for other machines; random weights find none."""
    torch.set_num_threads(1)
    model = load_checkpoint(ZOO / f"vpp-eo-{size}-scenes.safetensors")
    assert model.config.classes == CLASSES
    matches = [match for seed in HELD_OUT_SEEDS for match in _best_matches(model, seed, keep_ratio)]
    assert len(matches) > 50
    found = [right for overlap, right in matches if overlap >= 0.5]
    assert len(found) / len(matches) > least_found
    assert np.mean(found) > 0.7, "classes of the objects found"


def _best_matches(model, seed: int, keep_ratio: float) -> list[tuple[float, bool]]:
    """For each object of at least 1 % of the frame, over a streamed clip: IoU of its best mask, is its class right?"""
    height, width = model.config.image_size
    scenes = replace(SCENES, height=height, width=width, frames=6, cut_probability=0)
    clip, state, matches = render_clip(scenes, seed), model.initial_state(1), []
    budget = token_budget(model.patch_count, keep_ratio)
    tracker = Tracker(TrackerSettings())
    for t, frame in enumerate(clip.frames):
        used = reset_budget(budget, model.patch_count) if t == 0 else budget
        with torch.no_grad():
            outputs, state = model(torch.from_numpy(frame)[None], state, torch.tensor(used))
        shown = tracker.update(outputs.class_logits[0].numpy(), outputs.mask_logits[0].numpy())
        logits = torch.nn.functional.interpolate(outputs.mask_logits, size=(height, width), mode="bilinear")
        masks = (logits[0, shown.queries] > 0).numpy()
        for label, mask in zip(clip.labels, clip.masks[:, t], strict=True):
            if mask.mean() > 0.01:
                overlaps = [(mask & other).sum() / (mask | other).sum() for other in masks] or [0.0]
                best = int(np.argmax(overlaps))
                matches.append((float(overlaps[best]), bool(len(masks)) and shown.labels[best] == label))
    return matches
