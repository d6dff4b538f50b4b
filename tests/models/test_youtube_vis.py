import json

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as rle
from torch.utils.data import DataLoader

from models.training.scenes import CLASSES, SceneConfig, render_clip, write_youtube_vis
from models.training.youtube_vis import (
    ClipDataset,
    Crop,
    YouTubeVis,
    collate,
    crop_frames,
    crop_masks,
    jitter_colours,
    pick_crop,
    pick_frames,
)
from runtime.errors import SourceFormatError, SourceNotFoundError

# pycocotools 2.0.11 has not followed NumPy 2 yet
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

CONFIG = SceneConfig(height=72, width=128, frames=8, cut_probability=0.5)
SEEDS = (0, 1, 2, 3)
PLAIN = {"flip": 0.0, "reverse": 0.0, "scale": (1.0, 1.0), "colour": 0.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("scenes") / "set"
    write_youtube_vis(path, CONFIG, SEEDS, progress=False)
    return path


@pytest.fixture(scope="module")
def source(folder):
    return YouTubeVis(folder)


def write_set(folder, frames, masks, *, name="instances.json", counts="compressed"):
    """A data set of one video, written by hand: frames [T, H, W, 3], masks [O, T, H, W], categories 7 and 3."""
    (folder / "JPEGImages" / "clip").mkdir(parents=True)
    names = [f"clip/{t:05d}.png" for t in range(len(frames))]  # PNG: pixels are exact
    for file_name, frame in zip(names, frames, strict=True):
        cv2.imwrite(str(folder / "JPEGImages" / file_name), frame[..., ::-1])
    height, width = frames.shape[1:3]
    objects = []
    for o, per_frame in enumerate(masks):
        codes = [encode(mask, counts) for mask in per_frame]
        objects.append({"id": 11 + o, "video_id": 5, "category_id": (7, 3)[o % 2], "segmentations": codes})
    video = {"id": 5, "height": height, "width": width, "length": len(frames), "file_names": names}
    categories = [{"id": 7, "name": "seven"}, {"id": 3, "name": "three"}]
    data = {"videos": [video], "categories": categories, "annotations": objects}
    (folder / name).write_text(json.dumps(data))
    return folder


def encode(mask, counts):
    if not mask.any():
        return None
    if counts == "compressed":
        code = rle.encode(np.asfortranarray(mask, np.uint8))
        return {"size": list(mask.shape), "counts": code["counts"].decode()}
    column_major = mask.ravel(order="F")
    edges = np.flatnonzero(np.diff(np.concatenate([[False], column_major])))
    return {"size": list(mask.shape), "counts": np.diff([0, *edges, mask.size]).tolist()}


def numbered_frames(length, height=16, width=24):
    """Frame t is a flat grey of 10 t."""
    return np.broadcast_to(10 * np.arange(length, dtype=np.uint8)[:, None, None, None], (length, height, width, 3))


def coloured_objects(length=6, height=40, width=60):
    """Objects of full red and full green on black: the picture itself says where each object is."""
    masks = np.zeros((2, length, height, width), bool)
    for t in range(length):
        masks[0, t, 4 + 2 * t : 16 + 2 * t, 3 + 5 * t : 13 + 5 * t] = True
        masks[1, t, 22:34, 50 - 6 * t : 58 - 6 * t] = True
    masks[1] &= ~masks[0]
    frames = np.zeros((length, height, width, 3), np.uint8)
    frames[..., 0][masks[0]] = 255
    frames[..., 1][masks[1]] = 255
    return frames, masks


# --- reading --------------------------------------------------------------------------------------------------------


def test_round_trip(source):
    """Masks and labels come back exactly, frames as JPEG keeps them."""
    assert source.classes == CLASSES
    for video, seed in zip(source.videos, SEEDS, strict=True):
        clip = render_clip(CONFIG, seed)
        masks, labels, ids = source.masks(video, range(CONFIG.frames))
        np.testing.assert_array_equal(masks, clip.masks)
        np.testing.assert_array_equal(labels, clip.labels)
        assert len(set(ids.tolist())) == len(labels)
        frames = source.frames(video, range(CONFIG.frames))
        assert np.abs(frames.astype(int) - clip.frames).mean() < 6
        assert np.corrcoef(frames[0].mean(axis=(0, 1)), clip.frames[0].mean(axis=(0, 1)))[0, 1] > 0.99  # RGB, not BGR


def test_indices_choose_frames(source):
    video = source.videos[0]
    masks, _, _ = source.masks(video, range(len(video)))
    some, _, _ = source.masks(video, [5, 1, 1])
    np.testing.assert_array_equal(some, masks[:, [5, 1, 1]])
    np.testing.assert_array_equal(source.frames(video, [5, 1]), source.frames(video, range(8))[[5, 1]])
    assert source.frames(video, []).shape == (0, 72, 128, 3)


@pytest.mark.parametrize("counts", ["compressed", "uncompressed"])
def test_both_kinds_of_run_lengths(tmp_path, counts):
    frames, masks = coloured_objects()
    masks[1, 2:4] = False
    source = YouTubeVis(write_set(tmp_path, frames, masks, counts=counts))

    got, labels, ids = source.masks(source.videos[0], range(6))
    np.testing.assert_array_equal(got, masks)
    np.testing.assert_array_equal(source.frames(source.videos[0], range(6)), frames)
    assert (source.classes, labels.tolist(), ids.tolist()) == (("three", "seven"), [1, 0], [11, 12])
    assert source.videos[0].name == "clip"


@pytest.mark.parametrize("name", ["train.json", "valid.json"])
def test_names_of_the_challenge(tmp_path, name):
    frames, masks = coloured_objects()
    assert len(YouTubeVis(write_set(tmp_path, frames, masks, name=name)).videos) == 1


def test_validation_set_without_annotations(tmp_path):
    frames, masks = coloured_objects()
    path = write_set(tmp_path, frames, masks) / "instances.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "annotations": None}))

    source = YouTubeVis(tmp_path)
    masks, labels, ids = source.masks(source.videos[0], [0, 1])
    assert (masks.shape, labels.shape, ids.shape) == ((0, 2, 40, 60), (0,), (0,))


# --- what a file can get wrong --------------------------------------------------------------------------------------


def test_missing_annotations(tmp_path):
    with pytest.raises(SourceNotFoundError, match=r"instances\.json.*valid\.json"):
        YouTubeVis(tmp_path)
    with pytest.raises(SourceNotFoundError, match=r"other\.json"):
        YouTubeVis(tmp_path, tmp_path / "other.json")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "is not JSON"),
        ("[]", "no videos and no categories"),
        ('{"videos": []}', "no categories"),
        ('{"videos": [{"id": 1}], "categories": []}', "no entry 'file_names'"),
        ('{"videos": 3, "categories": []}', "not a YouTube-VIS annotation file"),
    ],
)
def test_malformed_annotations(tmp_path, text, reason):
    (tmp_path / "instances.json").write_text(text)
    with pytest.raises(SourceFormatError, match=reason):
        YouTubeVis(tmp_path)


def edited_set(folder, edit):
    """A good set with one annotation changed by ``edit``."""
    path = write_set(folder, *coloured_objects()) / "instances.json"
    data = json.loads(path.read_text())
    edit(data["annotations"][0])
    path.write_text(json.dumps(data))
    return folder


def test_segmentations_of_another_length(tmp_path):
    with pytest.raises(SourceFormatError, match="object 11 has 5 segmentations, its video 6 frames"):
        YouTubeVis(edited_set(tmp_path, lambda entry: entry["segmentations"].pop()))


@pytest.mark.parametrize(
    ("segmentation", "reason"), [([[0, 0, 5, 0, 5, 5]], "polygon"), ({"size": [9, 9], "counts": "1"}, r"\[9, 9\]")]
)
def test_a_mask_that_cannot_be_read(tmp_path, segmentation, reason):
    source = YouTubeVis(edited_set(tmp_path, lambda entry: entry["segmentations"].__setitem__(2, segmentation)))
    source.masks(source.videos[0], [0, 1])
    with pytest.raises(SourceFormatError, match=f"object 11, frame 2 of clip cannot be decoded.*{reason}"):
        source.masks(source.videos[0], [2])


def test_frames_that_cannot_be_read(tmp_path):
    source = YouTubeVis(write_set(tmp_path, *coloured_objects()))
    images = tmp_path / "JPEGImages" / "clip"
    (images / "00000.png").unlink()
    (images / "00001.png").write_bytes(b"no image")
    cv2.imwrite(str(images / "00002.png"), np.zeros((8, 8, 3), np.uint8))
    for index, error, reason in [
        (0, SourceNotFoundError, "is missing"),
        (1, SourceFormatError, "no image"),
        (2, SourceFormatError, r"8 x 8 .* says 40 x 60"),
    ]:
        with pytest.raises(error, match=reason):
            source.frames(source.videos[0], [index])


# --- training clips -------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(length=st.integers(1, 40), frames=st.integers(1, 12), max_gap=st.integers(1, 9), seed=st.integers(0, 2**32))
def test_picked_frames(length, frames, max_gap, seed):
    indices = pick_frames(np.random.default_rng(seed), length, frames, max_gap)
    gaps = np.diff(indices)
    assert len(indices) == frames
    assert all(0 <= index < length for index in indices)
    assert (gaps <= max_gap).all()
    assert (gaps >= (1 if length >= frames else 0)).all()


@settings(max_examples=200, deadline=None)
@given(
    frame=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    size=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    seed=st.integers(0, 2**32),
)
def test_picked_crop_lies_inside(frame, size, seed):
    crop = pick_crop(np.random.default_rng(seed), frame, size, (0.8, 1.25))
    assert crop.height >= 1
    assert crop.width >= 1
    assert 0 <= crop.top <= frame[0] - crop.height
    assert 0 <= crop.left <= frame[1] - crop.width


def test_crop_keeps_the_shape_of_things():
    """The window has the shape of what it becomes, up to the rounding to whole pixels, so nothing is squeezed."""
    for seed in range(50):
        crop = pick_crop(np.random.default_rng(seed), (720, 1280), (192, 320), (0.8, 1.25))
        assert crop.height / crop.width == pytest.approx(192 / 320, rel=0.003)
        assert 720 / 1.25 / 1.01 <= crop.height <= 720


def test_crop_without_change():
    frames, masks = coloured_objects()
    whole = Crop(0, 0, 40, 60)
    np.testing.assert_array_equal(crop_frames(frames, whole, (40, 60)), frames)
    np.testing.assert_array_equal(crop_masks(masks, whole, (40, 60)), masks)


def test_colour_jitter():
    frames, _ = coloured_objects()
    np.testing.assert_array_equal(jitter_colours(np.random.default_rng(0), frames, 0.0), frames)
    twice = np.concatenate([frames, frames])
    changed = jitter_colours(np.random.default_rng(0), twice, 0.3)
    np.testing.assert_array_equal(changed[:6], changed[6:])
    assert not np.array_equal(changed[:6], frames)


@settings(max_examples=15, deadline=None)
@given(size=st.tuples(st.integers(8, 100), st.integers(8, 140)), frames=st.integers(1, 9), index=st.integers(0, 3))
def test_sample_shapes(source, size, frames, index):
    sample = ClipDataset(source, size, frames=frames)[index]
    objects = len(sample["labels"])
    assert sample["images"].shape == (frames, *size, 3)
    assert sample["masks"].shape == (objects, frames, *size)
    assert (sample["images"].dtype, sample["masks"].dtype, sample["labels"].dtype) == (
        torch.uint8,
        torch.bool,
        torch.int64,
    )
    assert sample["masks"].flatten(1).any(dim=1).all(), "an object that is not seen"
    assert sample["masks"].sum(dim=0).max() <= 1 if objects else True


def test_same_seed_epoch_and_index_same_clip(source):
    one, other = ClipDataset(source, (64, 96), seed=5), ClipDataset(source, (64, 96), seed=5)
    first = one[2]
    _ = other[0], other[1]  # what was drawn before has no part in it
    for key, value in other[2].items():
        assert torch.equal(first[key], value)
    other.set_epoch(1)
    assert not torch.equal(first["images"], other[2]["images"])
    other.set_epoch(0)
    assert torch.equal(first["images"], other[2]["images"])
    assert not torch.equal(first["images"], ClipDataset(source, (64, 96), seed=6)[2]["images"])


@pytest.mark.parametrize("reverse", [0.0, 1.0])
def test_time_order(tmp_path, reverse):
    source = YouTubeVis(write_set(tmp_path, numbered_frames(20), np.zeros((0, 20, 16, 24), bool)))
    dataset = ClipDataset(source, (16, 24), frames=4, max_gap=5, **{**PLAIN, "reverse": reverse})
    seen = set()
    for epoch in range(30):
        dataset.set_epoch(epoch)
        times = dataset[0]["images"][:, 0, 0, 0].int() // 10
        gaps = times.diff() * (-1 if reverse else 1)
        assert ((gaps >= 1) & (gaps <= 5)).all()
        seen |= set(gaps.tolist())
    assert seen == {1, 2, 3, 4, 5}


@pytest.mark.parametrize("size", [(40, 60), (64, 96), (24, 24), (30, 80)], ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_masks_stay_on_the_picture(tmp_path, size, flip):
    """The objects are the only red and green in the picture, so the picture tells the masks, up to one pixel."""
    source = YouTubeVis(write_set(tmp_path, *coloured_objects()))
    dataset = ClipDataset(source, size, **{**PLAIN, "flip": flip, "reverse": 0.5, "scale": (1.0, 1.6)})
    for epoch in range(10):
        dataset.set_epoch(epoch)
        sample = dataset[0]
        images, masks = sample["images"].numpy(), sample["masks"].numpy()
        for object_masks, label in zip(masks, sample["labels"], strict=True):
            channel = 1 - int(label)  # label 1 is category 7, the red object
            for image, mask in zip(images, object_masks, strict=True):
                assert_within_a_pixel(mask, image[..., channel] > 127)


def assert_within_a_pixel(mask, picture):
    around, picture = np.ones((3, 3), np.uint8), picture.astype(np.uint8)
    assert not (mask & (cv2.dilate(picture, around) == 0)).any(), "the mask goes beyond the object"
    assert not (~mask & (cv2.erode(picture, around, borderValue=0) == 1)).any(), "the mask misses a part"


def test_flip_is_the_mirrored_clip(tmp_path):
    source = YouTubeVis(write_set(tmp_path, *coloured_objects()))
    plain = ClipDataset(source, (40, 60), **PLAIN)[0]
    flipped = ClipDataset(source, (40, 60), **{**PLAIN, "flip": 1.0})[0]
    for key in ("images", "masks"):
        axis = 2 if key == "images" else 3
        np.testing.assert_array_equal(flipped[key].numpy(), np.flip(plain[key].numpy(), axis))


def test_clip_without_objects(tmp_path):
    source = YouTubeVis(write_set(tmp_path, numbered_frames(5), np.zeros((2, 5, 16, 24), bool)))
    sample = ClipDataset(source, (16, 24))[0]
    assert sample["masks"].shape == (0, 3, 16, 24)
    assert sample["labels"].shape == (0,)


def test_wrong_arguments(source):
    with pytest.raises(ValueError, match="at least 1"):
        ClipDataset(source, (16, 24), frames=0)
    with pytest.raises(IndexError, match="clip 4 of 4"):
        ClipDataset(source, (16, 24))[4]


def test_collate(source):
    dataset = ClipDataset(source, (48, 64))
    samples = [dataset[i] for i in range(4)]
    batch = next(iter(DataLoader(dataset, batch_size=4, collate_fn=collate)))
    assert torch.equal(batch["images"], torch.stack([sample["images"] for sample in samples]))
    assert batch["images"].shape == (4, 3, 48, 64, 3)
    for target, sample in zip(batch["targets"], samples, strict=True):
        assert torch.equal(target["masks"], sample["masks"])
        assert torch.equal(target["labels"], sample["labels"])


def test_persistent_workers_follow_the_epoch(source):
    dataset = ClipDataset(source, (24, 32))
    workers = {"num_workers": 1, "persistent_workers": True, "multiprocessing_context": "fork"}
    loader = DataLoader(dataset, batch_size=4, collate_fn=collate, **workers)
    for epoch in (0, 1):
        dataset.set_epoch(epoch)
        (batch,) = loader
        assert torch.equal(batch["images"][3], dataset[3]["images"])
