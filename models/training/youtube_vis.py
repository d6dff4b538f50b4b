"""Videos with instance masks in the layout of YouTube-VIS, and random short clips from them for training.

Reads the folders that :mod:`models.training.scenes` writes and those of the YouTube-VIS challenges of 2019 and 2021:
``JPEGImages/<video>/<frame>.jpg`` beside one JSON file.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools import mask as rle
from torch.utils.data import Dataset

from runtime.errors import SourceFormatError, SourceNotFoundError

ANNOTATION_NAMES = ("instances.json", "train.json", "valid.json")

Frames = NDArray[np.uint8]  # [T, H, W, 3], RGB
Masks = NDArray[np.bool_]  # [O, T, H, W]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Annotation:
    """One object of a video.

    Attributes:
        id: As in the file; unique in the data set.
        label: Index into :attr:`YouTubeVis.classes`, from 0.
        segmentations: Run lengths for each frame of the video, None where the object is not seen.
    """

    id: int
    label: int
    segmentations: tuple[dict[str, Any] | None, ...]


@dataclass(frozen=True)
class Video:
    """One video; ``file_names`` are relative to ``JPEGImages`` and in time order."""

    id: int
    name: str
    height: int
    width: int
    file_names: tuple[str, ...]
    annotations: tuple[Annotation, ...]

    def __len__(self) -> int:
        return len(self.file_names)


def _find_annotations(folder: Path, annotations: Path | None) -> Path:
    candidates = [annotations] if annotations else [folder / name for name in ANNOTATION_NAMES]
    for path in candidates:
        if path.is_file():
            return path
    names = ", ".join(str(path) for path in candidates)
    raise SourceNotFoundError(f"no annotations: looked for {names}. Name the file with annotations=.")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SourceFormatError(f"{path} is not JSON: {error}. Is it cut off, or still an archive?") from error
    missing = [key for key in ("videos", "categories") if not isinstance(data, dict) or key not in data]
    if missing:
        raise SourceFormatError(f"{path} has no {' and no '.join(missing)}; it is not a YouTube-VIS annotation file.")
    return data  # type: ignore[no-any-return]  # a dict, as was just seen


def _annotation(entry: dict[str, Any], label_of: dict[int, int], length: int) -> Annotation:
    segmentations = tuple(entry["segmentations"])
    if len(segmentations) != length:
        raise ValueError(f"object {entry['id']} has {len(segmentations)} segmentations, its video {length} frames")
    return Annotation(entry["id"], label_of[entry["category_id"]], segmentations)


def _video(entry: dict[str, Any], objects: list[dict[str, Any]], label_of: dict[int, int]) -> Video:
    names = tuple(entry["file_names"])
    annotations = tuple(_annotation(item, label_of, len(names)) for item in objects)
    name = names[0].rpartition("/")[0] if names else ""
    return Video(entry["id"], name or str(entry["id"]), entry["height"], entry["width"], names, annotations)


def _parse(data: dict[str, Any]) -> tuple[tuple[str, ...], list[Video]]:
    """Class names in the order of the category ids, and the videos in the order of the file."""
    categories = sorted(data["categories"], key=lambda category: int(category["id"]))
    label_of = {category["id"]: label for label, category in enumerate(categories)}
    objects: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for entry in data.get("annotations") or ():  # the challenge's validation files have none
        objects[entry["video_id"]].append(entry)
    videos = [_video(entry, objects[entry["id"]], label_of) for entry in data["videos"]]
    return tuple(category["name"] for category in categories), videos


def _decode(segmentation: dict[str, Any] | None, height: int, width: int) -> NDArray[np.bool_]:
    """Mask bool [H, W] from compressed or uncompressed run lengths; empty for None."""
    if segmentation is None:
        return np.zeros((height, width), bool)
    if not isinstance(segmentation, dict):
        raise ValueError("a polygon, and only run lengths are read")
    if list(segmentation["size"]) != [height, width]:
        raise ValueError(f"a mask of {segmentation['size']}, and the video is {[height, width]}")
    if isinstance(segmentation["counts"], list):
        segmentation = rle.frPyObjects(segmentation, height, width)
    return np.asarray(rle.decode(segmentation), bool)


class YouTubeVis:
    """A data set on disk; frames and masks are decoded when they are asked for.

    Args:
        folder: Has ``JPEGImages`` in it.
        annotations: The JSON file; by default the first of :data:`ANNOTATION_NAMES` in the folder.

    Attributes:
        classes: Names, in the order of the category ids.
        videos: In the order of the file.

    Raises:
        SourceNotFoundError: There is no annotation file.
        SourceFormatError: It is not JSON, or not of this layout.
    """

    def __init__(self, folder: Path, annotations: Path | None = None) -> None:
        self.folder = Path(folder)
        self.annotations = _find_annotations(self.folder, annotations)
        try:
            self.classes, self.videos = _parse(_read_json(self.annotations))
        except (KeyError, TypeError, ValueError) as error:
            reason = f"no entry {error}" if isinstance(error, KeyError) else error
            raise SourceFormatError(f"{self.annotations} is not a YouTube-VIS annotation file: {reason}") from error

    def frames(self, video: Video, indices: Iterable[int]) -> Frames:
        """Decode frames.

        Returns:
            uint8 [T, H, W, 3], RGB, in the order of ``indices``.

        Raises:
            IndexError: The video has no such frame.
            SourceNotFoundError: A file is missing.
            SourceFormatError: A file is no image, or not of the size that the annotations give.
        """
        decoded = [self._frame(video, index) for index in indices]
        return np.stack(decoded) if decoded else np.zeros((0, video.height, video.width, 3), np.uint8)

    def masks(self, video: Video, indices: Iterable[int]) -> tuple[Masks, Integers, Integers]:
        """Decode the masks of all objects of a video in some of its frames.

        Returns:
            Masks bool [O, T, H, W], labels int64 [O] (indices into :attr:`classes`) and object ids int64 [O]. An
            object that none of these frames shows is there all the same, with empty masks.

        Raises:
            SourceFormatError: A mask is a polygon, broken, or not of the video's size.
        """
        indices = list(indices)
        masks = np.zeros((len(video.annotations), len(indices), video.height, video.width), bool)
        for row, annotation in zip(masks, video.annotations, strict=True):
            for mask, index in zip(row, indices, strict=True):
                mask[:] = self._mask(video, annotation, index)
        labels = np.array([annotation.label for annotation in video.annotations], np.int64)
        return masks, labels, np.array([annotation.id for annotation in video.annotations], np.int64)

    def _mask(self, video: Video, annotation: Annotation, index: int) -> NDArray[np.bool_]:
        try:
            return _decode(annotation.segmentations[index], video.height, video.width)
        except (KeyError, TypeError, ValueError) as error:
            place = f"{self.annotations}: object {annotation.id}, frame {index} of {video.name}"
            raise SourceFormatError(f"{place} cannot be decoded: {error}") from error

    def _frame(self, video: Video, index: int) -> Frames:
        path = self.folder / "JPEGImages" / video.file_names[index]
        if not path.is_file():
            raise SourceNotFoundError(f"{path} is missing, though {self.annotations.name} names it.")
        frame = cv2.imread(str(path), cv2.IMREAD_COLOR)
        if frame is None:
            raise SourceFormatError(f"{path} is no image that can be decoded.")
        if frame.shape[:2] != (video.height, video.width):
            raise SourceFormatError(
                f"{path} is {frame.shape[0]} x {frame.shape[1]} (height x width), "
                f"{self.annotations.name} says {video.height} x {video.width}."
            )
        return np.asarray(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB), np.uint8)


# --- training clips -------------------------------------------------------------------------------------------------


class Sample(TypedDict):
    """images uint8 [T, H, W, 3], masks bool [O, T, H, W], labels int64 [O]."""

    images: torch.Tensor
    masks: torch.Tensor
    labels: torch.Tensor


class Target(TypedDict):
    """masks bool [O, T, H, W], labels int64 [O]."""

    masks: torch.Tensor
    labels: torch.Tensor


class Batch(TypedDict):
    """images uint8 [B, T, H, W, 3], and the objects of each clip."""

    images: torch.Tensor
    targets: list[Target]


@dataclass(frozen=True)
class Crop:
    """The window of a frame that is shown, in pixels of that frame."""

    top: int
    left: int
    height: int
    width: int


def pick_frames(rng: np.random.Generator, length: int, frames: int, max_gap: int) -> list[int]:
    """Frame indices in time order, each 1..``max_gap`` after the one before.

    The gaps shrink where the video is too short for them; one with fewer frames than asked for repeats some.
    """
    if length < frames:
        return sorted(int(i) for i in np.arange(frames) % length)
    largest = max(1, min(max_gap, (length - 1) // max(frames - 1, 1)))
    offsets = np.concatenate([[0], np.cumsum(rng.integers(1, largest + 1, frames - 1))])
    start = rng.integers(length - int(offsets[-1]))
    return [int(i) for i in offsets + start]


def pick_crop(
    rng: np.random.Generator, frame: tuple[int, int], size: tuple[int, int], scale: tuple[float, float]
) -> Crop:
    """Random window of the shape of ``size`` that lies inside a frame.

    Args:
        rng: Where the scale and the place come from.
        frame: Height and width of the frame.
        size: Height and width that the window is resized to.
        scale: Range of the zoom; 1 is the largest window that fits. What is below 1 is taken as 1, since a larger
            window would have black borders.
    """
    zoom = max(float(rng.uniform(*scale)), 1.0)
    shrink = min(frame[0] / size[0], frame[1] / size[1]) / zoom
    height, width = (max(1, min(have, round(want * shrink))) for have, want in zip(frame, size, strict=True))
    top, left = rng.integers(frame[0] - height + 1), rng.integers(frame[1] - width + 1)
    return Crop(int(top), int(left), height, width)


def crop_frames(images: Frames, crop: Crop, size: tuple[int, int]) -> Frames:
    """Cut a window out of frames [T, H, W, 3] and resize it to ``size``, height and width."""
    window = images[:, crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
    method = cv2.INTER_AREA if crop.height > size[0] else cv2.INTER_LINEAR
    return np.stack([cv2.resize(image, size[::-1], interpolation=method) for image in window]).astype(np.uint8)


def crop_masks(masks: Masks, crop: Crop, size: tuple[int, int]) -> Masks:
    """The same for masks [O, T, H, W]; nearest pixel, so that disjoint masks stay disjoint."""
    window = masks[:, :, crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
    result = np.zeros((*masks.shape[:2], *size), bool)
    for place in np.ndindex(*masks.shape[:2]):
        one = window[place].astype(np.uint8)
        result[place] = cv2.resize(one, size[::-1], interpolation=cv2.INTER_NEAREST_EXACT) > 0
    return result


def jitter_colours(rng: np.random.Generator, images: Frames, strength: float) -> Frames:
    """One random change of brightness, contrast and channel gains for all frames; 0 changes nothing."""
    brightness, contrast = rng.uniform(-strength, strength, 2)
    gains = 1 + rng.uniform(-strength, strength, 3) / 2
    level = np.arange(256, dtype=np.float64)[:, None]
    table = np.clip(((level - 128) * (1 + contrast) + 128 * (1 + brightness)) * gains, 0, 255).round().astype(np.uint8)
    return np.stack([cv2.LUT(images[..., c], table[:, c]) for c in range(3)], axis=-1)


class ClipDataset(Dataset[Sample]):
    """Random short clips of a data set, for training.

    A sample depends on the seed, the epoch and its index alone, so that a run that goes on after a break sees what it
    would have seen. One epoch is one clip of every video. Objects that a clip does not show are left out: O may be 0.

    Args:
        source: Where the videos come from; those without any frame are left out.
        size: Height and width of the clips, in pixels.
        frames: Frames per clip (T).
        max_gap: Largest distance between two frames of a clip, in frames of the video.
        seed: Any integer from 0.
        flip: Chance that a clip is mirrored left to right.
        reverse: Chance that a clip runs backwards.
        scale: Range of the zoom before the random crop, see :func:`pick_crop`.
        colour: Strength of the colour jitter, a share of the range; 0 turns it off.
    """

    def __init__(
        self,
        source: YouTubeVis,
        size: tuple[int, int],
        *,
        frames: int = 3,
        max_gap: int = 5,
        seed: int = 0,
        flip: float = 0.5,
        reverse: float = 0.5,
        scale: tuple[float, float] = (0.8, 1.25),
        colour: float = 0.2,
    ) -> None:
        if frames < 1 or max_gap < 1 or min(size) < 1:
            raise ValueError(f"frames {frames}, max_gap {max_gap} and size {size} have to be at least 1")
        self.source, self.size, self.frames, self.max_gap = source, size, frames, max_gap
        self.flip, self.reverse, self.scale, self.colour, self.seed = flip, reverse, scale, colour, seed
        self.videos = [video for video in source.videos if len(video)]
        self._epoch = torch.zeros((), dtype=torch.int64)
        self._epoch.share_memory_()  # type: ignore[no-untyped-call]  # workers that persist see it change

    def set_epoch(self, epoch: int) -> None:
        """Choose the clips of another epoch; call it before iterating over a loader, whose workers see it too."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"clip {index} of {len(self)}")
        rng = np.random.default_rng([self.seed, int(self._epoch), index])
        video = self.videos[index]
        indices = pick_frames(rng, len(video), self.frames, self.max_gap)
        if rng.random() < self.reverse:
            indices.reverse()
        return self._augment(rng, video, indices)

    def _augment(self, rng: np.random.Generator, video: Video, indices: Sequence[int]) -> Sample:
        crop = pick_crop(rng, (video.height, video.width), self.size, self.scale)
        images = jitter_colours(rng, crop_frames(self.source.frames(video, indices), crop, self.size), self.colour)
        masks, labels, _ = self.source.masks(video, indices)
        masks = crop_masks(masks, crop, self.size)
        if rng.random() < self.flip:
            images, masks = images[:, :, ::-1], masks[..., ::-1]
        seen = masks.any(axis=(1, 2, 3))
        return Sample(
            images=torch.from_numpy(np.ascontiguousarray(images)),
            masks=torch.from_numpy(np.ascontiguousarray(masks[seen])),
            labels=torch.from_numpy(labels[seen]),
        )


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack the images of clips of one size and length; the objects stay one entry per clip."""
    return Batch(
        images=torch.stack([sample["images"] for sample in samples]),
        targets=[Target(masks=sample["masks"], labels=sample["labels"]) for sample in samples],
    )
