"""Windows of a data set and delays of entering objects, on tracks drawn by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest
from pycocotools import mask as rle

from models.training.average_precision import TrackEvaluation
from models.training.scenes import SceneConfig, render_clip, write_youtube_vis
from models.training.track_windows import Window, after_cuts, cut_out, detection_delays
from models.training.youtube_vis import YouTubeVis

FRAMES = 6


def code(left: int) -> dict:
    mask = np.zeros((8, 40), np.uint8, order="F")
    mask[:, left : left + 8] = 1
    return rle.encode(mask)


def track(video: int, shown: dict[int, int], **more) -> dict:
    """A box 8 pixels wide, at ``shown[t]`` in frame t."""
    masks = [code(shown[t]) if t in shown else None for t in range(FRAMES)]
    return {"video_id": video, "category_id": 1, "segmentations": masks, **more}


@pytest.fixture
def truth():
    names = [f"a/{t}.jpg" for t in range(FRAMES)]
    return {
        "categories": [{"id": 1, "name": "box"}],
        "videos": [
            {"id": 1, "height": 8, "width": 40, "file_names": names, "cuts": [3]},
            {"id": 2, "height": 8, "width": 40, "file_names": names},
        ],
        "annotations": [
            track(1, dict.fromkeys(range(3), 0), id=1, iscrowd=0),
            track(1, dict.fromkeys(range(3, 6), 20), id=2, iscrowd=0),
            track(2, dict.fromkeys(range(6), 0), id=3, iscrowd=0),
            track(2, dict.fromkeys(range(2, 6), 20), id=4, iscrowd=0),
        ],
    }


def test_window_holds_its_frames_and_the_tracks_seen_in_them(truth):
    results = [track(1, dict.fromkeys(range(6), 20), score=0.9), track(2, {0: 0}, score=0.8)]
    part, found = cut_out(truth, results, [Window(1, 3, 6), Window(2, 1, 6, every=2)])
    assert [len(video["file_names"]) for video in part["videos"]] == [3, 3]
    assert part["videos"][1]["file_names"] == ["a/1.jpg", "a/3.jpg", "a/5.jpg"]
    assert [(t["video_id"], len(t["segmentations"])) for t in part["annotations"]] == [(1, 3), (2, 3), (2, 3)]
    assert [t["video_id"] for t in found] == [1]
    assert TrackEvaluation(part, found).scores().ap50 > 0
    assert truth["annotations"][1]["video_id"] == 1 and len(truth["annotations"][1]["segmentations"]) == FRAMES


def test_windows_after_cuts(truth):
    assert after_cuts(truth, 2) == [Window(1, 3, 5)]
    assert after_cuts(truth, 9) == [Window(1, 3, 6)]


def test_delay_counts_from_the_first_frame_that_shows_the_object(truth):
    late = track(2, {4: 22, 5: 20}, score=0.5)  # 22: IoU 6 / 10
    assert detection_delays(truth, [late]) == {4: 2}
    assert detection_delays(truth, [track(2, {2: 24, 3: 23, 4: 20}, score=0.5)]) == {4: 2}  # 24: 4 / 12, 23: 5 / 11
    assert detection_delays(truth, [track(2, {2: 20}, score=0.5)]) == {4: 0}
    assert detection_delays(truth, [track(1, dict.fromkeys(range(6), 20), score=0.5)]) == {4: None}
    assert detection_delays(truth, []) == {4: None}, "objects of the first frame and of a cut do not enter"


def test_generated_scenes_name_their_cuts(tmp_path):
    config = SceneConfig(height=32, width=48, frames=8, cut_probability=1.0)
    write_youtube_vis(tmp_path / "set", config, [0, 1], progress=False)
    content = json.loads((tmp_path / "set" / "instances.json").read_text())
    assert [tuple(video["cuts"]) for video in content["videos"]] == [render_clip(config, seed).cuts for seed in (0, 1)]
    assert len(after_cuts(content, 3)) == 2
    assert len(YouTubeVis(tmp_path / "set").videos) == 2
