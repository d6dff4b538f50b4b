"""Videos in the layout of DAVIS, and its measure J for several objects without any hint (arXiv:1905.00737).

``JPEGImages/[480p/]<video>/*.jpg`` beside ``Annotations*/[480p/]<video>/*.png``, whose palette index is the object,
0 the background and 255 nothing that counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as rle
from scipy.optimize import linear_sum_assignment

from runtime.errors import SourceFormatError, SourceNotFoundError

VOID = 255
MOST_PROPOSALS = 20  # of one video, best score first; the challenge's rule

Masks = NDArray[np.bool_]


@dataclass(frozen=True)
class DavisVideo:
    """One video: its frames and its index masks, in time order."""

    name: str
    folder: Path
    names: tuple[str, ...]
    annotations: tuple[Path, ...]

    def masks(self) -> Iterator[NDArray[np.uint8]]:
        """Index mask [H, W] of each frame.

        Raises:
            SourceFormatError: A file is no index mask.
        """
        for path in self.annotations:
            with Image.open(path) as image:
                if image.mode not in ("P", "L"):
                    raise SourceFormatError(f"{path} is {image.mode}, and an index mask has a palette or is grey.")
                yield np.asarray(image, np.uint8)


class Davis:
    """A data set on disk.

    Args:
        folder: Has ``JPEGImages`` and ``Annotations`` (or ``Annotations_unsupervised``) in it.

    Raises:
        SourceNotFoundError: It has not, or a frame has no mask.
    """

    def __init__(self, folder: Path) -> None:
        images, masks = _below(folder, ("JPEGImages",)), _below(folder, ("Annotations_unsupervised", "Annotations"))
        self.videos = [_video(path, masks / path.name) for path in sorted(images.iterdir()) if path.is_dir()]
        if not self.videos:
            raise SourceNotFoundError(f"{images} holds no folder with frames.")


def _below(folder: Path, names: Sequence[str]) -> Path:
    for name in names:
        if (folder / name).is_dir():
            return folder / name / "480p" if (folder / name / "480p").is_dir() else folder / name
    raise SourceNotFoundError(f"{folder} has no folder {' or '.join(names)}.")


def _video(images: Path, masks: Path) -> DavisVideo:
    frames = sorted(images.glob("*.jpg"))
    annotations = [masks / f"{frame.stem}.png" for frame in frames]
    missing = [path for path in annotations if not path.is_file()]
    if missing:
        raise SourceNotFoundError(f"{missing[0]} is missing, and {len(missing) - 1} more masks of {images.name}.")
    return DavisVideo(images.name, images, tuple(frame.name for frame in frames), tuple(annotations))


def region_similarity(video: DavisVideo, tracks: Sequence[Mapping[str, Any]]) -> list[float]:
    """J of each object of a video in percent: mean over the frames of its overlap with the track that fits it best.

    Each track goes to one object at most, so that the sum is largest; an object left without a track has J 0. Where
    tracks overlap, the one with the higher score has the pixel.

    Args:
        tracks: ``score`` and ``segmentations``, one run-length encoding or None per frame.
    """
    best = sorted(tracks, key=lambda track: -track["score"])[:MOST_PROPOSALS]
    frames = list(video.masks())
    identities = sorted(set().union(*(np.unique(frame).tolist() for frame in frames)) - {0, VOID})
    means = np.zeros((len(identities), len(best)))
    for t, index in enumerate(frames):
        shown = _disjoint([track["segmentations"][t] for track in best], index.shape) & (index != VOID)
        for row, identity in enumerate(identities):
            means[row] += _overlaps(shown, index == identity) / len(frames)
    result = np.zeros(len(identities))
    rows, columns = linear_sum_assignment(-means)
    result[rows] = means[rows, columns]
    return [float(100.0 * value) for value in result]


def _disjoint(segmentations: Sequence[Mapping[str, Any] | None], shape: tuple[int, ...]) -> Masks:
    """Masks [tracks, H, W]; a pixel belongs to the first of them alone."""
    masks, free = np.zeros((len(segmentations), *shape), bool), np.ones(shape, bool)
    for mask, segmentation in zip(masks, segmentations, strict=True):
        if segmentation is not None:
            mask[:] = rle.decode(segmentation).astype(bool) & free
            free &= ~mask
    return masks


def _overlaps(masks: Masks, wanted: Masks) -> NDArray[np.float64]:
    """Intersection over union of masks [tracks, H, W] with one [H, W]; 1 where both are empty."""
    common, either = (masks & wanted).sum((1, 2)), (masks | wanted).sum((1, 2))
    return np.where(either == 0, 1.0, common / np.maximum(either, 1))
