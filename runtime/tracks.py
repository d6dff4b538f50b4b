"""From query outputs to objects with identities.

Queries are handed on from frame to frame, so a query's index is an identity: a track is a query that stays confident
that it shows an object, of whatever class; the class is settled over the track's last frames.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.manifest import TrackerSettings

LABEL_MEMORY = 0.9  # weight of a frame's class scores in a track's label over that of the frame after it


@dataclass(frozen=True)
class Detections:
    """The queries that show an object in one frame, by track id.

    Attributes:
        track_ids: int64 [O].
        queries: int64 [O], the query of each.
        labels: int64 [O].
        scores: float32 [O].
    """

    track_ids: NDArray[np.int64]
    queries: NDArray[np.int64]
    labels: NDArray[np.int64]
    scores: NDArray[np.float32]


class ObjectTracker(Protocol):
    """Turns the outputs of one frame after the other into objects with track ids."""

    def reset(self) -> None:
        """End all tracks; ids go on."""

    def update(
        self,
        class_logits: NDArray[np.float32],
        mask_logits: NDArray[np.float32],
        queries: NDArray[np.float32] | None = None,
    ) -> Detections:
        """Take one frame's outputs: [Q, classes + 1], [Q, h, w], and [Q, C] where the graph gives its queries."""

    def next_state(self) -> dict[str, NDArray[np.generic]]:
        """State that the tracker writes for the next frame, by input name."""


@dataclass
class _Track:
    track_id: int
    label_scores: NDArray[np.float32]
    missed: int = 0


class Tracker:
    """Gives every query that shows an object a track id, which no other object gets within one stream."""

    def __init__(self, settings: TrackerSettings) -> None:
        self._settings = settings
        self._tracks: dict[int, _Track] = {}
        self._next_id = 1

    def reset(self) -> None:
        """End all tracks; ids go on."""
        self._tracks.clear()

    def next_state(self) -> dict[str, NDArray[np.generic]]:
        """Nothing: the graph itself hands its queries on."""
        return {}

    def update(
        self,
        class_logits: NDArray[np.float32],
        mask_logits: NDArray[np.float32],
        queries: NDArray[np.float32] | None = None,
    ) -> Detections:
        """Take one frame's outputs.

        Args:
            class_logits: [Q, classes + 1]; the last is "no object".
            mask_logits: [Q, h, w].
            queries: Not needed.
        """
        probability = softmax(class_logits)
        classes, objectness = probability[:, :-1], 1.0 - probability[:, -1]
        masks: dict[int, NDArray[np.bool_]] = {}
        scores = np.zeros(len(classes), np.float32)
        for query in self._candidates(objectness).tolist():  # one by one, so that nothing leaves the cache
            mask = mask_logits[query] > 0
            if mask.any():
                masks[query], scores[query] = mask, objectness[query] * _mask_quality(mask_logits[query], mask)
        shown = self._without_duplicates(masks, scores)
        self._end_tracks(shown)
        for query in shown:
            self._continue(query, classes[query])
        order = sorted(shown, key=lambda query: self._tracks[query].track_id)
        return Detections(
            np.array([self._tracks[query].track_id for query in order], np.int64),
            np.array(order, np.int64),
            np.array([int(self._tracks[query].label_scores.argmax()) for query in order], np.int64),
            scores[order].astype(np.float32),
        )

    def _candidates(self, objectness: NDArray[np.float32]) -> NDArray[np.int64]:
        """Queries above the start score, or above the keep score if they carry a track."""
        limit = np.full(objectness.shape, self._settings.start_score, np.float32)
        limit[list(self._tracks)] = self._settings.keep_score
        return np.flatnonzero(objectness >= limit)

    def _without_duplicates(self, masks: Mapping[int, NDArray[np.bool_]], scores: NDArray[np.float32]) -> list[int]:
        """Queries of which none covers another; running tracks go before new ones, then by score."""
        ranked = sorted(masks, key=lambda query: (query not in self._tracks, -scores[query]))
        areas = {query: np.count_nonzero(mask) for query, mask in masks.items()}
        shown: list[int] = []
        for query in ranked:
            for other in shown:
                both = np.count_nonzero(masks[query] & masks[other])
                if both > self._settings.duplicate_iou * (areas[query] + areas[other] - both):
                    break
            else:
                shown.append(query)
        return shown

    def _end_tracks(self, shown: list[int]) -> None:
        for query in [query for query in self._tracks if query not in shown]:
            self._tracks[query].missed += 1
            if self._tracks[query].missed > self._settings.patience:
                del self._tracks[query]

    def _continue(self, query: int, classes: NDArray[np.float32]) -> None:
        """The label of a track is the class with the largest score summed over its frames, old ones counting less.

        A query may be wrong at first, or go over to another object: what it was long ago must not outvote what it is.
        """
        if query not in self._tracks:
            self._tracks[query] = _Track(self._next_id, np.zeros_like(classes))
            self._next_id += 1
        track = self._tracks[query]
        track.label_scores = LABEL_MEMORY * track.label_scores + classes
        track.missed = 0


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Probabilities along the last axis of [Q, classes + 1]."""
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=1, keepdims=True), np.float32)


def _mask_quality(logits: NDArray[np.float32], mask: NDArray[np.bool_]) -> float:
    """Mean probability inside a mask; Mask2Former's score factor.

    A sigmoid of x is (1 + tanh(x / 2)) / 2, and tanh is 0 where logits below 0 are taken for 0.
    """
    halves = np.maximum(logits, 0)
    halves *= np.float32(0.5)
    total = float(np.tanh(halves, out=halves).sum())
    return 0.5 + total / (2 * int(np.count_nonzero(mask)))
