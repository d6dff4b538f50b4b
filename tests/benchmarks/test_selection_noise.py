"""The graph that decides with noise: other tokens at every run, as many as asked, and nothing else changed."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

from benchmarks import selection_noise
from models.checkpoints import save_checkpoint
from models.configs import CONFIGS
from models.training.scenes import CLASSES, SceneConfig, write_youtube_vis
from models.vpp_eo import VppEo
from runtime.backend import load_engine
from runtime.bundle import load_bundle

pytestmark = pytest.mark.slow


def test_noise_is_scaled_as_published():
    torch.manual_seed(0)
    draws = 10 * selection_noise.gumbel(torch.empty(100_000))
    assert draws.mean() == pytest.approx(0.5772, abs=0.02)  # Euler's constant
    assert draws.std() == pytest.approx(np.pi / np.sqrt(6), abs=0.02)


def test_graph_with_noise_keeps_other_tokens_each_time(micro_bundle, micro_checkpoint, tmp_path):
    plain = load_bundle(micro_bundle)
    selection_noise.export_noisy(micro_checkpoint, tmp_path / "noisy")
    noisy = load_bundle(tmp_path / "noisy")
    budget = plain.manifest.presets["0.40"]
    image = np.random.default_rng(0).integers(0, 256, (1, *plain.manifest.image_size, 3), np.uint8)
    kept = {}
    for name, bundle in (("plain", plain), ("noisy", noisy)):
        buffers = load_engine(bundle, threads=1).open_stream()
        buffers.image[:] = image
        buffers.run(plain.manifest.budget_rule.at_reset(budget))
        buffers.commit()
        kept[name] = [{key: np.array(value) for key, value in buffers.run(budget).items()} for _ in range(2)]
    first, second = kept["noisy"]
    assert first["tokens_kept"].tolist() == second["tokens_kept"].tolist() == [list(budget)]
    assert (first["kept_stages"] != second["kept_stages"]).any()
    assert (kept["plain"][0]["kept_stages"] == kept["plain"][1]["kept_stages"]).all()


def test_command_writes_the_differences(tmp_path):
    config = SceneConfig(height=96, width=160, frames=4, smallest_radius=0.2, largest_radius=0.3)
    write_youtube_vis(tmp_path / "set", config, range(2), progress=False)
    torch.manual_seed(0)
    model = VppEo(replace(CONFIGS["vpp-eo-micro"], classes=CLASSES, image_size=(96, 160)))
    save_checkpoint(model, tmp_path / "net.safetensors")
    app = typer.Typer()
    app.command()(selection_noise.main)
    out = tmp_path / "out.json"
    arguments = [tmp_path / "set", tmp_path / "net.safetensors", "--name", "net", "--work", tmp_path / "work"]
    arguments += ["--output", out, "--keep-ratio", 0.4, "--repeats", 1]
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    (row,) = json.loads(out.read_text())["rows"]
    assert row["difference"][0] == pytest.approx(row["AP_with"] - row["AP_without"], abs=0.02)
