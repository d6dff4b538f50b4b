"""Tracks: a query that stays confident is one object, whatever happens around it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.manifest import TrackerSettings
from runtime.tracks import Detections, Tracker

QUERIES, CLASSES = 4, 3
SETTINGS = TrackerSettings(start_score=0.5, keep_score=0.3, patience=2, duplicate_iou=0.6)
PLACES = {query: (slice(4 * query, 4 * query + 4), slice(0, 8)) for query in range(QUERIES)}


def outputs(seen: dict[int, tuple[int, float]], places=PLACES) -> tuple[np.ndarray, np.ndarray]:
    """Logits of a frame in which query q shows class ``label`` with a probability: ``{q: (label, probability)}``."""
    probabilities = np.full((QUERIES, CLASSES + 1), 1e-9)
    probabilities[:, -1] = 1
    masks = np.full((QUERIES, 16, 8), -40.0, np.float32)
    for query, (label, probability) in seen.items():
        probabilities[query, label], probabilities[query, -1] = probability, 1 - probability
        masks[(query, *places[query])] = 40
    return np.log(probabilities).astype(np.float32), masks


def play(frames, tracker: Tracker | None = None) -> list[dict[int, int]]:
    """Query -> track id of each frame."""
    tracker = tracker or Tracker(SETTINGS)
    results = [tracker.update(*outputs(frame)) for frame in frames]
    return [dict(zip(result.queries.tolist(), result.track_ids.tolist(), strict=True)) for result in results]


def test_ids_are_stable_while_queries_stay_confident():
    assert play([{2: (0, 0.9), 1: (1, 0.8)}] * 4) == [{2: 1, 1: 2}] * 4  # the surer one is numbered first


def test_track_starts_high_and_goes_on_low():
    probabilities = [0.4, 0.49, 0.51, 0.31, 0.49, 0.31]
    assert play([{0: (0, p)} for p in probabilities]) == [{}, {}, {0: 1}, {0: 1}, {0: 1}, {0: 1}]


def test_track_waits_for_its_query_as_long_as_its_patience():
    shown, weak = {0: (0, 0.9)}, {0: (0, 0.1)}
    assert play([shown, weak, weak, shown]) == [{0: 1}, {}, {}, {0: 1}]
    assert play([shown, weak, {}, {0: (0, 0.35)}]) == [{0: 1}, {}, {}, {0: 1}]  # the keep score is enough


def test_query_of_an_ended_track_gets_a_new_id():
    shown, weak = {0: (0, 0.9)}, {0: (0, 0.1)}
    assert play([shown, weak, weak, weak, shown]) == [{0: 1}, {}, {}, {}, {0: 2}]
    assert play([shown, weak, weak, weak, {0: (0, 0.35)}]) == [{0: 1}, {}, {}, {}, {}]  # and has to start high again


def test_patience_counts_from_the_last_time_seen():
    shown, weak = {0: (0, 0.9)}, {0: (0, 0.1)}
    assert play([shown, weak, weak] * 3)[-3:] == [{0: 1}, {}, {}]


def test_no_patience_ends_a_track_at_once():
    tracker = Tracker(TrackerSettings(patience=0))
    assert play([{0: (0, 0.9)}, {}, {0: (0, 0.9)}], tracker) == [{0: 1}, {}, {0: 2}]


def test_query_without_a_mask_shows_nothing():
    tracker = Tracker(SETTINGS)
    class_logits, masks = outputs({0: (0, 0.9)})
    assert len(tracker.update(class_logits, np.full_like(masks, -1)).track_ids) == 0


# --- duplicates -----------------------------------------------------------------------------------------------------


def overlapping(rows: int) -> dict:
    """Query 1 lies ``rows`` rows below query 0, both 10 rows high."""
    return {0: (slice(0, 10), slice(0, 8)), 1: (slice(rows, 10 + rows), slice(0, 8))}


@pytest.mark.parametrize(("rows", "shown"), [(0, [1]), (2, [1]), (3, [0, 1]), (6, [0, 1])])
def test_of_two_that_overlap_the_surer_is_shown(rows, shown):
    """Two rows apart the overlap is 8 of 12, three rows apart 7 of 13."""
    result = Tracker(SETTINGS).update(*outputs({0: (0, 0.7), 1: (1, 0.8)}, overlapping(rows)))
    assert sorted(result.queries) == shown


def test_running_track_goes_before_a_surer_newcomer():
    tracker = Tracker(SETTINGS)
    first = tracker.update(*outputs({0: (0, 0.6)}, overlapping(0)))
    second = tracker.update(*outputs({0: (0, 0.6), 1: (0, 0.95)}, overlapping(0)))
    assert second.queries.tolist() == [0] and second.track_ids.tolist() == first.track_ids.tolist()


def test_newcomer_takes_over_when_the_track_is_gone():
    tracker = Tracker(SETTINGS)
    frames = [{0: (0, 0.6)}, {0: (0, 0.6), 1: (0, 0.9)}, {1: (0, 0.9)}]
    ids = [tracker.update(*outputs(frame, overlapping(0))).track_ids.tolist() for frame in frames]
    assert ids == [[1], [1], [2]]


# --- labels and scores ----------------------------------------------------------------------------------------------


def test_label_is_the_one_with_the_largest_sum_of_scores():
    tracker = Tracker(SETTINGS)
    frames = [(0, 0.6), (1, 0.9), (0, 0.6), (2, 0.9), (2, 0.9)]
    assert [tracker.update(*outputs({0: seen})).labels.tolist() for seen in frames] == [[0], [1], [0], [0], [2]]


def test_what_a_track_was_for_long_does_not_outvote_what_it_is():
    tracker = Tracker(SETTINGS)
    for _ in range(1000):
        tracker.update(*outputs({0: (0, 0.9)}))
    labels = [tracker.update(*outputs({0: (1, 0.9)})).labels.tolist() for _ in range(10)]
    assert labels == [[0]] * 6 + [[1]] * 4
    assert tracker.update(*outputs({0: (1, 0.9)})).track_ids.tolist() == [1], "it is the same track"


def test_new_track_of_a_query_forgets_the_labels_of_the_old_one():
    tracker = Tracker(TrackerSettings(patience=0))
    for frame in [{0: (0, 0.99)}] * 5 + [{}]:
        tracker.update(*outputs(frame))
    assert tracker.update(*outputs({0: (1, 0.7)})).labels.tolist() == [1]


def test_score_is_class_probability_times_mask_certainty():
    class_logits, masks = outputs({0: (0, 0.8)})
    masks[0][masks[0] > 0] = np.log(3.0)  # a probability of 0.75 all over the mask
    np.testing.assert_allclose(Tracker(SETTINGS).update(class_logits, masks).scores, [0.6], rtol=1e-5)


def test_large_logits_do_not_overflow():
    class_logits, masks = outputs({0: (0, 0.8)})
    result = Tracker(SETTINGS).update(class_logits * 1e4 + 1e4, masks * 1e4)
    assert np.isfinite(result.scores).all() and (result.scores <= 1).all()


# --- reset ----------------------------------------------------------------------------------------------------------


def test_reset_ends_tracks_and_ids_go_on():
    tracker = Tracker(SETTINGS)
    assert play([{0: (0, 0.9), 1: (0, 0.8)}], tracker) == [{0: 1, 1: 2}]
    tracker.reset()
    assert play([{0: (0, 0.4)}, {1: (0, 0.9)}, {0: (0, 0.9), 1: (0, 0.4)}], tracker) == [{}, {1: 3}, {1: 3, 0: 4}]


def test_nothing_seen_gives_empty_arrays_of_the_right_kind():
    result = Tracker(SETTINGS).update(*outputs({}))
    assert [array.shape for array in vars(result).values()] == [(0,)] * 4
    assert [array.dtype for array in vars(result).values()] == [np.int64, np.int64, np.int64, np.float32]


def check_ids(results: list[Detections | None], patience: int) -> None:
    """No id stands for two objects: one query, no pause beyond the patience, no reset in between."""
    last_seen: dict[int, tuple[int, int]] = {}  # id -> query, frame
    frame, last_reset = 0, -1
    for result in results:
        if result is None:
            last_reset = frame
            continue
        for track_id, query in zip(result.track_ids.tolist(), result.queries.tolist(), strict=True):
            if track_id in last_seen:
                query_before, frame_before = last_seen[track_id]
                assert query == query_before and frame_before >= last_reset
                assert frame - frame_before <= patience + 1
            else:
                assert track_id > max(last_seen, default=0)
        last_seen |= {
            track_id: (query, frame)
            for track_id, query in zip(result.track_ids.tolist(), result.queries.tolist(), strict=True)
        }
        frame += 1


@settings(deadline=None)
@given(
    st.lists(st.none() | st.integers(0, 2**32 - 1), min_size=1, max_size=25),
    st.floats(0, 1),
    st.floats(0, 1),
    st.integers(0, 3),
    st.floats(0.05, 1),
)
def test_ids_are_never_given_twice(frames, start, keep, patience, duplicate_iou):
    """Frames are random outputs, None is a reset."""
    settings = TrackerSettings(start_score=start, keep_score=keep, patience=patience, duplicate_iou=duplicate_iou)
    tracker, results = Tracker(settings), []
    for seed in frames:
        if seed is None:
            tracker.reset()
            results.append(None)
            continue
        rng = np.random.default_rng(seed)
        class_logits = rng.normal(0, 3, (QUERIES, CLASSES + 1)).astype(np.float32)
        mask_logits = (rng.normal(0, 5, (QUERIES, 3, 3)) + rng.normal(0, 5, (QUERIES, 1, 1))).astype(np.float32)
        result = tracker.update(class_logits, mask_logits)
        assert (np.diff(result.track_ids) > 0).all()  # sorted, none twice
        assert len(set(result.queries.tolist())) == len(result.queries)
        assert ((result.scores >= 0) & (result.scores <= 1)).all()
        assert ((result.labels >= 0) & (result.labels < CLASSES)).all()
        results.append(result)
    check_ids(results, patience)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.01, 100), st.floats(-3, 3))
def test_score_is_objectness_times_the_mean_probability_inside_the_mask(seed, spread, mean):
    random = np.random.default_rng(seed)
    masks = random.normal(mean * spread, spread, (3, 9, 16)).astype(np.float32)
    masks[1] = -np.abs(masks[1])  # shows nothing
    logits = random.normal(0, 2, (3, CLASSES + 1)).astype(np.float32)
    keep_all = TrackerSettings(start_score=0.0, keep_score=0.0, duplicate_iou=1.0)
    found = Tracker(keep_all).update(logits, masks)
    wanted = {}
    for query in range(3):
        inside = masks[query][masks[query] > 0].astype(np.float64)
        if len(inside):
            shares = np.exp(logits[query].astype(np.float64))
            wanted[query] = (1 - shares[-1] / shares.sum()) * (1 / (1 + np.exp(-inside))).mean()
    assert dict(zip(found.queries.tolist(), found.scores.tolist(), strict=True)) == pytest.approx(wanted, rel=1e-5)
