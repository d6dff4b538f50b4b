"""Bad input: a clear message on stderr, exit code 2, no traceback, nothing half-written."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from models.checkpoints import load_checkpoint
from runtime.bundle import file_sha256
from runtime.manifest import SCHEMA_VERSION

torch.set_num_threads(1)

PATCHES = 60
NOT_THERE = Path("no") / "such" / "thing"


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class Dangerous:
    """Pickled, this makes a file when it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


# Checkpoints


@pytest.fixture
def export_fails(cli, tmp_path):
    """``export_fails(checkpoint, *options, words=...)``: export is refused and leaves nothing."""

    def run(checkpoint: Path, *options: object, words: tuple[str, ...]) -> str:
        (tmp_path / "out").mkdir()
        message = cli("export", checkpoint, "-o", tmp_path / "out" / "bundle", *options).refused(*words)
        assert left_in(tmp_path / "out") == []
        return message

    return run


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.pth", b""),
        ("text.safetensors", b"these are not weights"),
        ("zip.pth", b"PK\x03\x04 no archive"),
        ("header.safetensors", b"\xff\xff\xff\xff\xff\xff\xff\x7f{"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_not_a_checkpoint(export_fails, tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    export_fails(tmp_path / name, words=("CheckpointError", name))


def test_checkpoint_that_is_not_there(export_fails, tmp_path):
    export_fails(tmp_path / NOT_THERE, words=("CheckpointError", str(tmp_path / NOT_THERE)))


def test_folder_as_checkpoint(export_fails, tmp_path):
    export_fails(tmp_path, words=("CheckpointError", str(tmp_path)))


def test_truncated_checkpoint(export_fails, tmp_path, micro_checkpoint):
    (tmp_path / "cut.safetensors").write_bytes(micro_checkpoint.read_bytes()[:-1000])
    export_fails(tmp_path / "cut.safetensors", words=("CheckpointError", "cut.safetensors"))


def test_every_weight_that_does_not_fit_is_listed(export_fails, tmp_path, micro_checkpoint):
    weights = dict(load_checkpoint(micro_checkpoint).state_dict())
    missing = ["blocks.3.attn.qkv.weight", "queries"]
    missing = [name for name in weights if name in missing or name.startswith("blocks.11.")]
    for name in missing:
        del weights[name]
    weights |= {"head.weight": torch.zeros(2), "head.bias": torch.zeros(3)}
    weights["pos_embed"] = weights["pos_embed"][:, :-7]
    torch.save(weights, tmp_path / "odd.pth")
    message = export_fails(tmp_path / "odd.pth", "--model", "vpp-eo-micro", words=("CheckpointError", "odd.pth"))
    assert len(missing) > 5
    for name in [*missing, "head.weight", "head.bias", "pos_embed"]:
        assert re.search(rf"^\s+{re.escape(name)}\b", message, re.MULTILINE), name
    assert "(1, 53, 48) instead of (1, 60, 48)" in message


def test_pickle_that_would_run_code_is_not_run(export_fails, tmp_path):
    marker = tmp_path / "marker"
    with (tmp_path / "evil.pth").open("wb") as file:
        pickle.dump({"state_dict": Dangerous(marker)}, file, protocol=2)
    torch.save({"state_dict": Dangerous(marker)}, tmp_path / "evil-zip.pth")
    export_fails(
        tmp_path / "evil.pth", "--model", "vpp-eo-micro", words=("CheckpointError", "nothing in it was executed")
    )
    shutil.rmtree(tmp_path / "out")
    export_fails(tmp_path / "evil-zip.pth", words=("CheckpointError", "nothing in it was executed"))
    assert not marker.exists()
    pickle.loads(pickle.dumps(Dangerous(marker)))
    assert marker.exists(), "the pickle of this test is harmless: the test shows nothing"


def test_unknown_model_names_those_there_are(export_fails, tmp_path, micro_checkpoint):
    torch.save(load_checkpoint(micro_checkpoint).state_dict(), tmp_path / "bare.pth")
    export_fails(tmp_path / "bare.pth", "--model", "vit-b", words=("'vit-b'", "vpp-eo-micro", "vpp-eo-tiny"))
    shutil.rmtree(tmp_path / "out")
    export_fails(tmp_path / "bare.pth", words=("--model", "vpp-eo-micro"))
    shutil.rmtree(tmp_path / "out")
    export_fails(micro_checkpoint, "--model", "vpp-eo-tiny", words=("vpp-eo-micro", "vpp-eo-tiny"))


@pytest.mark.parametrize("size", [(100, 160), (96, 161), (0, 160), (-96, 160), (8, 8)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_image_size_that_the_patches_do_not_divide(export_fails, micro_checkpoint, size):
    export_fails(micro_checkpoint, "--image-size", *size, words=("ImageSizeError", f"{size[0]} x {size[1]}", "16"))


# Token budgets

BAD_BUDGETS = {
    "zero": ("0,0,0,0", "1..60"),
    "above N": ("61,10,10,10", "1..60"),
    "negative": ("-5,1,1,1", "1..60"),
    "not nested": ("30,31,10,10", "nested"),
    "too few": ("30,20", "4 counts"),
    "too many": ("30,20,10,5,4", "4 counts"),
    "nan": ("nan,1,1,1", "integer"),
    "float": ("30.5,20,10,5", "integer"),
    "infinite": ("inf,1,1,1", "integer"),
    "text": ("many", "integer"),
    "empty": ("", "integer"),
    "huge": ("99999999999999999999,1,1,1", "1..60"),
}
BAD_RATIOS = ["0", "nan", "1.5", "-0.5", "inf", "1.0000001"]


@pytest.mark.parametrize(("budget", "word"), BAD_BUDGETS.values(), ids=BAD_BUDGETS)
@pytest.mark.parametrize("command", ["export", "run"])
def test_token_budget_that_does_not_fit(
    cli, export_fails, micro_checkpoint, micro_bundle, clip, tmp_path, budget, word, command
):
    option = f"--token-budget={budget}"
    if command == "export":
        export_fails(micro_checkpoint, option, words=("TokenBudgetError", word))
    else:
        cli("run", micro_bundle, "--source", clip, "--output", tmp_path / "o.mp4", option).refused(
            "TokenBudgetError", word
        )
        assert left_in(tmp_path) == []


@pytest.mark.parametrize("ratio", BAD_RATIOS)
@pytest.mark.parametrize("command", ["export", "run"])
def test_keep_ratio_out_of_range(cli, export_fails, micro_checkpoint, micro_bundle, clip, tmp_path, ratio, command):
    option = f"--keep-ratio={ratio}"
    if command == "export":
        export_fails(micro_checkpoint, option, words=("TokenBudgetError", "(0, 1]"))
    else:
        cli("run", micro_bundle, "--source", clip, "--output", tmp_path / "o.mp4", option).refused(
            "TokenBudgetError", "(0, 1]"
        )
        assert left_in(tmp_path) == []


@pytest.mark.parametrize(
    "option", ["--keep-ratio=half", "--opset=3", "--opset=99", "--image-size=96", "--selection=magic", "--colour=red"]
)
def test_option_that_cannot_be(export_fails, micro_checkpoint, option):
    export_fails(micro_checkpoint, option, words=(option.split("=")[0],))


# Bundles

COMMANDS = {
    "inspect": (),
    "verify": (),
    "profile": ("--steps", "1"),
    "run": ("--source", "CLIP", "--results", "OUT"),
}  # fmt: skip


@pytest.fixture(params=COMMANDS)
def bundle_fails(request, cli, clip, tmp_path):
    """``bundle_fails(bundle, *words)``: each command that reads a bundle refuses it."""

    def run(bundle: Path, *words: str) -> None:
        names = {"CLIP": clip, "OUT": tmp_path / "results.json"}
        cli(request.param, bundle, *(names.get(word, word) for word in COMMANDS[request.param])).refused(*words)
        assert not [name for name in left_in(tmp_path) if "results" in name]

    return run


@pytest.mark.parametrize("file", ["model.onnx", "dense.onnx", "initial_state.npz", "reference.npz"])
def test_bundle_with_a_changed_byte(bundle_fails, own_bundle, file):
    content = bytearray((own_bundle / file).read_bytes())
    content[len(content) // 2] ^= 1
    (own_bundle / file).write_bytes(content)
    bundle_fails(own_bundle, "BundleIntegrityError", file, "export it again")


@pytest.mark.parametrize("file", ["model.onnx", "dense.onnx", "initial_state.npz", "reference.npz"])
def test_bundle_with_a_missing_file(bundle_fails, own_bundle, file):
    (own_bundle / file).unlink()
    bundle_fails(own_bundle, "BundleIntegrityError", file, "missing")


def test_bundle_of_a_newer_schema(bundle_fails, own_bundle):
    manifest = json.loads((own_bundle / "manifest.json").read_text())
    (own_bundle / "manifest.json").write_text(
        json.dumps(manifest | {"schema_version": SCHEMA_VERSION + 1, "new_field": 1})
    )
    bundle_fails(own_bundle, "BundleSchemaError", f"schema version {SCHEMA_VERSION + 1}", "Update")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "null", '{"schema_version": 1}', '{"schema_version": "1"}'])
def test_manifest_that_is_none(bundle_fails, own_bundle, content):
    (own_bundle / "manifest.json").write_text(content)
    bundle_fails(own_bundle, "BundleIntegrityError", "manifest.json")


def test_manifest_that_names_files_outside_the_bundle(bundle_fails, own_bundle, tmp_path):
    """A bundle from somebody else cannot make the program read another file of this machine as its graph."""
    manifest = json.loads((own_bundle / "manifest.json").read_text())
    shutil.move(own_bundle / "model.onnx", tmp_path / "outside.onnx")
    manifest["graph"]["file"] = "../outside.onnx"
    manifest["files"]["../outside.onnx"] = manifest["files"].pop("model.onnx")
    (own_bundle / "manifest.json").write_text(json.dumps(manifest))
    bundle_fails(own_bundle, "BundleIntegrityError", "../outside.onnx")


@pytest.mark.parametrize(
    "file",
    [
        "model.onnx",
        "initial_state.npz",
    ],
)
def test_file_that_is_damaged_under_a_right_hash(cli, own_bundle, file):
    manifest = json.loads((own_bundle / "manifest.json").read_text())
    (own_bundle / file).write_bytes(b"neither graph nor arrays")
    manifest["files"][file] = file_sha256(own_bundle / file)
    (own_bundle / "manifest.json").write_text(json.dumps(manifest))
    cli("verify", own_bundle).refused("Error", file)


def test_no_bundle(bundle_fails, tmp_path, clip):
    bundle_fails(tmp_path / NOT_THERE, "BundleError", "is not there", "deploy.py export")
    bundle_fails(tmp_path, "BundleError", "manifest.json", "deploy.py export")
    bundle_fails(clip, "BundleError", str(clip))


@pytest.mark.parametrize("backend", ["onnxruntime-cuda", "abacus"])
@pytest.mark.parametrize("command", ["verify", "profile", "run"])
def test_backend_that_is_not_there(cli, micro_bundle, clip, tmp_path, backend, command):
    options = ["--source", clip, "--output", tmp_path / "o.mp4"] if command == "run" else []
    cure = "pip install" if backend != "abacus" else "onnxruntime"
    cli(command, micro_bundle, "--backend", backend, *options).refused("BackendUnavailableError", cure)
    assert left_in(tmp_path) == []


# Sources and results


@pytest.fixture
def run(cli, micro_bundle, tmp_path):
    """``run(source)``: run into ``tmp_path / "out"``, with every sink."""
    (tmp_path / "out").mkdir()

    def start(source: object):
        folder = tmp_path / "out"
        sinks = "--output", folder / "o.mp4", "--results", folder / "r.json", "--json-lines", folder / "l.jsonl"
        return cli("run", micro_bundle, "--source", source, "--threads", 1, *sinks)

    return start


def check_outputs(folder: Path, frames: int) -> None:
    """All three files are there, whole, and hold this many frames."""
    assert left_in(folder) == ["l.jsonl", "o.mp4", "r.json"]
    lines = [json.loads(line) for line in (folder / "l.jsonl").read_text().splitlines()]
    assert [line["frame_index"] for line in lines] == list(range(frames))
    tracks = json.loads((folder / "r.json").read_text())
    assert all(len(track["segmentations"]) == frames for track in tracks)
    with av.open(str(folder / "o.mp4")) as video:
        assert sum(1 for _ in video.decode(video=0)) == frames


@pytest.mark.parametrize("kind", ["nothing there", "text", "empty", "empty folder", "sound", "no such camera"])
def test_source_that_is_no_video(run, tmp_path, kind):
    source = tmp_path / "source.mp4"
    if kind in ("text", "empty"):
        source.write_text("not a video " * (kind == "text"))
    elif kind == "empty folder":
        source.mkdir()
    elif kind == "sound":
        source = source.with_suffix(".wav")
        with av.open(str(source), "w") as container:
            stream = container.add_stream("pcm_s16le", 8000)
            sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
            sound.sample_rate, sound.time_base = 8000, Fraction(1, 8000)
            container.mux(stream.encode(sound))
            container.mux(stream.encode(None))
    elif kind == "no such camera":
        source = Path("/dev/video99")
    error = "SourceNotFoundError" if kind in ("nothing there", "no such camera") else "SourceFormatError"
    run(source).refused(error, str(source))
    assert left_in(tmp_path / "out") == []


def test_source_that_ends_mid_frame_keeps_what_came_before(run, make_clip, tmp_path):
    """An MP4 whose index comes first, cut off in the middle."""
    source = make_clip(tmp_path / "whole.mp4", frames=40)
    fast = tmp_path / "cut.mp4"
    with av.open(str(source)) as whole, av.open(str(fast), "w", options={"movflags": "faststart"}) as out:
        stream = out.add_stream_from_template(whole.streams.video[0])
        for packet in whole.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                out.mux(packet)
    content = fast.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")
    fast.write_bytes(content[: content.index(b"mdat") + (len(content) - content.index(b"mdat")) // 2])
    ended = run(fast)
    message = ended.refused("SourceLostError", "cut.mp4")
    frames = int(re.search(r"after (\d+) frames", message)[1])
    assert 5 < frames < 40
    assert f"{frames} frames in" in ended.out
    check_outputs(tmp_path / "out", frames)


def test_source_that_changes_resolution_is_reset_and_counted(cli, micro_bundle, tmp_path):
    from PIL import Image

    (tmp_path / "images").mkdir()
    for index in range(6):
        size = (128, 72) if index < 3 else (96, 96)
        Image.new("RGB", size, (90, 120, 150)).save(tmp_path / "images" / f"{index}.png")
    lines = tmp_path / "l.jsonl"
    ended = cli("run", micro_bundle, "--source", tmp_path / "images", "--json-lines", lines, "--threads", 1).check()
    assert "6 frames in" in ended.out
    assert "1 x resolution change" in ended.out
    reasons = [json.loads(line)["reset_reason"] for line in lines.read_text().splitlines()]
    assert reasons == ["first frame", None, None, "resolution change", None, None]


@pytest.mark.parametrize("where", ["under a file", "no folder", "a folder's name"])
@pytest.mark.parametrize("sink", ["--output", "--results", "--json-lines"])
def test_output_that_cannot_be_written(cli, micro_bundle, clip, tmp_path, where, sink):
    (tmp_path / "file").touch()
    (tmp_path / "folder.mp4").mkdir()
    name = {"under a file": "file/o.mp4", "no folder": "none/o.mp4", "a folder's name": "folder.mp4"}[where]
    cli("run", micro_bundle, "--source", clip, sink, tmp_path / name).refused("SinkError", name)
    assert left_in(tmp_path) == ["file", "folder.mp4"]


def test_one_output_that_cannot_be_written_stops_all(cli, micro_bundle, clip, tmp_path):
    outputs = "--output", tmp_path / "o.mp4", "--results", tmp_path / "none" / "r.json"
    cli("run", micro_bundle, "--source", clip, *outputs).refused("SinkError", "r.json")
    assert left_in(tmp_path) == []


def test_video_format_that_does_not_exist(cli, micro_bundle, clip, tmp_path):
    cli("run", micro_bundle, "--source", clip, "--output", tmp_path / "o.docx").refused("o.docx")
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("older", [False, True], ids=["", "over older files"])
def test_disk_full_while_running(run, make_clip, tmp_path, disk_of, older):
    """No room for the first results: the run ends there."""
    names = ["l.jsonl", "o.mp4", "r.json"] if older else []
    source = make_clip(tmp_path / "long.mp4", frames=60)
    for name in names:
        (tmp_path / "out" / name).write_text("older")
    with disk_of(1_000):
        ended = run(source)
    ended.refused("SinkError", "cannot be written")
    assert left_in(tmp_path / "out") == names
    assert {(tmp_path / "out" / name).read_text() for name in names} <= {"older"}


def test_disk_full_when_the_video_is_finished(cli, micro_bundle, make_clip, tmp_path, disk_of):
    """The encoder holds the pictures back, so there is no room at the very end only."""
    source = make_clip(tmp_path / "large.mp4", frames=20, height=288, width=512)
    (tmp_path / "o.mp4").write_text("older")
    with disk_of(10_000):
        ended = cli("run", micro_bundle, "--source", source, "--threads", 1, "--output", tmp_path / "o.mp4")
    ended.refused("SinkError", "o.mp4")
    assert left_in(tmp_path) == ["large.mp4", "o.mp4"]
    assert (tmp_path / "o.mp4").read_text() == "older"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_disk_full_while_exporting(cli, micro_checkpoint, tmp_path, disk_of):
    (tmp_path / "out").mkdir()
    with disk_of(10_000):
        ended = cli("export", micro_checkpoint, "-o", tmp_path / "out" / "bundle", "--dense")
    ended.refused("SinkError", "bundle", "Nothing was changed")
    assert left_in(tmp_path / "out") == []
