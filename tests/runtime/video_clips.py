"""Small clips for the tests, made on the spot with PyAV."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

CODECS = {".avi": "mpeg4", ".webm": "libvpx"}
TICKS_PER_S = 12_800


def picture(height: int, width: int, index: int = 0) -> np.ndarray:
    """A smooth colour gradient that moves with ``index``, uint8 [H, W, 3]."""
    y, x = np.mgrid[:height, :width]
    channels = 2 * x + 6 * index, 2 * y, x + y
    return np.stack([128 + 100 * np.sin(channel / 40) for channel in channels], axis=-1).astype(np.uint8)


def write_clip(
    path: Path,
    *,
    frames: int = 30,
    height: int = 96,
    width: int = 128,
    rate: int = 25,
    times_s: list[float] | None = None,
    options: dict[str, str] | None = None,
) -> Path:
    """A clip with a keyframe every 12 frames, as ``path``'s suffix says; ``times_s`` for a variable frame rate."""
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(CODECS.get(path.suffix, "libx264"), rate, options={"preset": "ultrafast"})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.codec_context.gop_size = 12
        stream.codec_context.time_base = Fraction(1, TICKS_PER_S if times_s else rate)
        for index in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(height, width, index), format="rgb24")
            frame.time_base = stream.codec_context.time_base
            frame.pts = round(times_s[index] * TICKS_PER_S) if times_s else index
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def cut(path: Path, share: float = 0.6) -> Path:
    """Leave only the beginning of a file."""
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


def turn_clockwise(path: Path) -> Path:
    """Mark an MP4 file as filmed with the phone upright: to be shown turned clockwise by 90 degrees."""
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40  # version and flags, times, ids, duration, layer, volume; all of version 0
    one = 0x10000
    data[matrix : matrix + 36] = struct.pack(">9i", 0, one, 0, -one, 0, 0, 0, 0, 0x40000000)
    path.write_bytes(data)
    return path
