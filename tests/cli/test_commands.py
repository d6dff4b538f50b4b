"""Every command as a user calls it, on good input: output, files, exit codes, help."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import onnx
import pytest
import typer
from pycocotools import mask as coco_mask

import deploy
from runtime.bundle import file_sha256, load_bundle

ROOT = Path(__file__).parents[2]
FRAMES = 12
COMMANDS = typer.main.get_command(deploy.app).commands  # type: ignore[attr-defined]

decodes_masks = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools' decode


def perturbed(bundle: Path, copy: Path, weight: np.ndarray) -> Path:
    """A copy of a bundle with one weight of its graph doubled, under a right hash."""
    shutil.copytree(bundle, copy)
    model = onnx.load(copy / "model.onnx")
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    (name,) = [
        name for name, array in arrays.items() if np.array_equal(array, weight) or np.array_equal(array, weight.T)
    ]
    (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == name]
    tensor.CopyFrom(onnx.numpy_helper.from_array(2 * arrays[name], name))
    onnx.save(model, copy / "model.onnx")
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["files"]["model.onnx"] = file_sha256(copy / "model.onnx")
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return copy


def lines_of(path: Path) -> list[dict]:
    """JSON Lines without the times that were measured."""
    return [{**json.loads(line), "step_ms": 0, "latency_ms": 0} for line in path.read_text().splitlines()]


def pictures(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as video:
        return [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]


# The way of a model: export, inspect, verify, profile, run


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_from_checkpoint_to_video(cli, micro_checkpoint, clip, tmp_path):
    bundle = tmp_path / "bundle"
    options = "--token-budget", "30,20,10,5", "--no-baseline", "--opset", "19", "--image-size", 96, 128
    exported = cli("export", micro_checkpoint, "-o", bundle, *options).check()
    assert [line.split(":")[0] for line in exported.out.splitlines()] == [
        "smallest",
        "usual",
        "largest",
        "bundle written",
    ]
    assert exported.out.count("8 frames agree with torch within") == 3
    manifest = load_bundle(bundle).manifest
    assert (manifest.opset, manifest.image_size, manifest.default_preset) == (19, (96, 128), "custom")
    assert manifest.presets["custom"] == (30, 20, 10, 5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle"]
    cli("verify", bundle).check()
    assert "12 frames in" in cli("run", bundle, "--source", clip, "--json-lines", tmp_path / "l.jsonl").check().out
    assert [line["tokens_kept"] for line in lines_of(tmp_path / "l.jsonl")] == [[48, 20, 10, 5]] + 11 * [
        [30, 20, 10, 5]
    ]


def test_inspect_tells_what_the_bundle_is(cli, micro_bundle):
    out = cli("inspect", micro_bundle).check().out
    manifest = load_bundle(micro_bundle).manifest
    for word in ["vpp-eo-micro", "96 x 160", "6 x 10 = 60 patches", "0.55 (default)", "micro.safetensors", "opset 20"]:
        assert word in out, word
    for tensor in [*manifest.graph.inputs, *manifest.graph.outputs]:
        assert re.search(rf"{re.escape(tensor.name)}\s+{tensor.dtype}", out), tensor.name
    assert "from next_prior.keys" in out
    for name, digest in manifest.files.items():
        assert re.search(rf"{re.escape(name)}\s+{digest}", out), name


def test_inspect_as_json_is_the_manifest(cli, micro_bundle):
    assert json.loads(cli("inspect", micro_bundle, "--json").check().out) == json.loads(
        (micro_bundle / "manifest.json").read_text()
    )


def test_verify_agrees_and_names_every_tensor(cli, micro_bundle):
    out = cli("verify", micro_bundle, "--threads", 1).check().out
    for name in ["class_logits", "mask_logits", "next_prior.keys", "next_prior.queries"]:
        assert re.search(rf"{re.escape(name)}\s+\d\.\de-\d\d\s+\d+ dB", out), name
    for name, budget in load_bundle(micro_bundle).manifest.presets.items():
        assert re.search(rf"{name}\s+{' / '.join(map(str, budget))}\s+\d", out), name
    assert "frames agree within 1e-04 on onnxruntime" in out


@pytest.mark.parametrize(
    ("weight", "words"),
    [("mask_head.classify.weight", "class_logits differs by"), ("selectors.2.mlp.fc1.weight", "stage 3")],
)
def test_verify_of_another_model_ends_with_1(cli, micro_bundle, micro_model, tmp_path, weight, words):
    bundle = perturbed(micro_bundle, tmp_path / "other", micro_model.get_parameter(weight).detach().numpy())
    cli("verify", bundle, "--threads", 1).refused("ExportMismatchError", "frame ", words, code=1)


def test_verify_as_json_also_of_another_model(cli, micro_bundle, micro_model, tmp_path):
    assert json.loads(cli("verify", micro_bundle, "--threads", 1, "--json").check().out)["passed"]
    weight = micro_model.get_parameter("mask_head.classify.weight").detach().numpy()
    ended = cli("verify", perturbed(micro_bundle, tmp_path / "other", weight), "--threads", 1, "--json")
    ended.refused("ExportMismatchError", code=1)
    assert not json.loads(ended.out)["passed"]


@pytest.mark.parametrize("options", [[], ["--dense", "--frame", 0]], ids=["budget", "dense"])
def test_verify_layer_by_layer(cli, micro_bundle, options):
    pytest.importorskip("onnx_graphsurgeon", reason="polygraphy needs it: pip install '.[layers]'")
    out = cli("verify", micro_bundle, "--threads", 1, "--layers", *options).check().out
    assert re.search(r"0 of \d{3} tensors are below 80 dB, the lowest above", out)
    assert len(re.findall(r"^\S+ +\w+ +\S+ +(?:\d+\.\d|inf) dB", out, re.MULTILINE)) == 10


@pytest.mark.slow
def test_acceptance_report_of_the_command_line(cli, own_bundle, tmp_path, monkeypatch):
    """One backend that is here and one that is not; the others are tried in test_acceptance."""
    monkeypatch.setattr("runtime.acceptance.BACKENDS", dict.fromkeys(("onnxruntime", "nonsense")))
    report = tmp_path / "report.json"
    out = cli("doctor", "--acceptance", own_bundle, "--steps", 1, "--output", report).check().out
    assert f"passed   {own_bundle} onnxruntime" in out and "keep 0.55: p50" in out
    assert "not here" in out and "no backend is called 'nonsense'" in out and f"written: {report}" in out
    assert json.loads(report.read_text())["finished"]


def test_acceptance_of_no_bundle_is_refused(cli, tmp_path):
    cli("doctor", "--acceptance", tmp_path, "--output", tmp_path / "report.json").refused("no bundle")
    assert list(tmp_path.iterdir()) == []


def test_verify_with_another_tolerance(cli, micro_bundle):
    cli("verify", micro_bundle, "--threads", 1, "--tolerance", 1e-12).refused("allowed 1e-12", code=1)


def test_run_warns_until_the_engine_was_verified(cli, own_bundle, clip, tmp_path, caplog):
    def warning() -> str:
        caplog.clear()
        cli("run", own_bundle, "--source", clip, "--threads", 1, "--json-lines", tmp_path / "l.jsonl").check()
        return caplog.text

    assert warning() == ""  # the export compared it with torch
    (own_bundle / "verified.json").unlink()
    for _ in range(2):  # not only the first time
        assert f"Run once: deploy.py verify {own_bundle} --backend onnxruntime" in warning()
    cli("verify", own_bundle, "--tolerance", 0.5).check()
    assert "has not been verified" in warning()  # any engine would have passed
    cli("verify", own_bundle, "--threads", 2).check()
    assert warning() == ""


def test_profile_as_json(cli, micro_bundle, clip):
    options = "--threads", 1, "--steps", 2, "--warm-up", 1, "--source", clip, "--json"
    profile = json.loads(cli("profile", micro_bundle, *options).check().out)
    assert [row["name"] for row in profile["rows"]] == ["dense", "keep 0.40", "keep 0.55", "keep 0.70", "keep 1.00"]
    assert profile["rows"][0]["speed_up"] == 1.0
    assert profile["rows"][2]["token_budget"] == [42, 32, 26, 20]
    for row in profile["rows"]:
        assert 0 < row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"]
    assert {"decode", "resize", "infer", "tracks", "masks", "overlay"} <= profile["stages_ms"].keys()
    assert profile["stages_ms"]["decode"] > 0
    assert {"Map-SM", "mask head"} <= {part["name"] for part in profile["parts"]}


def test_profile_as_table_and_as_a_page(cli, micro_bundle, tmp_path):
    page = tmp_path / "report.html"
    out = cli("profile", micro_bundle, "--threads", 1, "--steps", 1, "--warm-up", 0, "--report", page).check().out
    assert re.search(r"dense\s+all, no selection.*1\.00x", out)
    assert re.search(r"keep 0\.55\s+42 / 32 / 26 / 20", out)
    assert re.search(r"Map-SM\s+0\.00", out) and "Ceiling of this machine" in out
    assert f"written: {page}" in out and "Map-SM" in page.read_text()


@decodes_masks
def test_run_writes_every_frame_the_same_each_time(cli, eager_bundle, clip, tmp_path):
    for turn in ("a", "b"):
        sinks = "--output", tmp_path / f"{turn}.mp4", "--results", tmp_path / f"{turn}.json"
        lines = "--json-lines", tmp_path / f"{turn}.jsonl"
        out = cli("run", eager_bundle, "--source", clip, "--threads", 1, "--video-id", 7, *sinks, *lines).check().out
        assert f"{FRAMES} frames in" in out and "without a prior: 1 x first frame" in out
        assert [f"written: {tmp_path / turn}.{suffix}" in out for suffix in ("mp4", "json", "jsonl")] == [True] * 3
    lines = lines_of(tmp_path / "a.jsonl")
    assert [line["frame_index"] for line in lines] == list(range(FRAMES))
    assert [line["tokens_kept"] for line in lines] == [[60, 32, 26, 20]] + (FRAMES - 1) * [[42, 32, 26, 20]]
    assert lines == lines_of(tmp_path / "b.jsonl")
    shown = pictures(tmp_path / "a.mp4")
    assert [picture.shape for picture in shown] == [(72, 128, 3)] * FRAMES
    np.testing.assert_array_equal(shown, pictures(tmp_path / "b.mp4"))
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    tracks = json.loads((tmp_path / "a.json").read_text())
    assert tracks, "no object was seen: this test shows nothing"
    for track in tracks:
        assert track.keys() == {"video_id", "category_id", "score", "segmentations"}
        assert track["video_id"] == 7 and 1 <= track["category_id"] <= 8 and 0 < track["score"] <= 1
        assert len(track["segmentations"]) == FRAMES
        seen = [encoded for encoded in track["segmentations"] if encoded is not None]
        assert seen and all(encoded["size"] == [72, 128] and coco_mask.decode(encoded).any() for encoded in seen)


def test_run_with_another_budget(cli, micro_bundle, clip, tmp_path):
    lines = tmp_path / "l.jsonl"
    cli("run", micro_bundle, "--source", clip, "--threads", 1, "--json-lines", lines, "--keep-ratio", 0.2).check()
    assert lines_of(lines)[1]["tokens_kept"] == [18, 12, 8, 6]
    cli(
        "run", micro_bundle, "--source", clip, "--threads", 1, "--json-lines", lines, "--token-budget", "9,8,7,1"
    ).check()
    assert lines_of(lines)[1]["tokens_kept"] == [9, 8, 7, 1]


def test_paths_are_printed_as_they_are(cli, micro_bundle, clip, tmp_path):
    """Brackets are no markup, and a long path is one line."""
    folder = tmp_path / ("long" * 40) / "[red]a" / "["
    folder.mkdir(parents=True)  # with the file's name: [red]a/[/red].jsonl
    out = cli("run", micro_bundle, "--source", clip, "--threads", 1, "--json-lines", folder / "red].jsonl").check().out
    assert f"written: {folder / 'red].jsonl'}\n" in out


def test_doctor_says_what_is_here(cli):
    out = cli("doctor").check().out
    assert re.search(r"ok\s+backend onnxruntime: ", out)
    assert re.search(r"(missing|problem)\s+backend onnxruntime-cuda: |ok\s+backend onnxruntime-cuda: ", out)


def test_log_goes_to_stderr(cli, micro_bundle, clip):
    ended = cli("--verbose", "run", micro_bundle, "--source", clip, "--threads", 1).check()
    assert "runs without a prior" not in ended.out


# Help and the command line itself


def test_the_commands_there_are():
    assert set(COMMANDS) == {"export", "calibrate", "build", "run", "verify", "profile", "inspect", "doctor"}


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_tells_every_option_and_an_example_that_parses(cli, name):
    command = COMMANDS[name]
    out = cli(name, "--help").check().out
    assert command.help.splitlines()[0] in out
    for parameter in command.params:
        assert getattr(parameter, "help", None), f"{name} {parameter.name} has no help text"
        if parameter.param_type_name == "option":
            assert parameter.opts[0] in out
    example = command.epilog.removeprefix(f"Example: deploy.py {name}")
    assert example != command.epilog and command.epilog in out
    command.make_context(name, shlex.split(example))


@pytest.mark.parametrize(
    ("name", "option", "words"),
    [
        ("export", "image_size", ("Height and width", "pixels", "multiples", "Default")),
        ("export", "keep_ratio", ("above 0, up to 1",)),
        ("export", "token_budget", ("1 to N",)),
        ("export", "opset", ("18 to 22",)),
        ("run", "keep_ratio", ("above 0, up to 1", "Default")),
        ("run", "token_budget", ("1 to N", "e.g.")),
        ("run", "threads", ("CPU threads", "0: one per physical core")),
        ("run", "frame_rate", ("per second", "default 30")),
        ("verify", "tolerance", ("over its largest value",)),
    ],
)
def test_help_of_numbers_has_unit_range_and_default(name, option, words):
    (parameter,) = [parameter for parameter in COMMANDS[name].params if parameter.name == option]
    assert [word for word in words if word not in parameter.help] == []


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"]], ids=" ".join)
def test_help_ends_with_0(cli, arguments):
    assert "Usage" in cli(*arguments).check().out


@pytest.mark.parametrize("arguments", [["fly"], ["inspect"], ["run", "bundle"], ["inspect", "a", "b"]], ids=" ".join)
def test_wrong_usage_ends_with_2(cli, arguments):
    cli(*arguments).refused("Usage")


def test_loads_without_torch_and_says_what_export_needs(tmp_path):
    blocked = "import sys; sys.modules.update(torch=None, onnx=None); import deploy; deploy.main()"
    command = [sys.executable, "-c", blocked, "export", "x.safetensors", "-o", str(tmp_path / "bundle")]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert "torch" in ended.stderr and "pip install '.[export]'" in ended.stderr
