"""Results as text: one JSON object per frame, or the list that the YouTube-VIS evaluation server takes."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, TextIO

from ..results import FrameResult, Instances
from .frame import Frame
from .sink_types import FileSink

_SCHEMA = """
    PRAGMA journal_mode = OFF;
    PRAGMA synchronous = OFF;
    PRAGMA cache_size = -512;
    CREATE TABLE seen (track INTEGER, frame INTEGER, label INTEGER, score REAL, segmentation TEXT,
                       PRIMARY KEY (track, frame)) WITHOUT ROWID;
    BEGIN;
"""


class JsonLinesSink(FileSink):
    """One JSON object per frame and line, written out as soon as the frame is done.

    Keys: ``frame_index``, ``timestamp_s``, ``reset_reason`` (null if there was a prior), ``step_ms``, ``latency_ms``,
    ``missed_target`` (null without a latency target), ``tokens_kept``, and ``objects``, each with ``track_id``,
    ``label``, ``class``, ``score``, ``box`` (x1, y1, x2, y2 in source pixels) and ``mask`` (COCO run-length encoding:
    ``size`` as [height, width], and ``counts``).

    Args:
        path: The file to make.
        classes: Names that the labels index.
    """

    def __init__(self, path: str | os.PathLike[str], classes: Sequence[str]) -> None:
        self._classes = classes
        super().__init__(path)

    def _open(self) -> None:
        self._out = self._file.partial.open("w", encoding="utf-8")

    def _write(self, frame: Frame, result: FrameResult) -> None:
        line = {
            "frame_index": result.frame_index,
            "timestamp_s": round(result.timestamp_s, 6),
            "reset_reason": result.reset_reason,
            "step_ms": round(result.step_ms, 3),
            "latency_ms": round(result.latency_ms, 3),
            "missed_target": result.missed_target,
            "tokens_kept": result.tokens_kept.tolist(),
            "objects": [_object(result.instances, index, self._classes) for index in range(len(result.instances))],
        }
        self._out.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._out.flush()

    def _finish(self) -> bool:
        self._out.close()
        return True

    def _release(self) -> None:
        with suppress(OSError):
            self._out.close()


class YouTubeVisSink(FileSink):
    """The results of one video, as the YouTube-VIS evaluation server reads them: a list with one entry per track.

    An entry has ``video_id``, ``category_id`` (of the class that the track's scores favour), ``score`` (mean over the
    frames in which the track was seen) and ``segmentations``: one run-length encoding or null per frame of the video.

    Frames wait in a database beside the file, so memory does not grow with the video's length.

    Args:
        path: The file to make.
        video_id: The video's id in the data set.
        category_ids: The data set's id of each class; None for 1, 2, 3, ...
    """

    def __init__(
        self, path: str | os.PathLike[str], video_id: int, *, category_ids: Sequence[int] | None = None
    ) -> None:
        self._video_id = video_id
        self._category_ids = category_ids
        self._frame_count = 0
        super().__init__(path)

    def _open(self) -> None:
        self._spool = self._file.partial.with_suffix(".spool")
        self._seen = sqlite3.connect(self._spool, isolation_level=None, check_same_thread=False)
        try:
            self._seen.executescript(_SCHEMA)
        except sqlite3.Error:
            self._release()
            raise

    def _write(self, frame: Frame, result: FrameResult) -> None:
        objects = result.instances
        self._frame_count = max(self._frame_count, result.frame_index + 1)
        tracks, labels, scores = objects.track_ids.tolist(), objects.labels.tolist(), objects.scores.tolist()
        for track, label, score, mask in zip(tracks, labels, scores, objects.run_lengths, strict=True):
            row = track, result.frame_index, label, score, json.dumps(mask)
            self._seen.execute("INSERT INTO seen VALUES (?, ?, ?, ?, ?)", row)

    def _finish(self) -> bool:
        with self._file.partial.open("w", encoding="utf-8") as out:
            separator = "["
            for track, score in self._seen.execute("SELECT track, AVG(score) FROM seen GROUP BY track ORDER BY track"):
                out.write(separator)
                self._write_track(out, track, score)
                separator = ",\n"
            out.write("]\n" if separator != "[" else "[]\n")
        return True

    def _write_track(self, out: TextIO, track: int, score: float) -> None:
        head = {"video_id": self._video_id, "category_id": self._category_id(track), "score": round(score, 6)}
        out.write(json.dumps(head)[:-1] + ', "segmentations": [')
        for frame, segmentation in enumerate(self._segmentations(track)):
            out.write(", " * (frame > 0) + segmentation)
        out.write("]}")

    def _category_id(self, track: int) -> int:
        favourite = "SELECT label FROM seen WHERE track = ? GROUP BY label ORDER BY SUM(score) DESC, label LIMIT 1"
        label: int = self._seen.execute(favourite, (track,)).fetchone()[0]
        return label + 1 if self._category_ids is None else self._category_ids[label]

    def _segmentations(self, track: int) -> Iterator[str]:
        """What a track looks like in each frame of the video, as JSON."""
        done = 0
        rows = self._seen.execute("SELECT frame, segmentation FROM seen WHERE track = ? ORDER BY frame", (track,))
        for frame, segmentation in rows:
            yield from ["null"] * (frame - done)
            yield segmentation
            done = frame + 1
        yield from ["null"] * (self._frame_count - done)

    def _release(self) -> None:
        self._seen.close()
        self._spool.unlink(missing_ok=True)


def _object(instances: Instances, index: int, classes: Sequence[str]) -> dict[str, Any]:
    label = int(instances.labels[index])
    return {
        "track_id": int(instances.track_ids[index]),
        "label": label,
        "class": classes[label],
        "score": round(float(instances.scores[index]), 6),
        "box": [round(float(corner), 3) for corner in instances.boxes[index]],
        "mask": instances.run_lengths[index],
    }
