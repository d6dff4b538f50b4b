"""Scenes as a data set on disk, in the layout of YouTube-VIS."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as rle
from rich.console import Console
from rich.progress import track

from models.training.scenes.config import CLASSES, SceneConfig
from models.training.scenes.shots import render_clip
from runtime.errors import SinkError


def _encode(mask: NDArray[np.bool_]) -> dict[str, Any] | None:
    """Compressed run lengths of one mask [H, W], or None where nothing is seen."""
    if not mask.any():
        return None
    encoded = rle.encode(np.asfortranarray(mask, np.uint8))
    return {"size": [int(n) for n in encoded["size"]], "counts": encoded["counts"].decode("ascii")}


def _annotation(masks: NDArray[np.bool_], label: int) -> dict[str, Any]:
    """One object of a video without its ids; ``masks`` is [T, H, W]."""
    segmentations = [_encode(mask) for mask in masks]
    return {
        "category_id": int(label) + 1,
        "iscrowd": 0,
        "height": masks.shape[1],
        "width": masks.shape[2],
        "segmentations": segmentations,
        "bboxes": [None if code is None else [float(n) for n in rle.toBbox(code)] for code in segmentations],
        "areas": [None if code is None else int(rle.area(code)) for code in segmentations],
    }


def _write_frames(folder: Path, frames: NDArray[np.uint8], jpeg_quality: int) -> list[str]:
    """JPEG files in a new folder; returns their names relative to its parent."""
    folder.mkdir(parents=True)
    names = [f"{folder.name}/{t:05d}.jpg" for t in range(len(frames))]
    for name, frame in zip(names, frames, strict=True):
        path = folder.parent / name
        bgr = cv2.cvtColor(frame, cv2.COLOR_RGB2BGR)
        if not cv2.imwrite(str(path), bgr, [cv2.IMWRITE_JPEG_QUALITY, jpeg_quality]):
            raise SinkError(f"{path} could not be written. Is there space left, and may you write there?")
    return names


@dataclass(frozen=True)
class _ClipWriter:
    """Renders and stores one clip; an object rather than a closure, so that it can be sent to a worker."""

    images: Path
    config: SceneConfig
    jpeg_quality: int

    def __call__(self, seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        clip = render_clip(self.config, seed)
        names = _write_frames(self.images / f"scene_{seed:010d}", clip.frames, self.jpeg_quality)
        size = {"width": self.config.width, "height": self.config.height}
        video = {**size, "length": len(names), "file_names": names, "cuts": list(clip.cuts)}
        return video, [_annotation(*pair) for pair in zip(clip.masks, clip.labels, strict=True)]


def _one_thread() -> None:
    cv2.setNumThreads(1)  # the workers already share the cores


def _map_clips(write: _ClipWriter, seeds: list[int], workers: int) -> Iterator[tuple[Any, Any]]:
    if workers == 1:
        yield from map(write, seeds)
        return
    context = multiprocessing.get_context("spawn")  # a fork copies the locks of threads that do not exist in it
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_one_thread) as pool:
        yield from pool.map(write, seeds, chunksize=4)


def _data_set(clips: Iterable[tuple[dict[str, Any], list[dict[str, Any]]]], description: str) -> dict[str, Any]:
    """The JSON of a whole data set; videos and objects are numbered from 1 in the given order."""
    videos: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for video, objects in clips:
        videos.append({"id": len(videos) + 1, **video})
        for entry in objects:
            annotations.append({"id": len(annotations) + 1, "video_id": len(videos), **entry})
    categories = [{"id": index + 1, "name": name, "supercategory": "object"} for index, name in enumerate(CLASSES)]
    info = {"description": description, "version": "1.0"}
    return {"info": info, "videos": videos, "categories": categories, "annotations": annotations}


@contextmanager
def _renamed_whole(folder: Path) -> Iterator[Path]:
    """A temporary sibling that becomes ``folder`` at the end, and is removed if anything fails."""
    if folder.exists():
        raise SinkError(f"{folder} exists already. Remove it, or write to another folder.")
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_youtube_vis(
    folder: Path,
    config: SceneConfig,
    seeds: Iterable[int],
    *,
    workers: int = 1,
    jpeg_quality: int = 92,
    progress: bool = True,
) -> None:
    """Write clips as a data set in the layout of YouTube-VIS: ``JPEGImages/<video>/00000.jpg`` and ``instances.json``.

    Args:
        folder: Made here; it appears under its name only when it is complete.
        config: What the scenes are like.
        seeds: One clip each, see :func:`render_clip`; no seed twice.
        workers: Processes that render, from 1; 1 renders in this process. What is written does not depend on it.
        jpeg_quality: 1 to 100.
        progress: Show a bar on stderr.

    Raises:
        ValueError: A seed comes twice, or ``workers`` is below 1.
        SinkError: The folder exists already, or a frame could not be written. Nothing is left behind.
    """
    seeds = list(seeds)
    if len(set(seeds)) != len(seeds):
        raise ValueError("a seed comes twice; two clips would be the same and have one name")
    if workers < 1:
        raise ValueError(f"workers is {workers}; it has to be at least 1")
    with _renamed_whole(Path(folder)) as partial:
        (partial / "JPEGImages").mkdir()
        clips = _map_clips(_ClipWriter(partial / "JPEGImages", config, jpeg_quality), seeds, workers)
        bar = track(clips, "scenes", len(seeds), console=Console(stderr=True), disable=not progress)
        data = _data_set(bar, f"{len(seeds)} rendered scenes, {config}")
        (partial / "instances.json").write_text(json.dumps(data), encoding="utf-8")
