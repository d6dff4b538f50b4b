"""The YouTube-VIS protocol against an independent, plain formulation of it."""

from __future__ import annotations

import numpy as np
import pytest
from pycocotools import mask as rle

from models.training.average_precision import TrackEvaluation, paired_bootstrap, track_iou
from runtime.errors import SourceFormatError

HEIGHT, WIDTH, FRAMES, CLASSES = 12, 16, 4, 3
OVERLAPS = np.arange(0.5, 0.96, 0.05)


def encode(mask: np.ndarray) -> dict | None:
    if not mask.any():
        return None
    code = rle.encode(np.asfortranarray(mask, np.uint8))
    return {"size": code["size"], "counts": code["counts"].decode()}


def box(rng: np.random.Generator) -> np.ndarray:
    """A rectangle that is there in some of the frames, [T, H, W]."""
    mask = np.zeros((FRAMES, HEIGHT, WIDTH), bool)
    top, left = rng.integers(0, 6), rng.integers(0, 8)
    mask[:, top : top + rng.integers(2, 6), left : left + rng.integers(2, 8)] = True
    return mask & (rng.random(FRAMES) < 0.8)[:, None, None]


def noisy(rng: np.random.Generator, mask: np.ndarray) -> np.ndarray:
    """Nearly the same track."""
    return np.roll(mask, rng.integers(-1, 2), axis=2) ^ (rng.random(mask.shape) < 0.01)


def problem(seed: int, videos: int = 4) -> tuple[dict, list[dict], list[dict], list[dict]]:
    """Annotations and results as files have them, and both again with plain masks."""
    rng = np.random.default_rng(seed)
    wanted, found = [], []
    for video in range(1, videos + 1):
        for _ in range(rng.integers(0, 4)):
            wanted.append({"video_id": video, "category_id": int(rng.integers(1, CLASSES + 1)), "mask": box(rng)})
            for _ in range(rng.integers(0, 3)):
                label = wanted[-1]["category_id"] if rng.random() < 0.8 else int(rng.integers(1, CLASSES + 1))
                found.append({"video_id": video, "category_id": label, "mask": noisy(rng, wanted[-1]["mask"])})
        found += [{"video_id": video, "category_id": 1, "mask": box(rng)} for _ in range(rng.integers(0, 2))]
    for track in found:
        track["score"] = float(rng.random())
    truth = {
        "videos": [
            {"id": v, "height": HEIGHT, "width": WIDTH, "file_names": [f"{v}/{t}.jpg" for t in range(FRAMES)]}
            for v in range(1, videos + 1)
        ],
        "categories": [{"id": c, "name": str(c)} for c in range(1, CLASSES + 1)],
        "annotations": [
            {"id": n, "iscrowd": 0, **as_file(track)} for n, track in enumerate(wanted, 1)
        ],
    }  # fmt: skip
    return truth, [as_file(track) for track in found], wanted, found


def as_file(track: dict) -> dict:
    rest = {name: value for name, value in track.items() if name != "mask"}
    return {**rest, "segmentations": [encode(mask) for mask in track["mask"]]}


def plain_iou(one: np.ndarray, other: np.ndarray) -> float:
    union = (one | other).sum()
    return float((one & other).sum() / union) if union else 0.0


def plain_ap(wanted: list[dict], found: list[dict], overlap: float) -> float:
    """Greedy matching by falling score within video and class; precision read at 101 recalls; mean over classes."""
    per_class = []
    for label in range(1, CLASSES + 1):
        targets = [track for track in wanted if track["category_id"] == label]
        if not targets:
            continue
        taken, hits = set(), []
        for track in sorted((t for t in found if t["category_id"] == label), key=lambda t: -t["score"]):
            best, match = overlap - 1e-12, None
            for number, target in enumerate(targets):
                iou = plain_iou(track["mask"], target["mask"])
                if target["video_id"] == track["video_id"] and number not in taken and iou >= best:
                    best, match = iou, number
            taken.add(match)
            hits.append(match is not None)
        right = np.cumsum(hits) if hits else np.zeros(0)
        recall, precision = right / len(targets), right / np.arange(1, len(hits) + 1)
        at = [max(precision[recall >= level - 1e-12], default=0.0) for level in np.linspace(0, 1, 101)]
        per_class.append(np.mean(at))
    return float(100 * np.mean(per_class))


@pytest.mark.parametrize("seed", range(12))
def test_average_precision_equals_the_plain_one(seed):
    truth, results, wanted, found = problem(seed)
    scores = TrackEvaluation(truth, results).scores()
    assert scores.ap == pytest.approx(np.mean([plain_ap(wanted, found, overlap) for overlap in OVERLAPS]), abs=1e-6)
    assert scores.ap50 == pytest.approx(plain_ap(wanted, found, 0.5), abs=1e-6)
    assert scores.ap75 == pytest.approx(plain_ap(wanted, found, 0.75), abs=1e-6)
    assert 0 <= scores.ar1 <= scores.ar10 <= 100


def test_perfect_results_score_100_and_none_score_0():
    truth, _, wanted, _ = problem(0)
    perfect = [as_file({**track, "score": 0.9}) for track in wanted if track["mask"].any()]
    assert TrackEvaluation(truth, perfect).scores().ap == pytest.approx(100)
    assert TrackEvaluation(truth, []).scores().ap == 0


def test_a_changed_identity_costs_the_track():
    """The same masks in two tracks, half of the frames each: neither overlaps enough."""
    truth, _, _, _ = problem(0, videos=1)
    mask = np.zeros((FRAMES, HEIGHT, WIDTH), bool)
    mask[:, 2:8, 2:8] = True
    track = {"video_id": 1, "category_id": 1, "mask": mask}
    truth["annotations"] = [{"id": 1, "iscrowd": 0, **as_file(track)}]
    halves = [mask & np.isin(np.arange(FRAMES), part)[:, None, None] for part in ([0], [1, 2, 3])]
    results = [as_file({**track, "mask": half, "score": 0.9}) for half in halves]
    scores = TrackEvaluation(truth, results).scores()
    assert scores.ap75 == pytest.approx(50) and scores.ap < 50  # 3 of 4 frames: overlap 0.75, beside a false track


@pytest.mark.parametrize("seed", range(3))
def test_track_overlap_equals_that_of_plain_masks(seed):
    rng = np.random.default_rng(seed)
    one, other = box(rng), box(rng)
    codes = [[encode(mask) for mask in track] for track in (one, other)]
    assert track_iou(*codes) == pytest.approx(plain_iou(one, other))
    assert track_iou([None] * FRAMES, [None] * FRAMES) == 0


def test_uncompressed_annotations_are_read():
    truth, results, _, _ = problem(1)
    want = TrackEvaluation(truth, results).scores()
    for track in truth["annotations"]:
        track["segmentations"] = [code and uncompressed(code) for code in track["segmentations"]]
    assert TrackEvaluation(truth, results).scores() == want


def uncompressed(code: dict) -> dict:
    flat = rle.decode(code).ravel(order="F")
    changes = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *changes, len(flat)]).tolist()
    return {"size": code["size"], "counts": runs if flat[0] == 0 else [0, *runs]}


def test_bootstrap_of_a_draw_equals_an_evaluation_of_those_videos():
    truth, results, _, _ = problem(5, videos=6)
    evaluation, before = TrackEvaluation(truth, results), TrackEvaluation(truth, results).scores()
    chosen = [1, 3, 4]
    part = {
        **truth,
        "videos": [truth["videos"][v] for v in chosen],
        "annotations": [track for track in truth["annotations"] if track["video_id"] - 1 in chosen],
    }
    kept = [track for track in results if track["video_id"] - 1 in chosen]
    assert evaluation.scores(chosen) == TrackEvaluation(part, kept).scores()
    assert evaluation.scores() == before, "drawing leaves the evaluation as it was"


def test_bootstrap_tells_better_from_equal():
    truth, results, wanted, _ = problem(3, videos=8)
    perfect = TrackEvaluation(truth, [as_file({**track, "score": 0.9}) for track in wanted if track["mask"].any()])
    usual = TrackEvaluation(truth, results)
    low, high = paired_bootstrap(perfect, usual, draws=60)
    assert 0 < low <= high
    assert paired_bootstrap(usual, usual, draws=20) == (0.0, 0.0)


def test_results_that_do_not_fit_are_refused():
    truth, results, _, _ = problem(0)
    with pytest.raises(SourceFormatError, match="no annotations"):
        TrackEvaluation({**truth, "annotations": []}, results)
    with pytest.raises(SourceFormatError, match="3 frames, video 1 of the data set 4"):
        TrackEvaluation(truth, [{**results[0], "video_id": 1, "segmentations": [None] * 3}])
    with pytest.raises(SourceFormatError, match="does not exist"):
        TrackEvaluation(truth, [{**results[0], "video_id": 99}])
