"""When the prior is dropped: cuts are found, camera work and flickering light are not taken for one."""

from __future__ import annotations

import numpy as np
import pytest

from runtime.resets import FIRST_FRAME, SCENE_CUT, TIME_GAP, ResetDetector, ResetSettings, thumbnail_of


def reasons(frames, detector: ResetDetector | None = None) -> list[str | None]:
    """What the detector says about frames at 30 per second."""
    detector = detector or ResetDetector()
    return [detector.check(thumbnail_of(frame), t / 30) for t, frame in enumerate(frames)]


def cuts(frames) -> list[int]:
    found = reasons(frames)
    assert found[0] == FIRST_FRAME and set(found[1:]) <= {None, SCENE_CUT}
    return [t for t, reason in enumerate(found) if reason == SCENE_CUT]


@pytest.fixture
def canvas() -> np.ndarray:
    """A wide view, rich in contrast at all scales, uint8 [288, 4096, 3]."""
    rng = np.random.default_rng(0)
    total = np.zeros((288, 4096, 3))
    for cell in (8, 16, 32, 96):
        grid = rng.normal(0, 1, (288 // cell + 1, 4096 // cell + 1, 3))
        total += grid.repeat(cell, 0).repeat(cell, 1)[:288, :4096]
    return (128 + 28 * total).clip(0, 255).astype(np.uint8)


def view(canvas: np.ndarray, left: float) -> np.ndarray:
    return canvas[:, round(left) : round(left) + 512]


# --- generated scenes -----------------------------------------------------------------------------------------------


def found_in_scenes(cut_probability: float, seeds: range, frames: int) -> tuple[int, int, int]:
    """Cuts found, cuts there are, and false alarms."""
    from models.training.scenes import SceneConfig, render_clip

    hits, wanted, wrong = 0, 0, 0
    for seed in seeds:
        clip = render_clip(SceneConfig(frames=frames, cut_probability=cut_probability), seed)
        found = set(cuts(clip.frames))
        hits, wanted = hits + len(found & set(clip.cuts)), wanted + len(clip.cuts)
        wrong += len(found - set(clip.cuts))
    return hits, wanted, wrong


@pytest.mark.slow
def test_cuts_of_generated_scenes_are_found():
    hits, wanted, wrong = found_in_scenes(1.0, range(25), frames=6)
    assert wanted == 25
    assert hits >= 0.95 * wanted and wrong == 0, f"{hits} of {wanted} cuts found, {wrong} false alarms"


@pytest.mark.slow
def test_scenes_without_a_cut_have_none():
    assert found_in_scenes(0.0, range(100, 125), frames=8) == (0, 0, 0)


# --- camera work and light ------------------------------------------------------------------------------------------


def test_still_picture_has_no_cut(canvas):
    assert cuts([view(canvas, 0)] * 5) == []


def test_every_cut_between_different_views_is_found(canvas):
    frames = [view(canvas, 800 * shot + 2 * t) for shot in range(4) for t in range(4)]
    assert cuts(frames) == [4, 8, 12]


def test_cut_between_dull_pictures_is_found(canvas):
    dull = canvas // 3 + 80  # as different as the least different of 30 generated cuts
    assert cuts([view(dull, 0), view(dull, 4), view(dull, 2000), view(dull, 2004)]) == [2]


def test_cut_right_after_the_first_frame_is_found(canvas):
    assert cuts([view(canvas, 0), view(canvas, 2000), view(canvas, 2000)]) == [1]


@pytest.mark.parametrize("pixels", [4, 8])
def test_pan_is_no_cut(canvas, pixels):
    assert cuts([view(canvas, pixels * t) for t in range(40)]) == []


@pytest.mark.parametrize("pixels", [32, 64, 100])
def test_fast_pan_is_at_most_one_cut(canvas, pixels):
    still = [view(canvas, 0)] * 6
    found = cuts([*still, *(view(canvas, pixels * t) for t in range(1, 30))])
    assert found in ([], [6])


def test_cut_after_a_fast_pan_is_found(canvas):
    """Once the camera rests for a moment, the pan no longer counts as usual."""
    pan, rest = [view(canvas, 64 * t) for t in range(10)], [view(canvas, 576)] * 3
    other = [view(canvas, 3000)] * 3
    assert 13 in cuts([*pan, *rest, *other])


@pytest.mark.parametrize("offset", [10, 40])
def test_flickering_exposure_is_no_cut(canvas, offset):
    middle = view(canvas, 0) // 2 + 60  # so that nothing is clipped
    assert cuts([middle + np.uint8(offset * (t % 2)) for t in range(20)]) == []


def test_coloured_flicker_is_no_cut(canvas):
    middle = view(canvas, 0) // 2 + 60
    light = np.array([[0, 0, 0], [40, 20, 0]], np.uint8)
    assert cuts([middle + light[t % 2] for t in range(20)]) == []


def test_flickering_contrast_is_at_most_one_cut(canvas):
    picture = view(canvas, 0).astype(np.float32)
    assert len(cuts([(picture * (0.7 + 0.3 * (t % 2))).astype(np.uint8) for t in range(30)])) <= 1


def test_fade_is_no_cut(canvas):
    picture = view(canvas, 0).astype(np.float32)
    assert cuts([(picture * (1 - t / 30)).astype(np.uint8) for t in range(30)]) == []


def test_flash_costs_at_most_two_resets(canvas):
    frames = [view(canvas, 2 * t).copy() for t in range(20)]
    frames[8] = np.maximum(frames[8], 230)
    assert set(cuts(frames)) <= {8, 9}


def test_same_cut_at_any_size(canvas):
    """Pictures of a third and of three times the size; the smallest model input has fewer samples than cells."""
    for scale in (3, 1):
        for enlarge in (1, 3):
            shots = [
                view(canvas, left)[::scale, ::scale].repeat(enlarge, 0).repeat(enlarge, 1) for left in (0, 4, 2000)
            ]
            assert cuts(shots) == [2], (scale, enlarge)


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (32, 32), (96, 160), (37, 61)])
def test_any_size_is_taken(size):
    dark = np.zeros((*size, 3), np.uint8)
    assert cuts([dark, dark + np.uint8(200), dark]) == []  # brightness alone is no cut


# --- reasons --------------------------------------------------------------------------------------------------------


def test_first_frame_has_its_reason(canvas):
    assert reasons([view(canvas, 0)] * 3) == [FIRST_FRAME, None, None]


def test_note_takes_effect_once_and_the_first_reason_stays(canvas):
    detector, picture = ResetDetector(), view(canvas, 0)
    reasons([picture] * 2, detector)
    detector.note("failed step")
    detector.note("resolution change")
    assert [detector.check(thumbnail_of(picture), t / 30) for t in (2, 3)] == ["failed step", None]


def test_source_goes_before_clock_and_picture(canvas):
    detector = ResetDetector()
    detector.check(thumbnail_of(view(canvas, 0)), 0.0)
    assert detector.check(thumbnail_of(view(canvas, 2000)), 99.0, "reconnect") == "reconnect"
    assert detector.check(thumbnail_of(view(canvas, 2000)), 99.1) is None
    assert detector.check(thumbnail_of(view(canvas, 0)), 999.0) == TIME_GAP
    assert detector.check(thumbnail_of(view(canvas, 0)), 1.0) == TIME_GAP  # the clock was set back
    assert detector.check(thumbnail_of(view(canvas, 0)), 2.0) is None  # just the longest gap
    detector.note("asked for")
    assert detector.check(thumbnail_of(view(canvas, 2000)), 0.0, "reconnect") == "asked for"


def test_limits_are_settings(canvas):
    frames = [view(canvas, 0), view(canvas, 2000)]
    assert reasons(frames, ResetDetector(ResetSettings(cut_difference=256))) == [FIRST_FRAME, None]
    assert reasons(frames, ResetDetector(ResetSettings(largest_gap_s=0.01))) == [FIRST_FRAME, TIME_GAP]
