"""Annotated videos."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.codec import Codec
from av.container import OutputContainer
from av.video.reformatter import Colorspace
from av.video.stream import VideoStream
from numpy.typing import NDArray

from ..errors import SinkError
from ..results import FrameResult
from .frame import Frame, rgb_view
from .letterbox import Letterbox
from .overlay import Overlay
from .sink_types import FileSink

logger = logging.getLogger(__name__)

_SUFFIXES = (".mp4", ".mov", ".mkv", ".m4v")
_TICKS_PER_S = 60_000  # MPEG-4 allows 65535 at most
_USUAL_FRAME_RATE = 25.0
_BT709 = 1  # the value in H.273, for primaries, transfer and matrix alike
_LIMITED_RANGE = 1
_MPEG4_BITS_PER_PIXEL = 0.2


class VideoSink(FileSink):
    """An annotated video: H.264 where PyAV has the encoder, else MPEG-4. Times are those of the frames.

    It has the size of the first frame, with one more row or column where that is odd; frames of another size, which
    come after a resolution change, are fitted in.

    Args:
        path: ``.mp4``, ``.mov`` or ``.mkv``.
        frame_rate: Frames per second to announce, None if unknown; each frame keeps its own time.
        classes: Names that the labels index.
        patch_size: Pixels of the model's input along one patch.
        quality: Constant rate factor of H.264, 0 (lossless) to 51 (worst).

    Raises:
        SinkError: The place is not writable, or the suffix names no video format.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        frame_rate: float | None,
        classes: Sequence[str],
        *,
        patch_size: int = 16,
        quality: int = 23,
    ) -> None:
        if Path(path).suffix.lower() not in _SUFFIXES:
            raise SinkError(f"{path}: the suffix names no video format. Use one of {', '.join(_SUFFIXES)}.")
        self._overlay = Overlay(classes, patch_size=patch_size)
        self._rate = Fraction(frame_rate or _USUAL_FRAME_RATE).limit_denominator(1001)
        self._quality = quality
        self._encoder: _Encoder | None = None
        super().__init__(path)

    def _open(self) -> None:
        self._container = av.open(str(self._file.partial), "w")

    def _write(self, frame: Frame, result: FrameResult) -> None:
        pixels = self._overlay.draw(frame, result)
        if self._encoder is None:
            self._encoder = _Encoder(self._container, pixels.shape[0], pixels.shape[1], self._rate, self._quality)
        self._encoder.write(pixels, frame.timestamp_s)

    def _finish(self) -> bool:
        if self._encoder is None:
            logger.warning("%s: no frame came, so there is no video", self._file.path)
            return False
        self._encoder.finish()
        self._container.close()
        return True

    def _release(self) -> None:
        with suppress(av.FFmpegError, OSError):
            self._container.close()


class _Encoder:
    """One video stream of a container, fed with RGB pictures."""

    def __init__(self, container: OutputContainer, height: int, width: int, rate: Fraction, quality: int) -> None:
        self._container = container
        self._picture = av.VideoFrame(width + width % 2, height + height % 2, "rgb24")
        self._pixels = rgb_view(self._picture)
        self._size = height, width
        self._stream = _add_stream(container, self._picture, rate, quality)
        self._first_s: float | None = None
        self._last_tick = -1

    def write(self, pixels: NDArray[np.uint8], timestamp_s: float) -> None:
        """Encode one picture [H, W, 3], shown from ``timestamp_s`` on; the first one starts the video."""
        self._place(pixels)
        if self._first_s is None:
            self._first_s = timestamp_s
        self._last_tick = max(self._last_tick + 1, round((timestamp_s - self._first_s) * _TICKS_PER_S))
        picture = self._picture.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709)
        picture.pts, picture.time_base = self._last_tick, Fraction(1, _TICKS_PER_S)
        self._container.mux(self._stream.encode(picture))

    def finish(self) -> None:
        """Write the pictures that the encoder still holds."""
        self._container.mux(self._stream.encode(None))

    def _place(self, pixels: NDArray[np.uint8]) -> None:
        height, width = pixels.shape[:2]
        if (height, width) != self._size:
            Letterbox(height, width, *self._pixels.shape[:2]).fit(Frame(pixels), self._pixels)
            return
        self._pixels[:height, :width] = pixels
        self._pixels[height:] = self._pixels[height - 1]
        self._pixels[:, width:] = self._pixels[:, width - 1 : width]


def _add_stream(container: OutputContainer, picture: av.VideoFrame, rate: Fraction, quality: int) -> VideoStream:
    if _has_encoder("libx264"):
        stream = container.add_stream("libx264", rate, options={"crf": str(quality), "preset": "veryfast"})
    else:
        stream = container.add_stream("mpeg4", rate)
        stream.bit_rate = round(picture.height * picture.width * rate * _MPEG4_BITS_PER_PIXEL)
    stream.height, stream.width, stream.pix_fmt = picture.height, picture.width, "yuv420p"
    codec = stream.codec_context
    codec.time_base = Fraction(1, _TICKS_PER_S)
    codec.colorspace = codec.color_primaries = codec.color_trc = _BT709
    codec.color_range = _LIMITED_RANGE
    return stream


def _has_encoder(name: str) -> bool:
    try:
        Codec(name, "w")
    except ValueError:
        return False
    return True
