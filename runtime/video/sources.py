"""Video sources: one function that opens whatever a user names."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from urllib.parse import unquote, urlsplit

from ..errors import SourceNotFoundError
from .decoding import Decoder, without_credentials
from .live_sources import Connection, LiveOptions, LiveSource
from .opencv import OpenCvCamera
from .recordings import ImageFolderSource, RecordingSource, recording_from_path
from .source_types import BaseSource, Source, SourceCounters

__all__ = [
    "ImageFolderSource",
    "LiveOptions",
    "LiveSource",
    "RecordingSource",
    "Source",
    "SourceCounters",
    "open_source",
]


_LIVE_ONLY = ("rtsp", "rtmp", "udp:", "rtp:", "srt:")


def open_source(
    spec: str | int | os.PathLike[str],
    *,
    live: bool | None = None,
    frame_rate: float | None = None,
    camera_size: tuple[int, int] | None = None,
    options: LiveOptions | None = None,
    patient: bool = False,
) -> Source:
    """Open what ``spec`` names.

    =============================  ============================================================================
    a path                         a video file, or a folder of images
    ``rtsp://``, ``http://``, ...  a network stream; one that announces its length is a recording, others are live
    ``/dev/video0``                a Video4Linux device
    a number                       a webcam, through OpenCV
    text with ``!`` between words  a GStreamer pipeline that ends in ``appsink``, through OpenCV
    =============================  ============================================================================

    Args:
        spec: The source.
        live: None decides as in the table. True replays a file at its own speed, as a camera would; False takes a
            network stream as a recording, whose end is an end.
        frame_rate: Frames per second: of an image folder (default 30), or to ask a camera for.
        camera_size: Height and width to ask a camera for.
        options: Time limits and attempts of live sources.
        patient: Take a live network stream that does not answer yet, and connect to it as to one that was lost: for
            one camera of several. What may be a recording, and devices of this machine, have to be there.

    Raises:
        SourceNotFoundError: There is nothing.
        SourceFormatError: There is something, but no video that can be decoded.
        SourceError: It may not be opened.
        BackendUnavailableError: OpenCV is needed and not installed, or lacks GStreamer.
    """
    options = options or LiveOptions()
    text = str(spec)
    if isinstance(spec, int) or (text.isdecimal() and not Path(text).exists()):
        return _camera(int(text), camera_size, frame_rate, options)
    if " ! " in text:
        return _camera(text, None, None, options)
    if text.startswith("/dev/video"):
        return _device(text, camera_size, frame_rate, options)
    if text.startswith("file://"):
        text = unquote(urlsplit(text).path)
    if "://" in text:
        return _stream(text, live, options, patient)
    return recording_from_path(Path(text), live=bool(live), frame_rate=frame_rate)


def _camera(
    spec: int | str, size: tuple[int, int] | None, frame_rate: float | None, options: LiveOptions
) -> BaseSource:
    connect = partial(OpenCvCamera, spec, size=size, frame_rate=frame_rate)
    return LiveSource(connect, f"camera {spec}" if isinstance(spec, int) else spec, options)


def _device(path: str, size: tuple[int, int] | None, frame_rate: float | None, options: LiveOptions) -> BaseSource:
    if not Path(path).exists():
        there = ", ".join(sorted(str(device) for device in Path("/dev").glob("video*"))) or "none"
        raise SourceNotFoundError(f"{path}: no such device. Cameras that are there: {there}.")
    asked = {"video_size": f"{size[1]}x{size[0]}"} if size else {}
    if frame_rate is not None:
        asked["framerate"] = str(frame_rate)
    connect = partial(Decoder, path, path, container_format="v4l2", options=asked, low_delay=True)
    return LiveSource(connect, path, options)


def _stream(url: str, live: bool | None, options: LiveOptions, patient: bool) -> BaseSource:
    name = without_credentials(url)
    asked = {"rtsp_transport": options.rtsp_transport} if url.startswith("rtsp") else {}
    limits = options.open_timeout_s, options.read_timeout_s
    connect = partial(Decoder, url, name, options=asked, timeouts_s=limits, low_delay=live)
    if patient and (live or (live is None and url.startswith(_LIVE_ONLY))):
        return LiveSource(connect, name, options, patient=True)
    first = connect()
    if live is False or (live is None and first.duration_s is not None):
        return RecordingSource(first)
    waiting: list[Connection] = [first]
    return LiveSource(lambda: waiting.pop() if waiting else connect(), name, options)
