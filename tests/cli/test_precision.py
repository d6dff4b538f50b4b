"""``export --precision`` and ``calibrate`` as a user calls them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from runtime.bundle import load_bundle


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def calibrate_fails(cli, micro_bundle, tmp_path):
    """``calibrate_fails(*options, words=...)``: refused, and nothing is left."""

    def run(*options: object, words: tuple[str, ...]) -> None:
        (tmp_path / "out").mkdir(exist_ok=True)
        cli("calibrate", micro_bundle, "-o", tmp_path / "out" / "int8", *options).refused(*words)
        assert left_in(tmp_path / "out") == []

    return run


def test_calibrated_bundle_is_inspected_and_run(cli, micro_bundle, clip, tmp_path):
    bundle = Path(shutil.copytree(micro_bundle, tmp_path / "micro"))
    options = "--frames", 8, "--keep-ratio", 0.4, "--keep-ratio", 0.55, "--rest", "fp16", "--threads", 1
    made = cli("calibrate", bundle, "--source", clip, *options).check()
    assert f"bundle written: {tmp_path / 'micro-int8'}" in made.out
    assert "linear layers quantized" in made.out and "against fp32, 16 frames" in made.out
    assert left_in(tmp_path) == ["micro", "micro-int8"]
    assert "int8 and fp16" in cli("inspect", tmp_path / "micro-int8").check().out
    assert "12 frames in" in cli("run", tmp_path / "micro-int8", "--source", clip, "--threads", 1).check().out
    table = json.loads((tmp_path / "micro-int8" / "calibration.json").read_text())
    assert [stream["token_budget"][0] for stream in table["streams"]] == [36, 42]


@pytest.mark.slow
def test_sensitivity_is_printed_worst_first(cli, micro_bundle, clip, tmp_path):
    options = "--frames", 8, "--sensitivity", "--threads", 1, "-o", tmp_path / "int8"
    shown = cli("calibrate", micro_bundle, "--source", clip, *options).check().out
    assert "error alone" in shown
    errors = [
        layer["error"] for layer in json.loads((tmp_path / "int8" / "calibration.json").read_text())["layers"].values()
    ]
    rows = [line for line in shown.splitlines() if line.strip().endswith("%") or " % " in line][1:4]
    assert f"{100 * max(errors):.2f} %" in rows[0] + shown.splitlines()[1]


def test_videos_that_cannot_be_calibrated_on(calibrate_fails, make_clip, tmp_path):
    one = make_clip(tmp_path / "one.mp4", frames=1)
    calibrate_fails("--source", one, "--frames", 8, words=("CalibrationError", "only 1 of 8 frames", "longer video"))
    short = make_clip(tmp_path / "short.mp4", frames=10)
    calibrate_fails("--source", short, words=("only 10 of 64 frames", "--frames 10"))
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(short.read_bytes()[:600])
    calibrate_fails("--source", cut, words=("cut.mp4",))
    calibrate_fails("--source", tmp_path / "none.mp4", words=("none.mp4", "no such file"))


def test_options_that_cannot_be(calibrate_fails, clip):
    calibrate_fails(words=("--source", "--table", "one of the two"))
    calibrate_fails("--source", clip, "--precision", "fp16", words=("'fp16'", "int8 and fp8", "export"))
    calibrate_fails("--source", clip, "--rest", "int8", words=("'int8'", "fp32, fp16 and bf16"))
    calibrate_fails("--source", clip, "--method", "guess", words=("'guess'", "minmax"))
    calibrate_fails("--source", clip, "--keep-ratio", 2, words=("keep ratio is 2",))


def test_export_refuses_int8_with_the_way_to_it(cli, micro_checkpoint, tmp_path):
    fails = cli("export", micro_checkpoint, "-o", tmp_path / "out", "--precision", "int8")
    fails.refused("'int8'", "fp32, fp16 and bf16", "deploy.py calibrate")
    assert left_in(tmp_path) == []


@pytest.mark.slow
def test_export_in_fp16(cli, micro_checkpoint, tmp_path):
    options = "--precision", "fp16", "--no-baseline"
    shown = cli("export", micro_checkpoint, "-o", tmp_path / "fp16", *options).check().out
    assert "fp16: error of class_logits" in shown and "8 frames against torch" in shown
    manifest = load_bundle(tmp_path / "fp16").manifest
    assert (manifest.precision, manifest.rest_precision) == ("fp16", "fp16")
    cli("calibrate", tmp_path / "fp16", "--source", "any.mp4").refused("is in fp16 already")
