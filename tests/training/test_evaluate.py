"""The evaluation's command on small data sets, through a real bundle."""

from __future__ import annotations

import json
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from published_files import random_published, save_published
from typer.testing import CliRunner

from export.bundle_writer import ExportRequest, export_bundle
from models.checkpoints import save_checkpoint
from models.configs import CONFIGS
from models.training import evaluate as module
from models.training import validation
from models.training.evaluate import evaluate, open_data, write_results
from models.training.scenes import CLASSES, SceneConfig, write_youtube_vis
from models.training.validation import SCENES, write_validation
from models.vpp_eo import VppEo
from models.vpp_rovis.config import VppRovisConfig
from runtime.bundle import load_bundle
from runtime.errors import SourceFormatError

SIZE = (96, 160)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes") / "set"
    config = SceneConfig(height=96, width=160, frames=5, smallest_radius=0.15, largest_radius=0.3)
    write_youtube_vis(folder, config, range(3), progress=False)
    return folder


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """A network that shows something: its class head is biased towards the first class."""
    torch.manual_seed(0)
    model = VppEo(replace(CONFIGS["vpp-eo-micro"], classes=CLASSES, image_size=SIZE))
    with torch.no_grad():
        model.mask_head.classify.bias[0] += 3.0
    folder = tmp_path_factory.mktemp("bundle")
    save_checkpoint(model, folder / "model.safetensors")
    export_bundle(ExportRequest(folder / "model.safetensors", folder / "bundle"))
    return folder / "bundle"


@pytest.fixture
def run():
    app = typer.Typer()
    app.command()(module.main)
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.slow
def test_command_prints_every_budget_and_writes_results(run, bundle, data, tmp_path):
    done = run(bundle, data, "--keep-ratio", 1.0, "--keep-ratio", 0.4, "--json", "--results", tmp_path / "r.zip")
    assert done.exit_code == 0, done.output
    rows = {row["name"]: row for row in json.loads(done.stdout)}
    assert list(rows) == ["dense", "keep 1.00", "keep 0.40"]
    assert rows["dense"]["tokens_kept"] == rows["keep 1.00"]["tokens_kept"] == 1.0
    # 3 of 15 frames have no prior: block 0 to 2 of those compute all tokens
    assert 0.40 < rows["keep 0.40"]["tokens_kept"] < 0.46
    assert rows["keep 0.40"]["giga_macs"] < rows["keep 1.00"]["giga_macs"]
    assert all(0 <= rows["dense"][name] <= 100 for name in ("AP", "AP50", "AP75", "AR1", "AR10"))
    assert rows["dense"]["AP"] == rows["keep 1.00"]["AP"]
    with zipfile.ZipFile(tmp_path / "r.zip") as archive:
        assert archive.namelist() == ["results.json"]
        tracks = json.loads(archive.read("results.json"))
    assert tracks and all(len(track["segmentations"]) == 5 for track in tracks)
    assert {track["video_id"] for track in tracks} <= {1, 2, 3}


@pytest.mark.slow
def test_results_are_those_of_deploy_run(bundle, data, tmp_path, run):
    """The same bytes as ``deploy.py run --results`` on one of the videos."""
    import deploy

    done = run(bundle, data, "--clips", 1, "--no-dense", "--keep-ratio", 0.55, "--results", tmp_path / "e.json")
    assert done.exit_code == 0, done.output
    arguments = ["run", bundle, "--source", data / "JPEGImages" / "scene_0000000000", "--results", tmp_path / "d.json"]
    CliRunner().invoke(deploy.app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert json.loads((tmp_path / "e.json").read_text()) == json.loads((tmp_path / "d.json").read_text())


@pytest.mark.slow
def test_data_without_annotations_gives_results_alone(run, bundle, data, tmp_path):
    content = json.loads((data / "instances.json").read_text())
    del content["annotations"]
    (tmp_path / "JPEGImages").symlink_to(data / "JPEGImages")
    (tmp_path / "valid.json").write_text(json.dumps(content))
    done = run(bundle, tmp_path, "--no-dense", "--keep-ratio", 0.55, "--results", tmp_path / "r.json", "--json")
    assert done.exit_code == 0, done.output
    assert "AP" not in json.loads(done.stdout)[0]
    assert json.loads((tmp_path / "r.json").read_text())


@pytest.mark.slow
def test_ratio_that_is_no_preset_has_its_own_name_and_no_work_of_another(bundle, data):
    loaded = load_bundle(bundle)
    row = evaluate(loaded, open_data(data, loaded.manifest.classes, 1), 0.3512)
    assert (row.name, row.giga_macs) == ("keep 0.3512", None)


@pytest.mark.slow
def test_davis_folder_gives_j(bundle, data, tmp_path):
    for name in ("scene_0000000000", "scene_0000000001"):
        (tmp_path / "JPEGImages").mkdir(exist_ok=True)
        (tmp_path / "JPEGImages" / name).symlink_to(data / "JPEGImages" / name)
        (tmp_path / "Annotations" / name).mkdir(parents=True)
        for t in range(5):
            index = np.zeros((96, 160), np.uint8)
            index[20:60, 30:90] = 1
            Image.fromarray(index, "L").save(tmp_path / "Annotations" / name / f"{t:05d}.png")
    loaded = load_bundle(bundle)
    row = evaluate(loaded, open_data(tmp_path, loaded.manifest.classes), 0.55)
    assert row.scores.keys() == {"J"} and 0 <= row.scores["J"] <= 100


@pytest.mark.slow
def test_published_network_without_class_names_gives_the_servers_archive(run, data, tmp_path):
    """A released checkpoint tells the number of its classes and may not tell their names: the data's are taken."""
    config = VppRovisConfig(
        classes=CLASSES, embed_dim=48, heads=3, stem_dim=8, map_hidden=20, selector_hidden=10, feature_dim=64,
        queries=7, track_queries=4, encoder_layers=1, encoder_ffn=48, decoder_layers=3, decoder_ffn=56,
    )  # fmt: skip
    weights = random_published(config)
    weights["detector.panoptic_head.cls_embed.bias"][3] += 4.0  # sees a star everywhere
    checkpoint = save_published(tmp_path / "epoch_6.pth", weights)
    export_bundle(ExportRequest(checkpoint, tmp_path / "bundle", model="vpp-rovis", image_size=SIZE, baseline=False))
    archive = tmp_path / "submission.zip"
    done = run(tmp_path / "bundle", data, "--keep-ratio", 0.55, "--no-dense", "--json", "--results", archive)
    assert done.exit_code == 0, done.output
    (row,) = json.loads(done.stdout)
    assert row["name"] == "keep 0.55" and 0 <= row["AP"] <= 100
    tracks = json.loads(zipfile.ZipFile(archive).read("results.json"))
    assert tracks and {track["category_id"] for track in tracks} == {4}
    assert all(len(track["segmentations"]) == 5 for track in tracks)


def test_other_classes_are_refused_with_both_named(data):
    with pytest.raises(SourceFormatError, match=r"1 classes \(dog\).*8 \(disc, square, triangle, \.\.\.\)"):
        open_data(data, ("dog",))


def test_missing_data_ends_with_2(run, micro_bundle, tmp_path):
    done = run(micro_bundle, tmp_path)
    assert done.exit_code == 2 and "no annotations" in done.output


def test_results_that_cannot_be_written_leave_nothing(tmp_path):
    from runtime.errors import SinkError

    with pytest.raises(SinkError, match="Create the folder first"):
        write_results(tmp_path / "no" / "r.zip", [])
    write_results(tmp_path / "r.json", [])
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


@pytest.mark.slow
def test_validation_scenes_are_the_same_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(validation, "CLIPS_CHOSEN_ON", 2)
    for name in ("one", "other"):
        write_validation(tmp_path / name, [1])
    for path in (tmp_path / "one").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "other" / path.relative_to(tmp_path / "one")).read_bytes()
    assert len(list((tmp_path / "one").rglob("*.jpg"))) == 2 * SCENES.frames == 72


def test_validation_set_has_at_least_64_clips_of_36_frames():
    assert len(validation.CHOSEN_ON) * validation.CLIPS_CHOSEN_ON >= 64 and validation.CLIPS_UNSEEN >= 64
    assert (SCENES.frames, SCENES.height, SCENES.width) == (36, 288, 512)
