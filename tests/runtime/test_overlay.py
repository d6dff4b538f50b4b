"""What is drawn, and what stays as it was."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from video_clips import picture

from runtime.results import FrameResult, Instances
from runtime.video.frame import Frame
from runtime.video.letterbox import Letterbox
from runtime.video.overlay import Overlay, caption, render_text, track_colour

HEIGHT, WIDTH, ROWS, COLUMNS, STAGES = 240, 400, 12, 16, 3  # letterboxed to 192 x 256: padding above and below
NOTHING = Instances(
    np.zeros(0, np.int64),
    np.zeros(0, np.int64),
    np.zeros(0, np.float32),
    np.zeros((0, 4), np.float32),
    np.zeros((0, HEIGHT, WIDTH), bool),
)


def one_object(top: int, left: int, bottom: int, right: int) -> Instances:
    mask = np.zeros((1, HEIGHT, WIDTH), bool)
    mask[0, max(top, 0) : bottom, max(left, 0) : right] = True
    box = np.array([[left, top, right, bottom]], np.float32)
    return Instances(np.array([7]), np.array([1]), np.array([0.87], np.float32), box, mask)


def result(instances: Instances = NOTHING, kept_stages: np.ndarray | None = None, **changes: object) -> FrameResult:
    kept = np.full((ROWS, COLUMNS), STAGES) if kept_stages is None else kept_stages
    plain = FrameResult(4, 0.16, instances, kept, np.array([150, 120, 90]), None, 33.3)
    return dataclasses.replace(plain, **changes)


def drawn(answer: FrameResult) -> np.ndarray:
    return Overlay(["dog", "person"]).draw(Frame(picture(HEIGHT, WIDTH)), answer).copy()


def test_only_the_caption_where_all_patches_are_kept_and_nothing_is_seen():
    got = drawn(result())
    changed = (got != picture(HEIGHT, WIDTH)).any(axis=(1, 2))
    assert not changed[: HEIGHT - 20].any() and changed[HEIGHT - 10 :].any()


def test_frame_is_not_written_to():
    frame = Frame(picture(HEIGHT, WIDTH))
    Overlay(["dog", "person"]).draw(frame, result(one_object(20, 20, 90, 90)))
    np.testing.assert_array_equal(frame.rgb, picture(HEIGHT, WIDTH))


def test_pruned_patches_are_darker_the_earlier_the_darker():
    kept = np.tile(np.arange(COLUMNS) % (STAGES + 1), (ROWS, 1))
    got, plain = drawn(result(kept_stages=kept)), picture(HEIGHT, WIDTH)
    stage_at = Letterbox(HEIGHT, WIDTH, 16 * ROWS, 16 * COLUMNS).patches_to_source(kept)
    shares = [got[:200][stage_at[:200] == s].sum() / plain[:200][stage_at[:200] == s].sum() for s in range(STAGES + 1)]
    assert shares[0] < 0.3 and shares[-1] == 1.0
    assert all(darker + 0.1 < lighter for darker, lighter in itertools.pairwise(shares))


def test_mask_tints_its_pixels_only():
    got, plain = drawn(result(one_object(60, 50, 160, 200))), picture(HEIGHT, WIDTH)
    colour = np.array(track_colour(7))
    np.testing.assert_array_equal(got[60, 50:200], np.tile(colour, (150, 1)))  # outline and box
    want = plain[70:150, 60:190] * 0.5625 + colour * 0.4375
    np.testing.assert_allclose(got[70:150, 60:190], want, atol=1)
    outside = np.ones((HEIGHT, WIDTH), bool)
    outside[30:160, 50:200] = outside[-20:] = False  # the object with its label above, the caption
    np.testing.assert_array_equal(got[outside], plain[outside])


def test_label_stands_above_the_box_and_within_the_picture():
    label = render_text("person #7  0.87", 12, track_colour(7))
    height, width = label.shape[:2]
    np.testing.assert_array_equal(drawn(result(one_object(60, 50, 160, 200)))[60 - height : 60, 50 : 50 + width], label)
    np.testing.assert_array_equal(drawn(result(one_object(0, 390, 60, 400)))[:height, WIDTH - width :], label)


@pytest.mark.parametrize(
    ("corners", "edge"),
    [((-9, -9, 30, 30), (25, 29)), ((150, 380, 260, 460), (170, 380)), ((100, 100, 100, 100), None)],
)
def test_objects_at_the_border_or_empty(corners, edge):
    hidden = dataclasses.replace(one_object(*corners), masks=np.zeros((1, HEIGHT, WIDTH), bool))
    got = drawn(result(hidden))
    assert edge is None or tuple(got[edge]) == track_colour(7)


@pytest.mark.parametrize(("height", "width"), [(4, 3), (9, 31), (481, 640)])
def test_any_size(height, width):
    empty = dataclasses.replace(NOTHING, masks=np.zeros((0, height, width), bool))
    got = Overlay([]).draw(Frame(picture(height, width)), result(empty, np.zeros((2, 2), np.int64)))
    assert got.shape == (height, width, 3) and got.flags.c_contiguous


def test_model_without_pruning():
    got = drawn(result(kept_stages=np.zeros((0, 0), np.int64), tokens_kept=np.zeros(0, np.int64)))
    np.testing.assert_array_equal(got[:200], picture(HEIGHT, WIDTH)[:200])


def test_caption_tells_of_a_reset():
    assert caption(result()) == "frame 4 | 0.16 s | kept 150 / 120 / 90 | 33.3 ms"
    assert caption(result(reset_reason="scene cut")).endswith("reset: scene cut")


def test_colours_of_neighbouring_tracks_differ():
    colours = np.array([track_colour(track) for track in range(12)])
    for before, after in itertools.pairwise(colours):
        assert np.abs(before - after).sum() > 150
