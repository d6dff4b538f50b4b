"""A stream: what is carried from frame to frame, when it is not, and what a failure leaves."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from runtime.budget import token_budget
from runtime.errors import FrameShapeError, StepError, TokenBudgetError
from runtime.resets import ResetSettings
from runtime.results import FrameResult
from runtime.stream import Stream
from runtime.video.frame import Frame

SIZE = (96, 160)
PATCHES = 60


def run(stream: Stream, frames, start: int = 0) -> list[FrameResult]:
    """Step through frames with a clock of 30 frames per second."""
    return [stream.step(frame, timestamp_s=(start + t) / 30) for t, frame in enumerate(frames)]


def answers(result: FrameResult) -> list[np.ndarray]:
    """Everything that the model decides, copied; track ids counted from the first one."""
    objects = result.instances
    ids = objects.track_ids - objects.track_ids.min(initial=2**40)
    arrays = result.kept_stages, result.tokens_kept, ids, objects.labels, objects.scores, objects.boxes, objects.masks
    return [array.copy() for array in arrays]


def assert_same(got: FrameResult, want: FrameResult, message: str = "") -> None:
    for one, other in zip(answers(got), answers(want), strict=True):
        np.testing.assert_array_equal(one, other, err_msg=message)


def assert_all_same(got: list[FrameResult], want: list[FrameResult]) -> None:
    for t, (one, other) in enumerate(zip(got, want, strict=True)):
        assert_same(one, other, f"frame {t}")


@pytest.fixture
def stream(micro, micro_engine):
    with Stream(micro, micro_engine) as stream:
        yield stream


# --- the prior ------------------------------------------------------------------------------------------------------


def test_kept_tokens_depend_on_the_frame_before(micro, micro_engine, drifting_frames):
    """The same frame after two different ones; the same after the same one."""
    (one, other), (frame,) = (drifting_frames(1, seed=seed)[0] for seed in (1, 2)), drifting_frames(1, seed=3)
    no_cuts = ResetSettings(cut_difference=256)
    kept = []
    for before in (one, other, one):
        with Stream(micro, micro_engine, resets=no_cuts) as stream:
            last = run(stream, [before, frame])[-1]
        assert last.reset_reason is None
        assert last.tokens_kept.tolist() == list(stream.budget)
        kept.append(last.kept_stages > 0)  # what Map-SM chose, which sees the prior
    assert (kept[0] != kept[1]).any()
    np.testing.assert_array_equal(kept[0], kept[2])


def test_first_frame_keeps_all_tokens_at_stage_0(stream, drifting_frames):
    first, second = run(stream, drifting_frames(2))
    assert first.reset_reason == "first frame" and second.reset_reason is None
    assert first.tokens_kept.tolist() == [PATCHES, *stream.budget[1:]]
    assert second.tokens_kept.tolist() == list(stream.budget)
    assert (first.kept_stages >= 1).all()
    assert stream.reset_counts == {"first frame": 1}


def test_reset_equals_a_fresh_stream_but_track_ids_go_on(micro, micro_engine, stream, drifting_frames):
    frames = drifting_frames(8)
    before = run(stream, frames[:4])
    stream.reset()
    after = run(stream, frames[4:], start=4)
    with Stream(micro, micro_engine) as fresh:
        want = run(fresh, frames[4:])
    assert_all_same(after, want)
    assert [result.reset_reason for result in after] == ["reset by caller", None, None, None]
    assert len(after[0].instances) > 0
    assert max(result.instances.track_ids.max() for result in before) < after[0].instances.track_ids.min()


def test_interleaved_streams_equal_separate_ones(micro, micro_engine, drifting_frames):
    clips = drifting_frames(5, seed=1), drifting_frames(5, seed=2)
    separate = []
    for clip in clips:
        with Stream(micro, micro_engine) as stream:
            separate.append(run(stream, clip))
    with Stream(micro, micro_engine) as one, Stream(micro, micro_engine) as other:
        pairs = [
            (one.step(a, timestamp_s=t / 30), other.step(b, timestamp_s=t / 30))
            for t, (a, b) in enumerate(zip(*clips, strict=True))
        ]
    for got, want in zip(zip(*pairs, strict=True), separate, strict=True):
        assert_all_same(list(got), want)


@pytest.mark.slow
def test_200_frames_track_torch(micro, micro_engine, micro_model, drifting_frames):
    """Each side carries its own state: rounding may tip a near-tie, and the choices may then differ a little."""
    import torch

    state, overlaps = micro_model.initial_state(1), []
    with Stream(micro, micro_engine) as stream, torch.no_grad():
        for t, frame in enumerate(drifting_frames(200)):
            got = stream.step(frame, timestamp_s=t / 30)
            budget = (PATCHES, *stream.budget[1:]) if t == 0 else stream.budget
            outputs, state = micro_model(torch.from_numpy(frame)[None], state, torch.tensor(budget))
            want = outputs.kept_stages[0].numpy().reshape(got.kept_stages.shape)
            for stage in range(len(budget)):
                one, other = got.kept_stages > stage, want > stage
                overlaps.append((one & other).sum() / (one | other).sum())
    assert stream.reset_counts == {"first frame": 1}
    assert np.mean(overlaps) >= 0.99, f"mean overlap of kept tokens {np.mean(overlaps):.4f}, worst {min(overlaps):.3f}"


def test_results_are_the_callers_own(stream, drifting_frames):
    frames = drifting_frames(6)
    result = run(stream, frames[:1])[0]
    before = answers(result)
    run(stream, frames[1:], start=1)
    for one, other in zip(answers(result), before, strict=True):
        np.testing.assert_array_equal(one, other)


def test_objects_come_in_pixels_of_the_source(micro, micro_engine, drifting_frames):
    """A source of another size and shape than the model's input."""
    with Stream(micro, micro_engine) as stream:
        objects = run(stream, drifting_frames(1, size=(75, 50)))[0].instances
    assert len(objects) > 0
    assert objects.masks.shape == (len(objects), 75, 50) and objects.masks.dtype == bool
    for mask, (x1, y1, x2, y2) in zip(objects.masks, objects.boxes.astype(int), strict=True):
        assert mask[y1:y2, x1:x2].sum() == mask.sum() > 0
        assert (
            mask[y1:y2, x1].any() and mask[y1:y2, x2 - 1].any() and mask[y1, x1:x2].any() and mask[y2 - 1, x1:x2].any()
        )
    assert ((objects.scores >= 0) & (objects.scores <= 1)).all()


# --- resets ---------------------------------------------------------------------------------------------------------


def test_resolution_change_drops_the_prior(micro, micro_engine, stream, drifting_frames):
    small, large = drifting_frames(2), drifting_frames(3, size=(120, 200))
    results = run(stream, [*small, *large])
    assert [result.reset_reason for result in results] == ["first frame", None, "resolution change", None, None]
    with Stream(micro, micro_engine) as fresh:
        assert_all_same(results[2:], run(fresh, large))
    assert results[2].instances.masks.shape[1:] == (120, 200)


@pytest.mark.parametrize(
    ("times_s", "reasons"),
    [
        ([0.0, 0.9, 1.8], [None, None]),
        ([0.0, 1.1, 1.2], ["time gap", None]),
        ([5.0, 4.9, 5.0], ["time gap", None]),
        ([3.0, 3.0, 3.0], [None, None]),
    ],
    ids=["slow", "gap", "backwards", "equal"],
)
def test_time_gap_drops_the_prior(stream, drifting_frames, times_s, reasons):
    frames = zip(drifting_frames(3), times_s, strict=True)
    assert [stream.step(frame, timestamp_s=t).reset_reason for frame, t in frames] == ["first frame", *reasons]


def test_longest_gap_is_a_setting(micro, micro_engine, drifting_frames):
    with Stream(micro, micro_engine, resets=ResetSettings(largest_gap_s=10)) as stream:
        reasons = [stream.step(frame, timestamp_s=5.0 * t).reset_reason for t, frame in enumerate(drifting_frames(2))]
    assert reasons == ["first frame", None]


def test_source_says_that_a_frame_does_not_continue(stream, drifting_frames):
    frames = [
        Frame(picture, 10 + t, t / 30, "reconnect" if t == 1 else None) for t, picture in enumerate(drifting_frames(3))
    ]
    results = [stream.step(frame) for frame in frames]
    assert [result.reset_reason for result in results] == ["first frame", "reconnect", None]
    assert [result.frame_index for result in results] == [10, 11, 12]
    assert [result.timestamp_s for result in results] == [frame.timestamp_s for frame in frames]


def test_cut_drops_the_prior_and_ends_tracks(stream, drifting_frames):
    dark = np.zeros((*SIZE, 3), np.uint8)
    bright = dark.copy()
    bright[:, 80:] = 255
    results = run(stream, [dark, dark, bright, bright])
    assert [result.reset_reason for result in results] == ["first frame", None, "scene cut", None]
    assert not set(results[1].instances.track_ids) & set(results[2].instances.track_ids)
    assert set(results[2].instances.track_ids) == set(results[3].instances.track_ids)


def test_border_of_the_letterbox_does_not_hide_a_cut(stream):
    """A narrow picture fills a twelfth of the input; only what is in it counts."""
    one = np.zeros((96, 13, 3), np.uint8)
    other = one.copy()
    other[:48] = 60
    assert [result.reset_reason for result in run(stream, [one, one, other])] == ["first frame", None, "scene cut"]


# --- failures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "picture",
    [
        np.zeros(SIZE, np.uint8),
        np.zeros((*SIZE, 4), np.uint8),
        np.zeros((*SIZE, 3), np.float32),
        np.zeros((0, 160, 3), np.uint8),
        [[1, 2, 3]],
        None,
        Frame(np.zeros((*SIZE, 1), np.uint8), 1, 1 / 30),
    ],
    ids=["grey", "rgba", "float", "empty", "list", "none", "grey frame"],
)
def test_wrong_frame_leaves_the_prior_unchanged(micro, micro_engine, stream, drifting_frames, picture):
    frames = drifting_frames(4)
    got = run(stream, frames[:2])
    with pytest.raises(FrameShapeError, match="a frame is uint8") as caught:
        stream.step(picture, timestamp_s=2 / 30)
    assert "got" in str(caught.value)
    got += run(stream, frames[2:], start=2)
    with Stream(micro, micro_engine) as other:
        assert_all_same(got, run(other, frames))
    assert [result.reset_reason for result in got[1:]] == [None] * 3


def test_failed_step_drops_the_prior(micro, micro_engine, faulty_engine, drifting_frames):
    frames = drifting_frames(6)
    with Stream(micro, faulty_engine([None, None, "fail"])) as stream:
        run(stream, frames[:2])
        with pytest.raises(StepError, match="the device is gone"):
            stream.step(frames[2], timestamp_s=2 / 30)
        got = run(stream, frames[3:], start=3)
    assert [result.reset_reason for result in got] == ["failed step", None, None]
    assert [result.frame_index for result in got] == [3, 4, 5]
    assert stream.reset_counts == {"first frame": 1, "failed step": 1}
    with Stream(micro, micro_engine) as fresh:
        assert_all_same(got, run(fresh, frames[3:]))


def test_failed_steps_in_a_row_keep_the_prior_dropped(micro, faulty_engine, drifting_frames):
    frames = drifting_frames(4)
    with Stream(micro, faulty_engine(["fail", "fail"])) as stream:
        for t in range(2):
            with pytest.raises(StepError):
                stream.step(frames[t], timestamp_s=t / 30)
        result = stream.step(frames[2], timestamp_s=2 / 30)
    assert result.reset_reason == "failed step" and result.tokens_kept[0] == PATCHES


def test_unusable_state_drops_the_prior_at_the_next_frame(micro, micro_engine, faulty_engine, drifting_frames):
    frames = drifting_frames(5)
    with Stream(micro, faulty_engine([None, "not ok"])) as stream:
        results = run(stream, frames)
    assert [result.reset_reason for result in results] == ["first frame", None, "non-finite or empty state", None, None]
    with Stream(micro, micro_engine) as fresh:
        assert_all_same(results[2:], run(fresh, frames[2:]))


def test_state_with_nan_is_noticed_by_the_graph(micro, micro_engine, drifting_frames):
    class Poisoned:
        report, graph = micro_engine.report, micro_engine.graph
        buffers = micro_engine.open_stream()

        def open_stream(self, batch=1, usual_budget=None):
            return self.buffers

    frames = drifting_frames(4)
    with Stream(micro, Poisoned()) as stream:
        run(stream, frames[:1])
        state = Poisoned.buffers.state()
        state["prior.queries"][0, 0, 0] = np.nan
        Poisoned.buffers.set_state(state)
        results = run(stream, frames[1:], start=1)
    assert [result.reset_reason for result in results] == [None, "non-finite or empty state", None]
    assert len(results[0].instances) == 0  # nothing is shown that no number stands behind
    assert len(results[1].instances) > 0


# --- budget ---------------------------------------------------------------------------------------------------------


def test_budget_is_the_bundles_default_a_ratio_or_counts(micro, micro_engine, drifting_frames):
    default = micro.manifest.presets[micro.manifest.default_preset]
    for asked, want in [
        ({}, default),
        ({"keep_ratio": 0.4}, token_budget(PATCHES, 0.4)),
        ({"keep_ratio": 1.0}, (PATCHES,) * 4),
        ({"budget": [40, 30, 20, 1]}, (40, 30, 20, 1)),
        ({"budget": np.array([7, 7, 7, 7])}, (7, 7, 7, 7)),
    ]:
        with Stream(micro, micro_engine, **asked) as stream:
            results = run(stream, drifting_frames(3))
        assert [result.tokens_kept.tolist() for result in results[1:]] == [list(want)] * 2, asked
    assert all(one >= other for one, other in pairwise(default))


@pytest.mark.parametrize(
    "asked",
    [
        {"keep_ratio": 0.0},
        {"keep_ratio": 1.1},
        {"keep_ratio": float("nan")},
        {"budget": (30, 20, 10)},
        {"budget": (61, 20, 10, 5)},
        {"budget": (30, 20, 10, 0)},
        {"budget": (30, 40, 10, 5)},
        {"budget": (30.5, 20, 10, 5)},
    ],
    ids=str,
)
def test_wrong_budget_is_refused_at_once(micro, micro_engine, asked):
    with pytest.raises(TokenBudgetError):
        Stream(micro, micro_engine, **asked)


# --- life -----------------------------------------------------------------------------------------------------------


def test_close_may_be_called_twice_and_a_stream_opened_again_has_no_prior(micro, micro_engine, drifting_frames):
    frames = drifting_frames(4)
    stream = Stream(micro, micro_engine)
    stream.close()
    run(stream, frames[:2])  # opens itself
    stream.close()
    stream.close()
    got = run(stream, frames[2:], start=2)
    assert [result.reset_reason for result in got] == ["first frame", None]
    with Stream(micro, micro_engine) as fresh:
        assert_all_same(got, run(fresh, frames[2:]))
    stream.close()


def test_open_twice_keeps_the_prior(stream, drifting_frames):
    frames = drifting_frames(2)
    run(stream, frames[:1])
    stream.open()
    assert run(stream, frames[1:], start=1)[0].reset_reason is None


def test_without_a_time_the_clock_is_the_machines_own(stream, drifting_frames):
    times = [stream.step(frame).timestamp_s for frame in drifting_frames(3)]
    assert times == sorted(times)


def test_prepared_in_place_or_ahead_gives_the_same(micro, micro_engine, drifting_frames):
    """What :meth:`Stream.step` does, and what a reader's thread does while another frame runs."""
    pictures = drifting_frames(4, size=(48, 80))
    with Stream(micro, micro_engine) as one, Stream(micro, micro_engine) as other:
        ahead = [other.prepare(Frame(picture, index, index / 30)) for index, picture in enumerate(pictures)]
        for index, picture in enumerate(pictures):
            first = one.infer(one.prepare(Frame(picture, index, index / 30), in_place=True)).result()
            second = other.infer(ahead[index]).result()
            assert_same(first, second)
            assert first.reset_reason == second.reset_reason
