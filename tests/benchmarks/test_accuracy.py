"""The accuracy benchmark from checkpoints to table and plot, on two short clips."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
import typer
from typer.testing import CliRunner

from benchmarks import accuracy, accuracy_plot
from models.checkpoints import save_checkpoint
from models.configs import CONFIGS
from models.training.scenes import CLASSES, SceneConfig, write_youtube_vis
from models.vpp_eo import VppEo

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The folder after one run, with the arguments that it was given."""
    folder = tmp_path_factory.mktemp("accuracy")
    config = SceneConfig(height=96, width=160, frames=4, smallest_radius=0.2, largest_radius=0.3)
    write_youtube_vis(folder / "set", config, range(2), progress=False)
    torch.manual_seed(0)
    model = VppEo(replace(CONFIGS["vpp-eo-micro"], classes=CLASSES, image_size=(96, 160)))
    for name, network in (("dense", model), ("chance", model.with_selection("random", "stale", 0))):
        save_checkpoint(network, folder / f"{name}.safetensors")
    arguments = [folder / "set", *(f"{name}={folder / name}.safetensors" for name in ("dense", "chance"))]
    arguments += ["--work", folder / "work", "--output", folder / "out.json", "--steps", 3, "--draws", 20]
    invoke(accuracy.main, arguments)
    return folder, arguments


def invoke(main, arguments) -> None:
    app = typer.Typer()
    app.command()(main)
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output


def test_every_row_has_accuracy_cost_and_distance_to_dense(measured):
    folder, _ = measured
    rows = json.loads((folder / "out.json").read_text())["rows"]
    assert [(row["network"], row["keep_ratio"]) for row in rows] == [("dense", None), ("chance", 0.55), ("chance", 0.4)]
    dense, *others = rows
    assert dense["tokens_kept"] == 1.0 and dense["speed_up"] == 1.0
    for row in others:
        assert row["tokens_kept"] < 0.7 and row["giga_macs"] < dense["giga_macs"] and row["median_ms"] > 0
        difference, low, high = row["to_dense"]
        assert difference == pytest.approx(row["AP"] - dense["AP"], abs=0.02) and low <= high


def test_run_that_goes_on_uses_what_there_is(measured, monkeypatch):
    folder, arguments = measured
    before = json.loads((folder / "out.json").read_text())["rows"]
    monkeypatch.setattr(accuracy, "evaluate", None)  # a row that is run again fails
    monkeypatch.setattr(accuracy, "export_bundle", None)
    invoke(accuracy.main, arguments)
    after = json.loads((folder / "out.json").read_text())["rows"]
    assert [row["AP"] for row in after] == [row["AP"] for row in before]


def test_plot_is_drawn(measured):
    folder, _ = measured
    invoke(accuracy_plot.main, [folder / "plot.svg", folder / "out.json"])
    text = (folder / "plot.svg").read_text()
    assert "<svg" in text and len(text) > 10_000


def test_another_checkpoint_throws_away_what_was_run(micro_checkpoint, micro_bundle, tmp_path):
    made = []

    def make(checkpoint, target):
        made.append(checkpoint.name)
        shutil.copytree(micro_bundle, target, dirs_exist_ok=True)

    row, other = tmp_path / "work" / "set-0.4.row.json", tmp_path / "other.safetensors"
    other.write_bytes(micro_checkpoint.read_bytes() + b" ")
    for checkpoint, stays in ((micro_checkpoint, False), (micro_checkpoint, True), (other, False)):
        row.parent.mkdir(exist_ok=True)
        row.touch()
        assert accuracy.prepared(checkpoint, row.parent, make).folder == row.parent / "bundle"
        assert row.exists() == stays
    assert made == [micro_checkpoint.name, other.name]
