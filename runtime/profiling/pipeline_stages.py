"""Milliseconds of each stage of the pipeline, one frame after the other in one thread: here nothing overlaps."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import numpy as np

from runtime.backend import Engine
from runtime.bundle import Bundle
from runtime.stream import Stream
from runtime.video.frame import Frame
from runtime.video.overlay import Overlay

STAGES = ("decode", "resize", "check", "upload", "infer", "download", "tracks", "masks", "overlay")


@runtime_checkable
class TimedTransfers(Protocol):
    """Stream buffers on a device that can tell what moving the image up and the results down took."""

    def transfers_ms(self) -> tuple[float, float]:
        """Upload and download of the last step, milliseconds."""


def pipeline_stages(
    bundle: Bundle, engine: Engine, frames: Iterator[Frame] | None, steps: int
) -> dict[str, float | None]:
    """Median milliseconds of each stage at the default budget; None for one that cannot be told apart.

    ``decode`` needs frames of a source, without which noise is run. ``check`` looks for a scene cut and copies the
    picture into the engine's buffer. ``upload`` and ``download`` are there where the buffers are
    :class:`TimedTransfers`; elsewhere they are part of ``infer``, or nothing: on a CPU. ``masks`` brings the masks to
    the source's size.
    """
    times: dict[str, list[float]] = {name: [] for name in STAGES}
    source = frames if frames is not None else _noise_frames()
    overlay = Overlay(bundle.manifest.classes, patch_size=bundle.manifest.patch_size)
    with Stream(bundle, engine) as stream:
        for _ in range(steps):
            started = time.perf_counter()
            frame = next(source, None)
            if frame is None:
                break
            if frames is not None:
                times["decode"].append((time.perf_counter() - started) * 1e3)
            _one_frame(stream, overlay, frame, times)
    return {name: round(float(np.median(values)), 3) if values else None for name, values in times.items()}


def _one_frame(stream: Stream, overlay: Overlay, frame: Frame, times: dict[str, list[float]]) -> None:
    prepared = stream.prepare(frame)
    marks = [time.perf_counter()]
    answer = stream.infer(prepared)
    marks.append(time.perf_counter())
    result = answer.result()
    marks.append(time.perf_counter())
    overlay.draw(frame, result)
    marks.append(time.perf_counter())
    inferring, masks, drawing = (float(ms) for ms in np.diff(marks) * 1e3)
    header = answer.header
    check = header.preprocess_ms - prepared.preprocess_ms
    spent = {
        "resize": prepared.preprocess_ms,
        "check": check,
        "infer": header.step_ms,
        "tracks": inferring - header.step_ms - check,
        "masks": masks,
        "overlay": drawing,
    }
    for name, value in (spent | _transfers(stream, header.step_ms)).items():
        times[name].append(value)


def _transfers(stream: Stream, step_ms: float) -> dict[str, float]:
    """Upload, and download, and what is left of the step; nothing where the backend cannot tell them apart."""
    buffers = stream.buffers
    if not isinstance(buffers, TimedTransfers):
        return {}
    upload, download = buffers.transfers_ms()
    return {"upload": upload, "infer": step_ms - upload - download, "download": download}


def _noise_frames(height: int = 720, width: int = 1280) -> Iterator[Frame]:
    """One random picture again and again, with a running clock: nothing to decode, and no scene cut."""
    picture = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    index = 0
    while True:
        yield Frame(picture, index, index / 30.0)
        index += 1
