"""Parts of a data set with the results on it, for questions that a score over whole videos does not answer.

All functions take the content of a YouTube-VIS annotation file and a list of results and leave both as they were.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from pycocotools import mask as rle

FOUND_IOU = 0.5

Truth = Mapping[str, Any]
Results = Sequence[Mapping[str, Any]]


class Window(NamedTuple):
    """Frames ``start`` to ``stop`` (one past the last), every ``every``-th, of a video."""

    video_id: int
    start: int
    stop: int
    every: int = 1


def cut_out(truth: Truth, results: Results, windows: Iterable[Window]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Annotations and results of some windows, each a video of its own; tracks that are not seen there are left out."""
    videos = {video["id"]: video for video in truth["videos"]}
    part: dict[str, Any] = {"categories": truth["categories"], "videos": [], "annotations": []}
    found: list[dict[str, Any]] = []
    for number, window in enumerate(windows, 1):
        frames = slice(window.start, window.stop, window.every)
        video = videos[window.video_id]
        part["videos"].append({**video, "id": number, "file_names": video["file_names"][frames]})
        for tracks, target in ((truth["annotations"], part["annotations"]), (results, found)):
            for track in tracks:
                masks = track["segmentations"][frames] if track["video_id"] == window.video_id else []
                if any(masks):
                    target.append({**track, "video_id": number, "segmentations": masks})
    for number, track in enumerate(part["annotations"], 1):
        track["id"] = number
    return part, found


def after_cuts(truth: Truth, frames: int) -> list[Window]:
    """The first frames after each cut of the videos, which generated scenes name under ``cuts``."""
    return [
        Window(video["id"], cut, min(cut + frames, len(video["file_names"])))
        for video in truth["videos"]
        for cut in video.get("cuts", ())
    ]


def detection_delays(truth: Truth, results: Results) -> dict[int, int | None]:
    """Frames until an entering object is found, by annotation id; None for one that is never found.

    An object enters if the video's first frame does not show it and no cut brings it; it is found in the first frame
    in which a mask of any class covers it with an IoU of at least :data:`FOUND_IOU`.
    """
    cuts = {(video["id"], cut) for video in truth["videos"] for cut in video.get("cuts", ())}
    by_video: dict[int, list[Sequence[Any]]] = {}
    for track in results:
        by_video.setdefault(track["video_id"], []).append(track["segmentations"])
    delays: dict[int, int | None] = {}
    for track in truth["annotations"]:
        masks = track["segmentations"]
        start = next((t for t, mask in enumerate(masks) if mask), 0)
        if start == 0 or (track["video_id"], start) in cuts:
            continue
        others = by_video.get(track["video_id"], [])
        first = next((t for t in range(start, len(masks)) if _is_found(masks[t], [o[t] for o in others])), None)
        delays[track["id"]] = None if first is None else first - start
    return delays


def _is_found(mask: Any, others: Sequence[Any]) -> bool:
    shown = [other for other in others if other]
    return bool(mask) and bool(shown) and float(rle.iou(shown, [mask], [0]).max()) >= FOUND_IOU
