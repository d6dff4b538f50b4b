"""The YouTube-VIS protocol: average precision of tracks, whose overlap is that of their masks over the whole video.

pycocotools' evaluation with a video in the place of an image and a track in that of an object, as the challenge's own
tool is made (Video Instance Segmentation, arXiv:1905.04804). TrackEval 1.3.0 gives the same AP, AP50 and AP75 to two
decimals on the validation scenes; it is not used because it brings another build of OpenCV with it.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from runtime.errors import SourceFormatError

MOST_TRACKS = (1, 10, 100)  # per video, for the recalls; precision is that of the last
Segmentation = Mapping[str, Any] | None


@dataclass(frozen=True)
class Scores:
    """In percent, mean over the classes that occur.

    Attributes:
        ap: Average precision, mean over the overlaps 0.50, 0.55, ... 0.95.
        ap50, ap75: At one overlap.
        ar1, ar10: Average recall with 1 and 10 tracks per video.
    """

    ap: float
    ap50: float
    ap75: float
    ar1: float
    ar10: float

    def named(self) -> dict[str, float]:
        """By the usual names."""
        return {name.upper(): value for name, value in vars(self).items()}


class TrackEvaluation(COCOeval):  # type: ignore[misc]
    """Results against a YouTube-VIS annotation file.

    Args:
        truth: The content of the annotation file.
        results: A list of ``video_id``, ``category_id``, ``score`` and ``segmentations`` (one run-length encoding or
            None for each frame of the video), as :class:`runtime.video.sinks.YouTubeVisSink` writes them.

    Raises:
        SourceFormatError: The annotations hold no tracks, or a result does not fit them.
    """

    def __init__(self, truth: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> None:
        if not truth.get("annotations"):
            raise SourceFormatError("the data set has no annotations: write results for its evaluation server instead.")
        lengths = {video["id"]: len(video["file_names"]) for video in truth["videos"]}
        for number, result in enumerate(results):
            if lengths.get(result["video_id"]) != len(result["segmentations"]):
                raise SourceFormatError(
                    f"result {number} has {len(result['segmentations'])} frames, video {result['video_id']} of the "
                    f"data set {lengths.get(result['video_id'], 'does not exist')}."
                )
        super().__init__(_as_coco(truth, truth["annotations"]), _as_coco(truth, results), "bbox")
        self.params.maxDets = list(MOST_TRACKS)
        self.params.areaRng, self.params.areaRngLbl = [[0, 1e10]], ["all"]
        with contextlib.redirect_stdout(io.StringIO()):
            self.evaluate()

    def computeIoU(self, imgId: int, catId: int) -> NDArray[np.float64]:
        """Overlap of the tracks of one video and class, [results by falling score, annotations]."""
        found = sorted(self._dts[imgId, catId], key=lambda track: -track["score"])[: MOST_TRACKS[-1]]
        wanted = self._gts[imgId, catId]
        overlaps = [
            [track_iou(one["segmentations"], other["segmentations"], bool(other["iscrowd"])) for other in wanted]
            for one in found
        ]
        return np.array(overlaps).reshape(len(found), len(wanted))

    def scores(self, videos: Sequence[int] | None = None) -> Scores:
        """Scores over all videos, or over some, of which each may come several times (for a bootstrap).

        Args:
            videos: Positions in the sorted video ids.
        """
        params, results = self._paramsEval, self.evalImgs
        everything = params.imgIds
        if videos is not None:
            per_class = len(everything)
            classes = len(params.catIds)
            self.evalImgs = [results[c * per_class + v] for c in range(classes) for v in videos]
            params.imgIds = self.params.imgIds = list(range(len(videos)))
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                self.accumulate()
        finally:
            self.evalImgs = results
            params.imgIds = self.params.imgIds = everything
        precision, recall = self.eval["precision"][:, :, :, 0, -1], self.eval["recall"][:, :, 0]
        overlaps = np.round(params.iouThrs, 2)
        return Scores(
            ap=_percent(precision),
            ap50=_percent(precision[overlaps == 0.5]),
            ap75=_percent(precision[overlaps == 0.75]),
            ar1=_percent(recall[:, :, 0]),
            ar10=_percent(recall[:, :, 1]),
        )

    @property
    def video_count(self) -> int:
        """Videos of the data set."""
        return len(self._paramsEval.imgIds)


def paired_bootstrap(
    one: TrackEvaluation, other: TrackEvaluation, draws: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """95 % interval of the difference in AP (one - other), from videos drawn with replacement, the same for both."""
    rng = np.random.default_rng(seed)
    count = one.video_count
    drawn = (rng.integers(0, count, count).tolist() for _ in range(draws))
    differences = [one.scores(videos).ap - other.scores(videos).ap for videos in drawn]
    low, high = np.percentile(differences, (2.5, 97.5))
    return float(low), float(high)


def track_iou(one: Sequence[Segmentation], other: Sequence[Segmentation], crowd: bool = False) -> float:
    """Intersection over union of two tracks' masks, both summed over the frames; over the first's area for a crowd."""
    common = first = second = 0.0
    for a, b in zip(one, other, strict=True):
        first += float(rle.area(a)) if a else 0.0
        second += float(rle.area(b)) if b else 0.0
        common += float(rle.area(rle.merge([a, b], intersect=True))) if a and b else 0.0
    whole = first if crowd else first + second - common
    return common / whole if whole else 0.0


def _as_coco(truth: Mapping[str, Any], tracks: Sequence[Mapping[str, Any]]) -> COCO:
    """A pycocotools data set in memory, every track with compressed masks and its mean area."""
    sizes = {video["id"]: (video["height"], video["width"]) for video in truth["videos"]}
    data = COCO()
    data.dataset = {
        "images": [{"id": video["id"]} for video in truth["videos"]],
        "categories": list(truth["categories"]),
        "annotations": [_track(number, track, *sizes[track["video_id"]]) for number, track in enumerate(tracks, 1)],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        data.createIndex()
    return data


def _track(number: int, track: Mapping[str, Any], height: int, width: int) -> dict[str, Any]:
    masks = [_compressed(segmentation, height, width) for segmentation in track["segmentations"]]
    areas = [float(rle.area(mask)) for mask in masks if mask]
    return {
        "id": number,
        "image_id": track["video_id"],
        "category_id": track["category_id"],
        "score": float(track.get("score", 1.0)),
        "iscrowd": int(track.get("iscrowd", 0)),
        "area": float(np.mean(areas)) if areas else 0.0,
        "segmentations": masks,
    }


def _compressed(segmentation: Segmentation, height: int, width: int) -> Segmentation:
    if segmentation is None or not isinstance(segmentation["counts"], list):
        return segmentation
    compressed: Segmentation = rle.frPyObjects(segmentation, height, width)
    return compressed


def _percent(values: NDArray[np.float64]) -> float:
    """Mean of the values that exist, in percent; pycocotools marks the classes that do not occur by -1."""
    there = values[values > -1]
    return float(100.0 * there.mean()) if there.size else float("nan")
