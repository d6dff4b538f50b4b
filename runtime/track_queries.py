"""Objects with identities where the queries of tracks are handed on: the published tracker of RO-VIS.

The decoder gets, behind its learned queries, the query of every object that the last frame showed. What such a query
finds is the same object; what a learned query finds is a new one, unless its mask lies on one that is shown already.

Thresholds and their order are those of Video Patch Pruning's released configuration. What the reference vectors do not
settle is decided here as the names suggest: overlap between two tracks is judged with ``track_iou``, that of a new
object with anything shown with ``new_iou``, and a track that falls below ``keep_score`` ends at once.
"""

from __future__ import annotations

import logging

import numpy as np
from numpy.typing import NDArray

from runtime.manifest import TrackQuerySettings
from runtime.tracks import Detections, softmax

logger = logging.getLogger(__name__)

Masks = NDArray[np.bool_]  # [K, H * W]
Scores = NDArray[np.float32]  # [K]


class TrackQueryTracker:
    """Chooses the queries that go on to the next frame, and gives each its track id.

    Args:
        settings: Thresholds.
        slots: Most queries that the graph takes from the frame before.
        query_dim: Channels of a query.
        image_size: (height, width) of the model's input, at which masks are scored and compared.

    Attributes:
        overflowed: Objects that were dropped because all slots were taken.
    """

    def __init__(self, settings: TrackQuerySettings, slots: int, query_dim: int, image_size: tuple[int, int]) -> None:
        self._settings, self._image_size = settings, image_size
        self._queries = np.zeros((1, slots, query_dim), np.float32)
        self._valid = np.zeros((1, slots), np.bool_)
        self._ids = np.empty(0, np.int64)  # of the slots in use, in their order
        self._next_id = 0
        self.overflowed = 0

    def reset(self) -> None:
        """End all tracks; ids go on."""
        self._ids = self._ids[:0]
        self._queries[:], self._valid[:] = 0, False

    def next_state(self) -> dict[str, NDArray[np.generic]]:
        """What the graph takes with the next frame, by input name."""
        return {"prior.track_queries": self._queries, "prior.track_valid": self._valid}

    def update(
        self,
        class_logits: NDArray[np.float32],
        mask_logits: NDArray[np.float32],
        queries: NDArray[np.float32] | None = None,
    ) -> Detections:
        """Take one frame's outputs; the last rows belong to the slots.

        Args:
            class_logits: [Q + T, classes + 1]; the last is "no object".
            mask_logits: [Q + T, h, w].
            queries: [Q + T, query_dim].
        """
        assert queries is not None, "the graph gives no queries"
        learned = self._settings.learned_queries
        classes = softmax(class_logits)[:, :-1]
        limit = np.full(len(classes), np.inf, np.float32)
        limit[:learned] = self._settings.start_score
        limit[learned : learned + len(self._ids)] = self._settings.keep_score
        found = np.flatnonzero(classes.max(1) > limit)  # a score is this times a mask's quality, which is at most 1
        masks, quality = _masks_and_quality(mask_logits[found], self._image_size)
        scores = classes[found].max(1) * quality
        good = scores > limit[found]
        found, masks, scores = found[good], masks[good], scores[good]
        shown = self._without_overlap(found >= learned, masks, scores)
        shown = self._within_slots(shown, scores)
        found, scores = found[shown], scores[shown]
        self._hand_on(found, queries)
        return Detections(self._ids.copy(), found, classes[found].argmax(1), scores.astype(np.float32))

    def _without_overlap(self, is_track: NDArray[np.bool_], masks: Masks, scores: Scores) -> NDArray[np.int64]:
        """Places of the objects to show: tracks before new ones, each by score."""
        overlap = _pairwise_iou(masks)
        limits = np.where(is_track, self._settings.track_iou, self._settings.new_iou)
        shown: list[int] = []
        for place in np.lexsort((-scores, ~is_track)):
            if (overlap[place, shown] <= limits[place]).all():
                shown.append(int(place))
        return np.array(shown, np.int64)

    def _within_slots(self, shown: NDArray[np.int64], scores: Scores) -> NDArray[np.int64]:
        slots = self._valid.shape[1]
        if len(shown) > slots:
            self.overflowed += len(shown) - slots
            logger.warning(
                "%d objects in one frame, the bundle carries %d: the rest was dropped. Export it with more track "
                "queries.", len(shown), slots,
            )  # fmt: skip
        return shown[:slots]

    def _hand_on(self, found: NDArray[np.int64], queries: NDArray[np.float32]) -> None:
        """Fill the slots with the queries of the objects shown, older tracks first."""
        slot = found - self._settings.learned_queries
        ids = np.where(slot >= 0, self._ids[slot.clip(0)] if len(self._ids) else -1, -1)
        new = np.flatnonzero(ids < 0)
        ids[new] = self._next_id + np.arange(len(new))
        self._next_id += len(new)
        self._ids = ids.astype(np.int64)
        self._queries[:], self._valid[:] = 0, False
        self._queries[0, : len(found)], self._valid[0, : len(found)] = queries[found], True


def _masks_and_quality(mask_logits: NDArray[np.float32], size: tuple[int, int]) -> tuple[Masks, Scores]:
    """Masks at the model's input size, and the mean probability inside each (Mask2Former's score factor)."""
    rows, columns = (_resize_matrix(*pair) for pair in zip(mask_logits.shape[1:], size, strict=True))
    masks = np.zeros((len(mask_logits), size[0] * size[1]), np.bool_)
    quality = np.zeros(len(mask_logits), np.float32)
    for index, logits in enumerate(mask_logits):
        fine = (rows @ logits @ columns.T).ravel()
        masks[index] = fine > 0
        inside = fine[masks[index]]
        quality[index] = (1 / (1 + np.exp(-inside))).sum() / (len(inside) + 1e-6)
    return masks, quality


def _resize_matrix(size: int, target: int) -> NDArray[np.float32]:
    """Bilinear interpolation along one axis between pixel centres, [target, size]."""
    place = ((np.arange(target) + 0.5) * size / target - 0.5).clip(0, size - 1)
    low = place.astype(np.int64)
    matrix = np.zeros((target, size), np.float32)
    row = np.arange(target)
    matrix[row, low] = 1 - (place - low)
    matrix[row, np.minimum(low + 1, size - 1)] += place - low
    return matrix


def _pairwise_iou(masks: Masks) -> NDArray[np.float32]:
    flat = masks.astype(np.float32)
    both, area = flat @ flat.T, flat.sum(1)
    either = area[:, None] + area - both
    return np.asarray(both / np.maximum(either, 1), np.float32)
