"""``run`` with several sources and with a latency target, as a user calls it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

FRAMES = 12


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def other_clip(tmp_path, make_clip) -> Path:
    return make_clip(tmp_path / "other.mp4", frames=5, height=48, width=80)


def test_every_camera_has_its_own_files_and_its_own_line(cli, eager_bundle, clip, other_clip, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    sinks = "--output", folder / "o.mp4", "--results", folder / "r.json", "--json-lines", folder / "l.jsonl"
    sources = "--source", clip, "--source", other_clip
    out = cli("run", eager_bundle, *sources, "--threads", 1, "--video-id", 7, *sinks).check().out
    assert f"camera 0: {FRAMES} frames in" in out and "camera 1: 5 frames in" in out
    names = [f"{stem}-{number}{suffix}" for stem, suffix in (("l", ".jsonl"), ("o", ".mp4"), ("r", ".json"))
             for number in (0, 1)]  # fmt: skip
    assert sorted(path.name for path in folder.iterdir()) == names
    for number in (0, 1):
        assert f"camera {number}: written: {folder / f'o-{number}.mp4'}\n" in out
        tracks = json.loads((folder / f"r-{number}.json").read_text())
        assert {track["video_id"] for track in tracks} == {7 + number}
        assert {len(track["segmentations"]) for track in tracks} == {(FRAMES, 5)[number]}
    alone = tmp_path / "alone.jsonl"
    cli("run", eager_bundle, "--source", other_clip, "--threads", 1, "--json-lines", alone).check()
    timeless = [
        [{**line, "step_ms": 0, "latency_ms": 0} for line in lines_of(path)] for path in (alone, folder / "l-1.jsonl")
    ]
    assert timeless[0] == timeless[1]


def test_source_that_is_not_there_is_named_before_anything_starts(cli, micro_bundle, clip, tmp_path):
    missing, lines = tmp_path / "missing.mp4", tmp_path / "l.jsonl"
    ended = cli("run", micro_bundle, "--source", clip, "--source", missing, "--json-lines", lines)
    ended.refused("SourceNotFoundError", "missing.mp4")
    assert list(tmp_path.iterdir()) == []


def test_camera_that_breaks_off_is_said_and_ends_the_command_with_2_after_the_others(
    cli, micro_bundle, clip, make_clip, tmp_path, caplog
):
    import av

    broken = tmp_path / "broken.ts"
    with av.open(str(make_clip(tmp_path / "whole.mp4", frames=60))) as whole, av.open(str(broken), "w") as part:
        stream = part.add_stream_from_template(whole.streams.video[0])
        for packet in whole.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                part.mux(packet)
    broken.write_bytes(broken.read_bytes()[:-100])
    lines = tmp_path / "l.jsonl"
    options = "--threads", 1, "--json-lines", lines
    ended = cli("run", micro_bundle, "--source", broken, "--source", clip, *options)
    ended.refused("SourceLostError", "broken.ts")
    assert [record.getMessage()[:18] for record in caplog.records] == ["camera 0 has ended"]
    assert f"camera 1: {FRAMES} frames in" in ended.out
    assert len(lines_of(tmp_path / "l-1.jsonl")) == FRAMES
    assert 0 < len(lines_of(tmp_path / "l-0.jsonl")) <= 60


# --- latency target -------------------------------------------------------------------------------------------------


def test_target_within_reach_is_reported(cli, micro_bundle, clip, tmp_path):
    lines = tmp_path / "l.jsonl"
    options = "--threads", 1, "--latency-target-ms", 60000, "--json-lines", lines
    out = cli("run", micro_bundle, "--source", clip, *options).check().out
    assert re.search(rf"latency target 60000 ms: met by 100\.0% of {FRAMES} frames, 0 missed", out)
    assert re.search(rf"tokens computed: \d\d% on {FRAMES - 1} frames; 0 changes", out)
    assert [line["missed_target"] for line in lines_of(lines)] == [False] * FRAMES
    assert all(line["latency_ms"] >= line["step_ms"] > 0 for line in lines_of(lines))


def test_target_out_of_reach_goes_down_to_the_minimum_and_says_so(cli, micro_bundle, make_clip, tmp_path, caplog):
    lines, clip = tmp_path / "l.jsonl", make_clip(tmp_path / "clip.mp4", frames=80)
    options = "--threads", 1, "--latency-target-ms", 0.001, "--min-keep-ratio", 0.5, "--json-lines", lines
    ended = cli("run", micro_bundle, "--source", clip, *options).check()
    assert ["out of reach" in record.getMessage() for record in caplog.records] == [True]
    assert "met by 0.0% of 80 frames, 80 missed (1 of them without a prior)" in ended.out
    kept = [line["tokens_kept"] for line in lines_of(lines)]
    smallest = [40, 30, 22, 18]  # keep ratio 0.5
    assert kept[-1] == smallest and min(line[3] for line in kept) == smallest[3]
    assert [line["missed_target"] for line in lines_of(lines)] == [True] * 80


def test_keep_ratio_is_the_largest_with_a_target(cli, micro_bundle, make_clip, tmp_path):
    lines, clip = tmp_path / "l.jsonl", make_clip(tmp_path / "clip.mp4", frames=80)
    options = "--threads", 1, "--latency-target-ms", 60000, "--keep-ratio", 0.6, "--json-lines", lines
    cli("run", micro_bundle, "--source", clip, *options).check()
    assert lines_of(lines)[-1]["tokens_kept"] == [44, 36, 30, 24]  # keep ratio 0.6


def test_no_target_no_verdict(cli, micro_bundle, clip, tmp_path):
    lines = tmp_path / "l.jsonl"
    out = cli("run", micro_bundle, "--source", clip, "--threads", 1, "--json-lines", lines).check().out
    assert "latency target" not in out
    assert [line["missed_target"] for line in lines_of(lines)] == [None] * FRAMES


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--latency-target-ms", 0], ("latency target is 0", "above 0")),
        (["--latency-target-ms", 50, "--token-budget", "9,8,7,1"], ("--token-budget",)),
        (["--latency-target-ms", 50, "--min-keep-ratio", 0.7, "--keep-ratio", 0.6], ("0.7", "0.6")),
        (["--latency-target-ms", 50, "--min-keep-ratio", 0], ("(0, 1]",)),
        (["--min-keep-ratio", 0.5], ("--latency-target-ms",)),
    ],
    ids=lambda value: " ".join(map(str, value)),
)
def test_options_that_make_no_sense_together(cli, micro_bundle, clip, options, words):
    cli("run", micro_bundle, "--source", clip, *options).refused("TokenBudgetError", *words)


def test_target_needs_a_graph_that_takes_a_budget(cli, threshold_bundle, clip):
    options = "--latency-target-ms", 50
    cli("run", threshold_bundle, "--source", clip, *options).refused("TokenBudgetError", "--selection budget")
