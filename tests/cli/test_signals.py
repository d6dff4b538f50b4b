"""SIGINT and SIGTERM in the middle of a run: what was written is complete, and the command ends soon, with code 0."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import av
import pytest

pytestmark = pytest.mark.slow

FRAMES = 6000  # far more than are done when the signal comes
SOON_S = 10.0


@pytest.fixture(scope="module")
def long_clip(tmp_path_factory, make_clip) -> Path:
    return make_clip(tmp_path_factory.mktemp("long") / "long.mp4", frames=FRAMES)


def wait_for_lines(folder: Path, count: int, process) -> None:
    """Until the JSON Lines sink has written ``count`` frames; it writes each out at once."""
    for _ in range(6000):
        parts = list(folder.glob(".*.jsonl"))
        if parts and parts[0].read_bytes().count(b"\n") >= count:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    raise TimeoutError(f"no {count} frames were written")


def frames_in(folder: Path) -> int:
    """Frames in the three files, which agree; every frame of the video decodes."""
    lines = [json.loads(line) for line in (folder / "l.jsonl").read_text().splitlines()]
    assert [line["frame_index"] for line in lines] == list(range(len(lines)))
    tracks = json.loads((folder / "r.json").read_text())
    assert {len(track["segmentations"]) for track in tracks} == {len(lines)}
    with av.open(str(folder / "o.mp4")) as video:
        assert sum(1 for _ in video.decode(video=0)) == len(lines)
    return len(lines)


def start(cli_process, bundle: Path, clip: Path, folder: Path, *options: object):
    sinks = "--output", folder / "o.mp4", "--results", folder / "r.json", "--json-lines", folder / "l.jsonl"
    return cli_process("run", bundle, "--source", clip, "--threads", 1, *sinks, *options)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_interrupted_run_leaves_complete_files(cli_process, eager_bundle, long_clip, tmp_path, number):
    process = start(cli_process, eager_bundle, long_clip, tmp_path)
    wait_for_lines(tmp_path, 20, process)
    process.send_signal(number)
    sent = time.monotonic()
    out, err = process.communicate(timeout=60)
    took = time.monotonic() - sent
    assert process.returncode == 0, err
    assert "Traceback" not in err
    assert "interrupted" in out
    frames = frames_in(tmp_path)
    assert 20 <= frames < FRAMES
    assert f"{frames} frames in" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["l.jsonl", "o.mp4", "r.json"]
    assert took < SOON_S


def test_impatient_second_signal_does_not_break_the_files(cli_process, eager_bundle, long_clip, tmp_path):
    """SIGINT again and again while the files are being finished: complete files, or none; never a broken one."""
    process = start(cli_process, eager_bundle, long_clip, tmp_path)
    wait_for_lines(tmp_path, 20, process)
    for _ in range(3):
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)
    _, err = process.communicate(timeout=60)
    visible = {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")}
    if "o.mp4" in visible:
        with av.open(str(tmp_path / "o.mp4")) as video:
            assert sum(1 for _ in video.decode(video=0)) >= 20
    if "r.json" in visible:
        json.loads((tmp_path / "r.json").read_text())
    assert "Traceback" not in err


def test_killed_run_leaves_the_older_files(cli_process, eager_bundle, long_clip, tmp_path):
    for name in ("o.mp4", "r.json", "l.jsonl"):
        (tmp_path / name).write_text("older")
    process = start(cli_process, eager_bundle, long_clip, tmp_path)
    wait_for_lines(tmp_path, 5, process)
    process.kill()
    process.communicate()
    assert {(tmp_path / name).read_text() for name in ("o.mp4", "r.json", "l.jsonl")} == {"older"}
