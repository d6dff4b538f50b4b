"""Letterboxing to the model's input and back is exact."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from video_clips import picture, turn_clockwise, write_clip

from runtime.errors import FrameShapeError
from runtime.video.frame import Frame
from runtime.video.letterbox import Letterbox
from runtime.video.sources import open_source

PAD = (124, 116, 104)
SIZES = [
    pytest.param((720, 1280, 544, 960), id="usual"),
    pytest.param((480, 270, 544, 960), id="portrait"),
    pytest.param((37, 91, 64, 64), id="enlarged"),
    pytest.param((544, 960, 544, 960), id="same"),
    pytest.param((1080, 1917, 288, 512), id="odd"),
]
sides = st.integers(1, 700)


def yuv_frame(height: int, width: int) -> Frame:
    """A frame as a decoder gives it."""
    return Frame(av.VideoFrame.from_ndarray(picture(height, width), format="rgb24").reformat(format="yuv420p"))


def matrix(size: int, scale: float, offset: int, target: int, grid: int) -> np.ndarray:
    """One interpolation matrix [size, grid] as the docstring of ``masks_to_source`` defines it, entry by entry."""
    weights = np.zeros((size, grid))
    for pixel in range(size):
        coordinate = min(max(((pixel + 0.5) * scale + offset) * grid / target - 0.5, 0), grid - 1)
        low = int(coordinate)
        weights[pixel, low] += 1 - (coordinate - low)
        weights[pixel, min(low + 1, grid - 1)] += coordinate - low
    return weights


def interpolated(box: Letterbox, logits: np.ndarray) -> np.ndarray:
    """The logits at the source's pixels, by full matrices in float64."""
    rows = matrix(box.source_height, box.scale_y, box.top, box.target_height, logits.shape[1])
    columns = matrix(box.source_width, box.scale_x, box.left, box.target_width, logits.shape[2])
    return rows @ logits.astype(np.float64) @ columns.T


@settings(deadline=None, max_examples=200)
@given(sides, sides, sides, sides, st.lists(st.floats(0, 1), min_size=4, max_size=4))
def test_box_comes_back(height, width, target_height, target_width, corners):
    box = Letterbox(height, width, target_height, target_width)
    source = np.array([corners], np.float32) * np.array([width, height, width, height], np.float32)
    back = box.boxes_to_source(box.boxes_to_target(source))
    np.testing.assert_allclose(back, source, atol=2e-3 / min(box.scale_x, box.scale_y, 1))


@settings(deadline=None, max_examples=200)
@given(sides, sides, sides, sides)
def test_every_source_pixel_lies_in_the_content(height, width, target_height, target_width):
    box = Letterbox(height, width, target_height, target_width)
    y, x = np.arange(height) + 0.5, np.arange(width) + 0.5
    rows = box.boxes_to_target(np.stack([0 * y, y, 0 * y, y], -1))[:, 1]
    columns = box.boxes_to_target(np.stack([x, 0 * x, x, 0 * x], -1))[:, 0]
    assert (rows > box.top).all() and (rows < box.top + box.content_height).all()
    assert (columns > box.left).all() and (columns < box.left + box.content_width).all()


@settings(deadline=None, max_examples=200)
@given(sides, sides, sides, sides)
def test_aspect_ratio_is_kept_to_the_pixel(height, width, target_height, target_width):
    box = Letterbox(height, width, target_height, target_width)
    ratio = min(target_height / height, target_width / width)
    assert abs(box.content_height - max(1, height * ratio)) <= 0.5 + 1e-9
    assert abs(box.content_width - max(1, width * ratio)) <= 0.5 + 1e-9
    assert box.content_height == target_height or box.content_width == target_width
    assert 0 <= target_height - box.content_height - 2 * box.top <= 1
    assert 0 <= target_width - box.content_width - 2 * box.left <= 1


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("kind", ["yuv", "rgb"])
def test_fit_resizes_and_pads(sizes, kind):
    """Against Pillow's resize of the full-size RGB picture; the padding is set, whatever was in the buffer."""
    box = Letterbox(*sizes, pad_value=PAD)
    frame = yuv_frame(*sizes[:2])
    if kind == "rgb":
        frame = Frame(frame.rgb)
    out = np.full((*sizes[2:], 3), 255, np.uint8)
    box.fit(frame, out)
    want = np.full_like(out, PAD)
    content = slice(box.top, box.top + box.content_height), slice(box.left, box.left + box.content_width)
    resized = Image.fromarray(frame.rgb).resize((box.content_width, box.content_height), Image.Resampling.BILINEAR)
    want[content] = np.asarray(resized)
    outside = np.ones(sizes[2:], bool)
    outside[content] = False
    np.testing.assert_array_equal(out[outside], want[outside])
    difference = np.abs(out[content].astype(int) - want[content])
    assert difference.mean() < 2 and np.percentile(difference, 99) <= 12


def test_fit_writes_into_the_callers_buffer_every_time():
    box = Letterbox(90, 160, 64, 64, PAD)
    buffers = np.zeros((2, 64, 64, 3), np.uint8)  # two inputs that are swapped
    for buffer in (buffers[0], buffers[1], buffers[0]):
        buffer[...] = 7
        box.fit(Frame(picture(90, 160)), buffer)
    np.testing.assert_array_equal(buffers[0], buffers[1])
    assert (buffers[0][0] == PAD).all()


def test_fit_refuses_another_size_and_leaves_the_buffer_alone():
    box = Letterbox(90, 160, 64, 64)
    out = np.full((64, 64, 3), 9, np.uint8)
    with pytest.raises(FrameShapeError, match="90 x 160"):
        box.fit(Frame(picture(160, 90)), out)
    with pytest.raises(FrameShapeError, match="float32"):
        box.fit(Frame(picture(90, 160)), np.zeros((64, 64, 3), np.float32))
    assert (out == 9).all()


def test_fit_turns_a_phone_video_upright(tmp_path: Path):
    path = turn_clockwise(write_clip(tmp_path / "phone.mp4", frames=1, height=96, width=160))
    with open_source(path) as source:
        frame = next(source)
    assert (frame.height, frame.width) == (160, 96)
    want = np.rot90(picture(96, 160), -1)
    assert np.abs(frame.rgb.astype(int) - want).mean() < 8  # coded with loss
    out = np.zeros((80, 80, 3), np.uint8)
    box = Letterbox(160, 96, 80, 80, PAD)
    box.fit(frame, out)
    content = out[:, box.left : box.left + box.content_width]
    shrunk = np.asarray(Image.fromarray(frame.rgb).resize((48, 80), Image.Resampling.BILINEAR))
    assert content.shape == shrunk.shape
    assert np.abs(content.astype(int) - shrunk).mean() < 3


@pytest.mark.parametrize("sizes", SIZES)
def test_masks_are_one_interpolation(sizes):
    box = Letterbox(*sizes)
    rng = np.random.default_rng(0)
    logits = rng.normal(-1, 1, (3, sizes[2] // 4, sizes[3] // 4)).astype(np.float32)
    logits[1] = -1  # one object in a corner, the rest empty: only its surroundings are computed
    logits[1, -4:, -3:] = 2
    logits[2] = -1
    want = interpolated(box, logits)
    clear = np.abs(want) > 1e-4  # float32 against float64
    got = box.masks_to_source(logits)
    assert got.dtype == np.bool_ and got.shape == (3, *sizes[:2])
    np.testing.assert_array_equal(got[clear], want[clear] > 0)
    assert not got[2].any()


def test_masks_equal_torch_interpolate_where_nothing_is_padded():
    torch = pytest.importorskip("torch")
    logits = np.random.default_rng(1).normal(0, 1, (2, 34, 60)).astype(np.float32)
    want = torch.nn.functional.interpolate(torch.from_numpy(logits)[None], size=(136, 240), mode="bilinear")[0].numpy()
    got = Letterbox(136, 240, 136, 240).masks_to_source(logits)
    clear = np.abs(want) > 1e-5
    np.testing.assert_array_equal(got[clear], want[clear] > 0)


def test_masks_agree_with_torch_by_way_of_the_letterboxed_size():
    """Two interpolations, crop in between, as published code does: the same masks but for pixels on their outlines."""
    torch = pytest.importorskip("torch")
    box = Letterbox(720, 1280, 544, 960)
    y, x = np.mgrid[:136, :240]
    logits = np.stack([12 - np.hypot(y - 40, x - 50), 30 - np.hypot(y - 100, x - 200)]).astype(np.float32)
    whole = torch.nn.functional.interpolate(torch.from_numpy(logits)[None], size=(544, 960), mode="bilinear")
    content = whole[:, :, box.top : box.top + box.content_height, box.left : box.left + box.content_width]
    want = torch.nn.functional.interpolate(content, size=(720, 1280), mode="bilinear")[0].numpy() > 0
    got = box.masks_to_source(logits)
    overlap = (got & want).sum((1, 2)) / (got | want).sum((1, 2))
    assert overlap.min() > 0.99


def test_no_masks_and_a_grid_of_one():
    box = Letterbox(20, 30, 16, 16)
    assert box.masks_to_source(np.zeros((0, 4, 4), np.float32)).shape == (0, 20, 30)
    assert box.masks_to_source(np.ones((1, 1, 1), np.float32)).all()


@pytest.mark.parametrize("sizes", SIZES)
def test_patches_are_the_ones_under_the_pixel_centres(sizes):
    box = Letterbox(*sizes)
    patches = np.arange(8 * 5).reshape(8, 5)
    got = box.patches_to_source(patches)
    for y, x in [(0, 0), (sizes[0] - 1, sizes[1] - 1), (sizes[0] // 2, sizes[1] // 3)]:
        row = int(((y + 0.5) * box.scale_y + box.top) * 8 / box.target_height)
        column = int(((x + 0.5) * box.scale_x + box.left) * 5 / box.target_width)
        assert got[y, x] == patches[row, column]
    assert got.shape == sizes[:2]
