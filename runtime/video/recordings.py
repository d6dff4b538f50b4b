"""Sources that have an end: video files and folders of images. Nothing of them is dropped unless somebody asks."""

from __future__ import annotations

import re
import time
from collections.abc import Generator, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from ..errors import SourceFormatError, SourceLostError, SourceNotFoundError
from .decoding import Decoder
from .frame import Frame
from .source_types import BaseSource

_IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}
_USUAL_IMAGE_RATE = 30.0


class RecordingSource(BaseSource):
    """A video with an end, decoded by PyAV.

    Args:
        decoder: The opened video; the source closes it.
        live: Deliver each frame at its time, as a camera would; a consumer that is late misses frames then.
    """

    def __init__(self, decoder: Decoder, *, live: bool = False) -> None:
        super().__init__(decoder.frame_rate, decoder.frame_count)
        self.live = live
        self._decoder = decoder
        self._started_s: float | None = None

    def _generate(self) -> Generator[Frame, None, None]:
        for picture, time_s in self._decoder.pictures(self._count_decode_error):
            frame = self._frame(picture, time_s)
            if self.live:
                self._wait_for(frame)
            yield frame
        self._check_end()

    def _wait_for(self, frame: Frame) -> None:
        if self._started_s is None:
            self._started_s = time.monotonic() - frame.timestamp_s
        self._closing.wait(max(0.0, self._started_s + frame.timestamp_s - time.monotonic()))

    def _check_end(self) -> None:
        delivered = self.counters.frames_read
        if not delivered:
            raise SourceFormatError(f"{self._decoder.name}: not one of its pictures decodes. The file is damaged.")
        missing = self._decoder.missing()
        if missing:
            raise SourceLostError(
                f"{self._decoder.name}: broke off after {delivered} frames: {missing}. "
                "The frames before are good; fetch or record it again for the rest."
            )

    def _release(self) -> None:
        self._decoder.close()


class ImageFolderSource(BaseSource):
    """A folder of images in natural order (``img_2`` before ``img_10``), as one video.

    A folder that holds no images but one folder that does (``JPEGImages/<video>``, as in YouTube-VIS) stands for that.

    Args:
        folder: The folder.
        frame_rate: Frames per second that the time stamps are made from, default 30.
        names: Images to take, in this order, relative to the folder; None takes all.

    Raises:
        SourceFormatError: There are no images, or several videos to choose from.
        SourceNotFoundError: An image that was named is missing.
    """

    def __init__(self, folder: Path, *, frame_rate: float | None = None, names: Sequence[str] | None = None) -> None:
        self._rate = frame_rate or _USUAL_IMAGE_RATE
        self._paths = _images(_video_folder(folder)) if names is None else _named(folder, names)
        super().__init__(self._rate, len(self._paths))

    def _generate(self) -> Generator[Frame, None, None]:
        for index, path in enumerate(self._paths):
            yield self._frame(self._read(path), index / self._rate)

    def _read(self, path: Path) -> NDArray[np.uint8]:
        try:
            with Image.open(path) as image:
                return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            done = self.counters.frames_read
            kind = SourceLostError if done else SourceFormatError
            raise kind(
                f"{path}: image {done + 1} of {len(self._paths)} does not decode ({error}); {done} were delivered. "
                "Replace it or take it out of the folder."
            ) from error

    def _release(self) -> None:
        pass  # every image was closed after it was read


def recording_from_path(path: Path, *, live: bool = False, frame_rate: float | None = None) -> BaseSource:
    """Open a video file or an image folder; ``frame_rate`` is for folders, ``live`` for files."""
    if not path.exists():
        raise SourceNotFoundError(f"{path}: no such file or folder. Check the path.")
    if path.is_dir():
        return ImageFolderSource(path, frame_rate=frame_rate)
    return RecordingSource(Decoder(f"file:{path}", str(path), low_delay=False), live=live)


def _named(folder: Path, names: Sequence[str]) -> list[Path]:
    paths = [folder / name for name in names]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise SourceNotFoundError(f"{missing[0]} is missing, and {len(missing) - 1} more of {len(paths)} images.")
    return paths


def _video_folder(folder: Path) -> Path:
    """The folder that holds the images: itself, or the only one that does, at most two levels down."""
    if _has_images(folder):
        return folder
    candidates = list(islice(filter(_has_images, _folders_below(folder)), 4))
    if not candidates:
        raise SourceFormatError(
            f"{folder}: no image in this folder. Images end in {', '.join(sorted(_IMAGE_SUFFIXES))}."
        )
    if len(candidates) > 1:
        names = ", ".join(str(candidate) for candidate in candidates[:3])
        raise SourceFormatError(f"{folder}: several videos are in this folder. Name one, for instance {names}.")
    return candidates[0]


def _folders_below(folder: Path) -> Iterator[Path]:
    folders = sorted(path for path in folder.iterdir() if path.is_dir())
    yield from folders
    for below in folders:
        yield from sorted(path for path in below.iterdir() if path.is_dir())


def _has_images(folder: Path) -> bool:
    return any(_is_image(path) for path in folder.iterdir())


def _images(folder: Path) -> list[Path]:
    return sorted(filter(_is_image, folder.iterdir()), key=_natural_order)


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in _IMAGE_SUFFIXES and not path.name.startswith(".")


def _natural_order(path: Path) -> tuple[list[tuple[int, str]], str]:
    parts = re.findall(r"\d+|\D+", path.name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts], path.name
