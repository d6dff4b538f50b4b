"""Key frames of the ablations, and the scores of single frames in a long run."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.ablations import FRAME_STEP, FrameAnswers, key_frames, scores_of_frames
from models.training.evaluate import YouTubeVisSet, evaluate
from models.training.scenes import CLASSES, SceneConfig, write_youtube_vis
from runtime.backend import load_engine
from runtime.bundle import load_bundle


def test_every_third_frame_computes_all_tokens(micro_bundle, drifting_frames):
    bundle = load_bundle(micro_bundle)
    rule = bundle.manifest.budget_rule
    with key_frames(3)(bundle, load_engine(bundle, threads=1), keep_ratio=0.4) as stream:
        kept = [tuple(stream.step(frame, timestamp_s=t / 30).tokens_kept) for t, frame in enumerate(drifting_frames(7))]
    every, usual = (bundle.manifest.patch_count,) * 4, rule.for_ratio(0.4)
    assert kept == [every, usual, usual, every, usual, usual, every]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes") / "set"
    config = SceneConfig(height=96, width=160, frames=12, smallest_radius=0.15, largest_radius=0.3)
    write_youtube_vis(folder, config, range(2), progress=False)
    return YouTubeVisSet(folder, CLASSES)


def seen_in_truth(data, shown=lambda frame: True):
    """What a perfect network would show in the frames that are scored."""
    return [
        {"video_id": track["video_id"], "frame": frame, "category_id": track["category_id"], "score": 0.9,
         "segmentations": [mask]}
        for track in data.truth["annotations"]
        for frame, mask in enumerate(track["segmentations"])
        if mask and frame % FRAME_STEP == 0 and shown(frame)
    ]  # fmt: skip


def test_frames_are_scored_by_themselves(data):
    rows = {"all": seen_in_truth(data), "early": seen_in_truth(data, lambda frame: frame < 6), "none": []}
    assert scores_of_frames(data, rows, 0, 6) == {"all": 100.0, "early": 100.0, "none": 0.0}
    assert scores_of_frames(data, rows, 6, 12) == {"all": 100.0, "early": 0.0, "none": 0.0}


def test_answers_of_every_third_frame_are_kept(micro_bundle, data):
    bundle = load_bundle(micro_bundle)
    loose = bundle.manifest.tracker.model_copy(update={"start_score": 0.0, "keep_score": 0.0, "duplicate_iou": 1.0})
    bundle = replace(bundle, manifest=bundle.manifest.model_copy(update={"tracker": loose}))
    seen = FrameAnswers(data)
    row = evaluate(bundle, data, 0.4, threads=1, on_answer=seen.note)
    found = {
        (track["video_id"], frame, str(mask["counts"]))
        for track in row.results
        for frame, mask in enumerate(track["segmentations"])
        if mask and frame % FRAME_STEP == 0
    }
    assert found == {(one["video_id"], one["frame"], str(one["segmentations"][0]["counts"])) for one in seen.results}
    assert {one["video_id"] for one in seen.results} == {1, 2}
