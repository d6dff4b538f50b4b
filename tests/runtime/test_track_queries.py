"""The published tracker: the reference vectors, and what holds for any outputs."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from published_files import FRAMES, IMAGE_SIZE, reference

from runtime.manifest import TrackQuerySettings
from runtime.track_queries import TrackQueryTracker

LEARNED, SLOTS, DIM, CLASSES = 6, 3, 4, 2
SIZE = (16, 24)


def tracker(**changes) -> TrackQueryTracker:
    return TrackQueryTracker(TrackQuerySettings(learned_queries=LEARNED, **changes), SLOTS, DIM, SIZE)


def frame(found: dict[int, tuple[float, tuple[slice, slice]]]):
    """Outputs in which each query of ``found`` shows an object: (probability of its class, mask)."""
    classes = np.zeros((LEARNED + SLOTS, CLASSES + 1), np.float32)
    classes[:, -1] = 12.0
    masks = np.full((LEARNED + SLOTS, 8, 12), -9.0, np.float32)
    for query, (probability, place) in found.items():
        classes[query] = np.log([probability, 1e-6, 1 - probability])
        masks[query][place] = 9.0
    queries = np.arange((LEARNED + SLOTS) * DIM, dtype=np.float32).reshape(-1, DIM)
    return classes, masks, queries


LEFT, RIGHT, TOP = np.s_[:, :4], np.s_[:, 8:], np.s_[:4]


def test_reference_vectors():
    vectors, slots = reference(), 5
    settings_ = TrackQuerySettings(learned_queries=20)
    dim = vectors["t0.queries"].shape[1]
    published = TrackQueryTracker(settings_, slots, dim, IMAGE_SIZE)
    for t in range(FRAMES):
        carried = int(published.next_state()["prior.track_valid"].sum())
        assert carried == int(vectors[f"t{t}.n_track_queries"])
        rows = 20 + carried
        outputs = [vectors[f"t{t}.{name}"] for name in ("cls_logits", "mask_logits", "queries")]
        assert len(outputs[0]) == rows
        padded = [np.concatenate([x, np.zeros((20 + slots - rows, *x.shape[1:]), x.dtype)]) for x in outputs]
        found = published.update(*padded)
        np.testing.assert_array_equal(found.track_ids, vectors[f"t{t}.track_ids"])
        np.testing.assert_array_equal(found.labels, vectors[f"t{t}.labels"])
        np.testing.assert_allclose(found.scores, vectors[f"t{t}.scores"], atol=1e-4)


def test_object_keeps_its_id_through_its_slot():
    one = tracker()
    first = one.update(*frame({2: (0.9, LEFT)}))
    assert first.track_ids.tolist() == [0] and first.queries.tolist() == [2]
    state = one.next_state()
    np.testing.assert_array_equal(state["prior.track_queries"][0, 0], np.arange(DIM) + 2 * DIM)
    assert state["prior.track_valid"].tolist() == [[True, False, False]]
    again = one.update(*frame({LEARNED: (0.9, LEFT), 4: (0.9, RIGHT)}))
    assert again.track_ids.tolist() == [0, 1] and again.queries.tolist() == [LEARNED, 4]


def test_track_goes_on_at_a_score_that_starts_none():
    one = tracker()
    assert not len(one.update(*frame({2: (0.28, LEFT)})).track_ids)
    one.update(*frame({2: (0.9, LEFT)}))
    assert one.update(*frame({LEARNED: (0.28, LEFT)})).track_ids.tolist() == [0]
    assert not len(one.update(*frame({LEARNED: (0.24, LEFT)})).track_ids)
    assert not one.next_state()["prior.track_valid"].any()
    assert one.update(*frame({LEARNED: (0.9, LEFT)})).track_ids.tolist() == []  # the slot is empty: no query was there


def test_new_object_on_a_track_is_the_track():
    one = tracker()
    one.update(*frame({2: (0.6, LEFT)}))
    found = one.update(*frame({LEARNED: (0.6, LEFT), 1: (0.99, LEFT), 3: (0.9, RIGHT)}))
    assert found.track_ids.tolist() == [0, 1] and found.queries.tolist() == [LEARNED, 3]


def test_of_two_tracks_on_one_object_the_better_stays():
    one = tracker()
    assert one.update(*frame({1: (0.8, LEFT), 2: (0.9, RIGHT)})).track_ids.tolist() == [0, 1]
    assert one.update(*frame({LEARNED: (0.9, LEFT), LEARNED + 1: (0.7, LEFT)})).track_ids.tolist() == [0]


def test_overflow_is_counted_and_said(caplog):
    one = tracker()
    places = [np.s_[:4, :4], np.s_[:4, 4:8], np.s_[:4, 8:], np.s_[4:, :4]]
    with caplog.at_level(logging.WARNING):
        found = one.update(*frame({query: (0.9 - query / 100, place) for query, place in enumerate(places)}))
    assert found.queries.tolist() == [0, 1, 2] and one.overflowed == 1
    assert "4 objects" in caplog.text and "carries 3" in caplog.text


def test_reset_ends_tracks_and_ids_go_on():
    one = tracker()
    one.update(*frame({2: (0.9, LEFT)}))
    one.reset()
    assert not one.next_state()["prior.track_valid"].any()
    assert one.update(*frame({2: (0.9, LEFT)})).track_ids.tolist() == [1]


@settings(deadline=None, max_examples=60)
@given(
    arrays(np.float32, (4, LEARNED + SLOTS, CLASSES + 1), elements=st.floats(-6, 6, width=32)),
    arrays(np.float32, (4, LEARNED + SLOTS, 8, 12), elements=st.floats(-9, 9, width=32)),
)
def test_whatever_comes_ids_are_unique_and_slots_hold_what_is_shown(classes, masks):
    one, seen = tracker(), -1
    queries = np.random.default_rng(0).normal(size=(LEARNED + SLOTS, DIM)).astype(np.float32)
    for frame_classes, frame_masks in zip(classes, masks, strict=True):
        before = int(one.next_state()["prior.track_valid"].sum())
        found = one.update(frame_classes, frame_masks, queries)
        state = one.next_state()
        assert len(found.track_ids) <= SLOTS and len(set(found.track_ids.tolist())) == len(found.track_ids)
        assert (found.queries < LEARNED + before).all(), "an empty slot shows an object"
        assert ((found.scores > 0.25) & (found.scores <= 1)).all()
        new = found.track_ids[found.queries < LEARNED]
        assert (new > seen).all()
        seen = max([seen, *found.track_ids.tolist()])
        np.testing.assert_array_equal(state["prior.track_queries"][0, : len(found.queries)], queries[found.queries])
        assert int(state["prior.track_valid"].sum()) == len(found.queries)


def test_graph_without_queries_is_a_fault():
    classes, masks, _ = frame({})
    with pytest.raises(AssertionError, match="no queries"):
        tracker().update(classes, masks)
