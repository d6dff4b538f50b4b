"""J on folders in DAVIS layout."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle

from models.training.davis import VOID, Davis, region_similarity
from runtime.errors import SourceFormatError, SourceNotFoundError

HEIGHT, WIDTH, FRAMES = 10, 12, 3


def write(folder, index: np.ndarray, name: str = "swan", mode: str = "P"):
    """A video of grey frames with the index masks [T, H, W]."""
    images, masks = folder / "JPEGImages" / "480p" / name, folder / "Annotations" / "480p" / name
    images.mkdir(parents=True)
    masks.mkdir(parents=True)
    for t, frame in enumerate(index):
        Image.new("RGB", (WIDTH, HEIGHT)).save(images / f"{t:05d}.jpg")
        picture = Image.fromarray(frame.astype(np.uint8), "L")
        if mode == "P":
            picture.putpalette([value for level in range(256) for value in (level, level, level)])
        (picture if mode in "PL" else picture.convert(mode)).save(masks / f"{t:05d}.png")
    return Davis(folder).videos[0]


def track(masks: np.ndarray, score: float) -> dict:
    codes = [rle.encode(np.asfortranarray(mask, np.uint8)) if mask.any() else None for mask in masks]
    return {"score": score, "segmentations": codes}


def boxes() -> np.ndarray:
    index = np.zeros((FRAMES, HEIGHT, WIDTH), int)
    index[:, 0:4, 0:4] = 1
    index[1:, 6:9, 6:10] = 2
    return index


@pytest.mark.parametrize("mode", ["P", "L"])
def test_perfect_tracks_have_j_100_and_order_does_not_matter(tmp_path, mode):
    index = boxes()
    video = write(tmp_path, index, mode=mode)
    tracks = [track(index == 2, 0.4), track(index == 1, 0.9)]
    assert region_similarity(video, tracks) == pytest.approx([100, 100])


def test_overlap_is_the_mean_over_the_frames(tmp_path):
    """Object 1 is missed in one of three frames and half covered in another; object 2 has no track."""
    index = boxes()
    video = write(tmp_path, index)
    found = index == 1
    found[0] = False
    found[1, 2:4] = False
    assert region_similarity(video, [track(found, 0.9)]) == pytest.approx([100 * (0 + 0.5 + 1) / 3, 0])


def test_a_frame_in_which_both_are_empty_counts_as_right(tmp_path):
    index = boxes()
    video = write(tmp_path, index)
    assert region_similarity(video, [track(index == 2, 0.9)])[1] == pytest.approx(100)


def test_void_counts_for_nobody_and_the_better_score_has_a_shared_pixel(tmp_path):
    index = boxes()
    index[:, 0:2, 0:4] = VOID
    video = write(tmp_path, index)
    whole = np.zeros(index.shape, bool)
    whole[:, 0:4, 0:4] = True
    assert region_similarity(video, [track(whole, 0.9), track(whole, 0.5)])[0] == pytest.approx(100)


def test_one_track_serves_one_object(tmp_path):
    index = boxes()
    video = write(tmp_path, index)
    assert region_similarity(video, [track(index > 0, 0.9)])[1] == 0
    assert region_similarity(video, []) == [0, 0]


def test_bad_folders_say_what_is_missing(tmp_path):
    with pytest.raises(SourceNotFoundError, match="no folder JPEGImages"):
        Davis(tmp_path)
    video = write(tmp_path, boxes())
    video.annotations[1].unlink()
    with pytest.raises(SourceNotFoundError, match=r"00001\.png is missing, and 0 more masks of swan"):
        Davis(tmp_path)


def test_mask_in_colours_is_refused(tmp_path):
    video = write(tmp_path, boxes(), mode="RGB")
    with pytest.raises(SourceFormatError, match="RGB"):
        region_similarity(video, [])
