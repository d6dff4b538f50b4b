"""What a stream gives back for one frame."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Instances:
    """The objects seen in one frame, in pixels of the source frame; O objects, sorted by track id.

    Attributes:
        track_ids: int64 [O]; an id is never used again within one stream.
        labels: int64 [O], index into the manifest's ``classes``.
        scores: float32 [O] in [0, 1].
        boxes: float32 [O, 4] as (x1, y1, x2, y2), half-open: x2 and y2 are one past the last pixel of the mask.
        masks: bool [O, H, W] at the size of the source frame.
    """

    track_ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    scores: NDArray[np.float32]
    boxes: NDArray[np.float32]
    masks: NDArray[np.bool_]

    @classmethod
    def none(cls, height: int, width: int) -> Instances:
        """No object in a frame of this size."""
        ids, boxes = np.empty(0, np.int64), np.empty((0, 4), np.float32)
        return cls(ids, ids, np.empty(0, np.float32), boxes, np.empty((0, height, width), np.bool_))

    def __len__(self) -> int:
        return len(self.track_ids)

    @cached_property
    def run_lengths(self) -> list[dict[str, Any]]:
        """Each mask in run-length encoding; made once, however many sinks write it."""
        return [run_lengths(mask) for mask in self.masks]


def run_lengths(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """A mask bool [H, W] in COCO's compressed run-length encoding, with text as ``counts`` so that it goes into JSON.

    >>> run_lengths(np.array([[False, True], [False, True]]))
    {'size': [2, 2], 'counts': '22'}
    """
    from pycocotools import mask as coco_mask  # a stream without sinks does without it

    encoded = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(side) for side in encoded["size"]], "counts": encoded["counts"].decode("ascii")}


@dataclass(frozen=True)
class FrameResult:
    """One frame's answer.

    Attributes:
        frame_index: Count of frames delivered by the source, from 0.
        timestamp_s: Capture time on the source's own clock.
        instances: The objects in this frame.
        kept_stages: int64 [rows, columns] of the patch grid: selection stages that each patch passed,
            0 (pruned first) to S (never pruned). The grid covers the letterboxed image, not the source frame.
        tokens_kept: int64 [S], tokens that each selection stage kept.
        reset_reason: Why this frame ran without a prior (``"first frame"``, ``"scene cut"``, ...), else None.
        preprocess_ms: Time for letterboxing and the thumbnail that a cut is told from, milliseconds.
        step_ms: Time in the backend, milliseconds.
        latency_ms: From the picture to its objects, milliseconds: letterboxing, the wait for other cameras of the same
            round, the step, the tracks. Without masks at the source's size, drawing and writing, which overlap with the
            next frame.
        missed_target: Whether that was more than the latency target; None without a target.
    """

    frame_index: int
    timestamp_s: float
    instances: Instances
    kept_stages: NDArray[np.int64]
    tokens_kept: NDArray[np.int64]
    reset_reason: str | None
    step_ms: float
    preprocess_ms: float = 0.0
    latency_ms: float = 0.0
    missed_target: bool | None = None
