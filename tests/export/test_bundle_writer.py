"""Bundles appear whole or not at all: whatever the export dies of, and whenever."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from export import bundle_folder, bundle_writer
from export.bundle_folder import replace_folder
from export.bundle_writer import ExportRequest, export_bundle
from models.pruned_host import Selection
from runtime.bundle import load_bundle
from runtime.errors import ExportMismatchError, SinkError

ROOT = Path(__file__).parents[2]

REPLACE_FOR_EVER = """
import sys
from pathlib import Path
from export.bundle_folder import replace_folder
print("ready", flush=True)
while True:
    replace_folder(*map(Path, sys.argv[1:]))
"""


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def opset(folder: Path) -> int:
    """The opset of a whole bundle; tells two of them apart."""
    return load_bundle(folder).manifest.opset


def with_opset(bundle: Path, copy: Path, number: int) -> Path:
    """A copy of a bundle that says it has another opset."""
    shutil.copytree(bundle, copy)
    text = (copy / "manifest.json").read_text()
    (copy / "manifest.json").write_text(text.replace('"opset": 20', f'"opset": {number}'))
    assert opset(copy) == number
    return copy


@pytest.fixture
def quick_export(monkeypatch, micro_bundle, micro_checkpoint):
    """``quick_export(output, opset=20)``: the real export, but graphs and vectors are copied from the micro bundle."""
    manifest = load_bundle(micro_bundle).manifest

    def copied_graph(model, path, selection, opset):
        shutil.copyfile(micro_bundle / path.name, path)
        return manifest.baseline if selection is Selection.NONE else manifest.graph

    monkeypatch.setattr(bundle_writer, "export_graph", copied_graph)
    monkeypatch.setattr(
        bundle_writer, "write_reference", lambda model, path, *rest: shutil.copyfile(micro_bundle / path.name, path)
    )
    monkeypatch.setattr(bundle_writer, "_check", lambda *arguments: {})

    def run(output: Path, **options: object) -> None:
        export_bundle(ExportRequest(micro_checkpoint, output, **options))

    return run


@contextmanager
def running(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A Python process that is killed at the end."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@contextmanager
def stopped(process: subprocess.Popen[str]) -> Iterator[None]:
    """Hold the process: what lies on the disk now is what would lie there if it were killed now."""
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    yield
    process.send_signal(signal.SIGCONT)


# Killed


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_export_leaves_the_older_bundle_and_the_next_one_clears_up(
    micro_bundle, micro_checkpoint, quick_export, tmp_path
):
    """The real command, held at many moments while it writes, then killed."""
    output = with_opset(micro_bundle, tmp_path / "bundle", 19)
    with running("deploy.py", "export", micro_checkpoint, "-o", output, "--no-baseline") as process:
        while not list(tmp_path.glob(".bundle.partial-*/initial_state.npz")):
            assert process.poll() is None, process.communicate()
            with stopped(process):
                assert opset(output) == 19
            time.sleep(random.uniform(0.0, 0.3))
    assert process.returncode == -signal.SIGKILL
    assert opset(output) == 19
    assert len(left_in(tmp_path)) == 2, "the partial folder of the killed export lies there"
    quick_export(output)
    assert left_in(tmp_path) == ["bundle"]
    assert opset(output) == 20


@pytest.mark.slow
def test_replacing_has_no_moment_without_a_bundle(micro_bundle, tmp_path):
    one, other = with_opset(micro_bundle, tmp_path / "one", 18), with_opset(micro_bundle, tmp_path / "other", 19)
    seen = set()
    with running("-c", REPLACE_FOR_EVER, one, other) as process:
        assert process.stdout.readline() == "ready\n"
        for _ in range(40):
            time.sleep(random.uniform(0.0, 0.01))
            with stopped(process):
                seen.add(opset(other))
                assert {opset(one), opset(other)} == {18, 19}
        assert process.poll() is None, process.communicate()
    assert seen == {18, 19}
    assert {opset(one), opset(other)} == {18, 19}


def test_partial_folder_of_a_running_export_is_left_alone(quick_export, tmp_path):
    with bundle_folder.partial_folder(tmp_path / "bundle") as folder:
        (folder / "model.onnx").touch()
        quick_export(tmp_path / "bundle")
        assert left_in(folder) == ["model.onnx"]
    assert left_in(tmp_path) == ["bundle"]


def test_other_bundles_leftovers_are_left_alone(quick_export, tmp_path):
    (tmp_path / ".bundle2.partial-abc").mkdir()
    (tmp_path / ".bundle.partial-abc").mkdir()
    quick_export(tmp_path / "bundle")
    assert left_in(tmp_path) == [".bundle2.partial-abc", "bundle"]


# Failed


@pytest.mark.parametrize("older", [False, True], ids=["", "over an older bundle"])
@pytest.mark.parametrize("step", ["export_graph", "write_reference", "file_sha256", "replace_folder"])
def test_full_disk_leaves_what_was_there(quick_export, micro_bundle, monkeypatch, tmp_path, step, older):
    if older:
        with_opset(micro_bundle, tmp_path / "bundle", 19)

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(bundle_writer, step, full)
    with pytest.raises(SinkError, match=r"bundle cannot be written: .*No space left on device") as raised:
        quick_export(tmp_path / "bundle")
    assert raised.value.exit_code == 2
    assert left_in(tmp_path) == ["bundle"] * older
    assert not older or opset(tmp_path / "bundle") == 19


@pytest.mark.parametrize("error", [ExportMismatchError, KeyboardInterrupt])
def test_export_that_is_wrong_or_interrupted_is_not_written(quick_export, monkeypatch, tmp_path, error):
    def fail(*arguments):
        raise error("as asked")

    monkeypatch.setattr(bundle_writer, "_check", fail)
    with pytest.raises(error):
        quick_export(tmp_path / "bundle")
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("content", ["a file", "a folder with files"])
def test_target_that_is_no_bundle_is_left_alone(quick_export, monkeypatch, tmp_path, content):
    """Said before any work is done."""
    target = tmp_path / "thesis"
    if content == "a file":
        target.write_text("five years")
    else:
        target.mkdir()
        (target / "chapter1.tex").write_text("five years")
    monkeypatch.setattr(bundle_writer, "export_graph", lambda *arguments: pytest.fail("work was done"))
    with pytest.raises(SinkError, match="is no bundle; it was left alone"):
        quick_export(target)
    assert left_in(tmp_path) == ["thesis"]
    assert (target if target.is_file() else target / "chapter1.tex").read_text() == "five years"


def test_target_under_a_file(quick_export, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SinkError, match="cannot be written"):
        quick_export(tmp_path / "file" / "bundle")
    assert left_in(tmp_path) == ["file"]


# Targets


def test_empty_folder_missing_parents_and_older_bundles_are_taken(quick_export, tmp_path):
    (tmp_path / "empty").mkdir()
    for target in (tmp_path / "empty", tmp_path / "new" / "deep" / "bundle", tmp_path / "empty"):
        quick_export(target)
        assert opset(target) == 20
        assert target.stat().st_mode & 0o777 == 0o755
        assert left_in(target.parent) in (["bundle"], ["empty"], ["empty", "new"])


def test_link_stays_a_link(quick_export, micro_bundle, tmp_path):
    with_opset(micro_bundle, tmp_path / "real", 19)
    (tmp_path / "link").symlink_to("real")
    quick_export(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert opset(tmp_path / "real") == 20
    assert left_in(tmp_path) == ["link", "real"]


def test_keep_ratio_is_a_preset_of_its_own_name(quick_export, tmp_path):
    quick_export(tmp_path / "bundle", keep_ratio=0.554)
    manifest = load_bundle(tmp_path / "bundle").manifest
    assert manifest.default_preset == "0.554"
    assert manifest.presets["0.55"] == (42, 32, 26, 20)
    quick_export(tmp_path / "bundle", keep_ratio=0.4)
    assert load_bundle(tmp_path / "bundle").manifest.default_preset == "0.40"


# Without an exchange in one step


@pytest.fixture
def no_exchange(monkeypatch):
    """A file system that cannot exchange two folders."""
    monkeypatch.setattr(bundle_folder, "_exchange", lambda one, other: False)


def test_exchange_works_here(micro_bundle, tmp_path):
    one, other = with_opset(micro_bundle, tmp_path / "one", 18), with_opset(micro_bundle, tmp_path / "other", 19)
    assert bundle_folder._exchange(one, other)
    assert (opset(one), opset(other)) == (19, 18)
    assert not bundle_folder._exchange(one, tmp_path / "nowhere")


@pytest.mark.parametrize("stale", [False, True], ids=["", "after a kill between two renames"])
def test_fallback_replaces_and_leaves_nothing(no_exchange, micro_bundle, tmp_path, stale):
    source, target = with_opset(micro_bundle, tmp_path / "new", 18), with_opset(micro_bundle, tmp_path / "bundle", 19)
    if stale:
        shutil.copytree(micro_bundle, tmp_path / ".bundle.older-bundle")
    replace_folder(source, target)
    assert opset(target) == 18
    assert left_in(tmp_path) == ["bundle"]


def test_fallback_puts_the_older_bundle_back(no_exchange, micro_bundle, tmp_path, monkeypatch):
    source, target = with_opset(micro_bundle, tmp_path / "new", 18), with_opset(micro_bundle, tmp_path / "bundle", 19)
    rename = Path.rename

    def refuse_the_new_one(self, other):
        if self == source:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, other)

    monkeypatch.setattr(Path, "rename", refuse_the_new_one)
    with pytest.raises(OSError, match="Input/output"):
        replace_folder(source, target)
    assert opset(target) == 19
    assert left_in(tmp_path) == ["bundle", "new"]
