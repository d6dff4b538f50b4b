"""Several streams on one engine: stepped together or apart, the answers are those of each stream on its own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtime.backend import Engine
from runtime.budget_controller import BudgetController, controller_for
from runtime.errors import StepError
from runtime.results import FrameResult
from runtime.stream import Answer, Stream
from runtime.stream_group import StreamGroup

CAMERAS, FRAMES = 3, 7
PATCHES = 60


class BatchedEngine:
    """The micro engine as a device that gains from batches; notes each step: its rows and its budget."""

    def __init__(self, engine: Engine, largest: int, faults: list[str | None] | None = None) -> None:
        self.report, self.graph = replace(engine.report, largest_batch=largest), engine.graph
        self.steps: list[tuple[int, tuple[int, ...]]] = []
        self.copies = 0  # of state, from or to buffers
        self.faults = list(faults or [])
        self._engine = engine

    def open_stream(self, batch: int = 1, usual_budget=None) -> NotedBuffers:
        return NotedBuffers(self, self._engine.open_stream(batch, usual_budget))

    def close(self) -> None:
        pass


class NotedBuffers:
    def __init__(self, engine: BatchedEngine, buffers) -> None:
        self._engine, self._buffers = engine, buffers
        self.image = buffers.image

    def __getattr__(self, name: str):
        return getattr(self._buffers, name)

    def run(self, token_budget):
        self._engine.steps.append((len(self.image), token_budget))
        if self._engine.faults and self._engine.faults.pop(0) == "fail":
            raise StepError("the device is gone")
        return self._buffers.run(token_budget)

    def state(self):
        self._engine.copies += 1
        return self._buffers.state()

    def set_state(self, state) -> None:
        self._engine.copies += 1
        self._buffers.set_state(state)


@pytest.fixture(scope="module")
def clips(micro_bundle):
    from export.reference import synthetic_frames

    return [list(synthetic_frames((96, 160), FRAMES, seed)) for seed in range(CAMERAS)]


@pytest.fixture(scope="module")
def alone(micro, micro_engine, clips) -> list[list[FrameResult]]:
    """What each camera gives on its own."""
    results = []
    for clip in clips:
        with Stream(micro, micro_engine) as stream:
            results.append([stream.step(frame, timestamp_s=t / 30) for t, frame in enumerate(clip)])
    return results


class Runner:
    """Cameras that play their clips, each at its own pace."""

    def __init__(self, micro, engine, clips, **options) -> None:
        self.streams = [Stream(micro, engine, **options) for _ in clips]
        self.group = StreamGroup(self.streams)
        self.results: list[list[FrameResult]] = [[] for _ in clips]
        self._clips, self._next = clips, [0] * len(clips)

    def round(self, *cameras: int) -> dict[int, Answer | StepError]:
        ready = {}
        for camera in cameras:
            t = self._next[camera]
            self._next[camera] += 1
            stream = self.streams[camera]
            ready[camera] = stream.prepare(stream._as_frame(self._clips[camera][t], t / 30))
        answers = self.group.infer(ready)
        for camera, answer in answers.items():
            if isinstance(answer, Answer):
                self.results[camera].append(answer.result())
        return answers


def assert_same(got: FrameResult, want: FrameResult, message: str) -> None:
    """A batch may round otherwise than one picture does: what was chosen is equal, the masks but for some pixels."""
    assert got.reset_reason == want.reset_reason, message
    np.testing.assert_array_equal(got.kept_stages, want.kept_stages, err_msg=message)
    np.testing.assert_array_equal(got.instances.track_ids, want.instances.track_ids, err_msg=message)
    np.testing.assert_array_equal(got.instances.labels, want.instances.labels, err_msg=message)
    np.testing.assert_allclose(got.instances.scores, want.instances.scores, rtol=1e-4, atol=1e-5, err_msg=message)
    assert (got.instances.masks != want.instances.masks).mean() < 1e-3, message


def assert_as_alone(runner: Runner, alone) -> None:
    for camera, results in enumerate(runner.results):
        for t, result in enumerate(results):
            assert_same(result, alone[camera][t], f"camera {camera}, frame {t}")


@pytest.mark.parametrize("largest", [1, 2, 3, 8])
def test_cameras_in_step_give_what_each_gives_alone(micro, micro_engine, clips, alone, largest):
    engine = BatchedEngine(micro_engine, largest)
    runner = Runner(micro, engine, clips)
    for _ in range(FRAMES):
        runner.round(0, 1, 2)
    assert_as_alone(runner, alone)
    later = [rows for rows, _ in engine.steps[CAMERAS:]]
    assert later == {1: [1, 1, 1], 2: [2, 1], 3: [3], 8: [3]}[largest] * (FRAMES - 1)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_cameras_at_any_pace_give_what_each_gives_alone(micro, micro_engine, clips, alone, data):
    """Who is ready changes from round to round, so that states move between buffers."""
    runner = Runner(micro, BatchedEngine(micro_engine, data.draw(st.integers(1, 3))), clips)
    left = [FRAMES] * CAMERAS
    while any(left):
        able = [camera for camera in range(CAMERAS) if left[camera]]
        chosen = data.draw(st.lists(st.sampled_from(able), min_size=1, unique=True))
        runner.round(*chosen)
        for camera in chosen:
            left[camera] -= 1
    assert [len(results) for results in runner.results] == [FRAMES] * CAMERAS
    assert_as_alone(runner, alone)


def test_camera_without_a_prior_is_stepped_apart(micro, micro_engine, clips, alone):
    engine = BatchedEngine(micro_engine, 8)
    runner = Runner(micro, engine, clips)
    for _ in range(3):
        runner.round(0, 1, 2)
    runner.streams[1].reset()
    engine.steps.clear()
    runner.round(0, 1, 2)
    runner.round(0, 1, 2)
    usual = runner.streams[0].budget
    assert engine.steps == [(1, (PATCHES, *usual[1:])), (2, usual), (3, usual)]
    for camera in (0, 2):
        for t, result in enumerate(runner.results[camera]):
            assert_same(result, alone[camera][t], f"camera {camera}, frame {t}")
    assert [result.reset_reason for result in runner.results[1]][3:] == ["reset by caller", None]
    with Stream(micro, micro_engine) as fresh:
        want = [fresh.step(clips[1][t], timestamp_s=t / 30) for t in (3, 4)]
    assert not set(runner.results[1][3].instances.track_ids) & set(runner.results[1][2].instances.track_ids)
    for got, one in zip(runner.results[1][3:], want, strict=True):
        np.testing.assert_array_equal(got.kept_stages, one.kept_stages)


def test_state_is_not_copied_while_the_same_cameras_are_ready(micro, micro_engine, clips):
    engine = BatchedEngine(micro_engine, 8)
    runner = Runner(micro, engine, clips)
    runner.round(0, 1, 2)
    runner.round(0, 1, 2)
    engine.copies = 0
    for _ in range(4):
        runner.round(0, 1, 2)
    assert engine.copies == 0


def test_failed_batch_drops_the_priors_of_its_cameras_alone(micro, micro_engine, clips, alone):
    engine = BatchedEngine(micro_engine, 2)
    runner = Runner(micro, engine, clips)
    runner.round(0, 1, 2)
    engine.faults = ["fail"]  # cameras 0 and 1; then camera 2
    answers = runner.round(0, 1, 2)
    assert isinstance(answers[0], StepError) and isinstance(answers[1], StepError)
    assert_same(runner.results[2][1], alone[2][1], "camera 2")
    runner.round(0, 1, 2)
    assert [result.reset_reason for result in runner.results[0]] == ["first frame", "failed step"]
    assert [result.reset_reason for result in runner.results[2]] == ["first frame", None, None]
    assert runner.streams[0].reset_counts["failed step"] == runner.streams[1].reset_counts["failed step"] == 1


def test_bad_state_of_one_row_is_that_cameras_alone(micro, micro_engine, clips, alone):
    runner = Runner(micro, BatchedEngine(micro_engine, 8), clips)
    runner.round(0, 1, 2)
    state = runner.streams[1].buffers.state()
    state["prior.queries"][0, 0, 0] = np.nan
    runner.streams[1].buffers.set_state(state)
    for _ in range(3):
        runner.round(0, 1, 2)
    reasons = [[result.reset_reason for result in results] for results in runner.results]
    assert reasons[1] == ["first frame", None, "non-finite or empty state", None]
    assert reasons[0] == reasons[2] == ["first frame", None, None, None]
    for camera in (0, 2):
        for t, result in enumerate(runner.results[camera]):
            assert_same(result, alone[camera][t], f"camera {camera}, frame {t}")


# --- with a latency target ------------------------------------------------------------------------------------------


class NotingController(BudgetController):
    """Notes what it learns from."""

    def __init__(self, manifest) -> None:
        budgets = [(30, 20, 10, 5), (40, 30, 20, 10)]
        super().__init__(budgets, [1.0, 2.0], target_ms=1e6)
        self.learned: list[float] = []

    def record(self, latency_ms: float) -> None:
        self.learned.append(latency_ms)


def test_a_round_teaches_its_slowest_frame_unless_one_had_no_prior(micro, micro_engine, clips):
    controller = NotingController(micro.manifest)
    runner = Runner(micro, BatchedEngine(micro_engine, 1), clips, controller=controller)
    runner.round(0, 1, 2)
    assert controller.learned == []
    runner.round(0, 1, 2)
    last = [results[-1] for results in runner.results]
    assert controller.learned == [max(result.latency_ms for result in last)]
    since_round_began = [result.latency_ms - result.preprocess_ms for result in last]
    assert since_round_began == sorted(since_round_began), "a frame waits for the ones before it"
    runner.streams[2].reset()
    runner.round(0, 2)
    assert len(controller.learned) == 1
    assert controller.count.frames == 8 and controller.count.missed == 0
    assert controller.count.budgets == {(30, 20, 10, 5): 4}
    assert [result.missed_target for result in runner.results[0]] == [False] * 3


def test_single_stream_teaches_each_frame_with_a_prior(micro, micro_engine, clips):
    controller = NotingController(micro.manifest)
    with Stream(micro, micro_engine, controller=controller) as stream:
        results = [stream.step(frame, timestamp_s=t / 30) for t, frame in enumerate(clips[0][:3])]
        stream.reset()
        results.append(stream.step(clips[0][3], timestamp_s=0.1))
    assert controller.learned == [result.latency_ms for result in results[1:3]]
    assert [result.tokens_kept.tolist() for result in results] == [
        [60, 20, 10, 5], [30, 20, 10, 5], [30, 20, 10, 5], [60, 20, 10, 5],
    ]  # fmt: skip
    assert all(result.latency_ms >= result.step_ms for result in results)


def test_frames_of_one_round_have_the_budget_that_the_controller_says(micro, micro_engine, clips):
    controller = NotingController(micro.manifest)
    engine = BatchedEngine(micro_engine, 8)
    runner = Runner(micro, engine, clips, controller=controller)
    runner.round(0, 1, 2)
    runner.round(0, 1, 2)
    controller._enter(1)
    runner.round(0, 1, 2)
    assert engine.steps[-2:] == [(3, (30, 20, 10, 5)), (3, (40, 30, 20, 10))]


def test_controller_of_an_engine_that_takes_any_budget(micro, micro_engine):
    controller = controller_for(micro.manifest, micro_engine.report, 50.0, 0.5, 0.9)
    rule = micro.manifest.budget_rule
    assert controller.budgets[0] == rule.for_ratio(0.5) and controller.budgets[-1] == rule.for_ratio(0.9)
    assert controller.budget == micro.manifest.presets["0.55"]


def test_controller_of_an_engine_that_was_built_for_some_budgets(micro, micro_engine):
    rule = micro.manifest.budget_rule
    built = rule.for_ratio(1.0), rule.for_ratio(0.55), rule.for_ratio(0.3), rule.for_ratio(0.4)
    report = replace(micro_engine.report, budgets=built)
    assert controller_for(micro.manifest, report, 50.0).budgets == (built[3], built[1], built[0])
    assert controller_for(micro.manifest, report, 50.0, 0.1, 0.5).budgets == (built[2], built[3])


def test_controller_says_when_there_is_no_choice(micro, micro_engine):
    from runtime.errors import TokenBudgetError

    report = replace(micro_engine.report, budgets=(micro.manifest.budget_rule.for_ratio(0.3),))
    with pytest.raises(TokenBudgetError, match="none of the budgets that this engine was built for"):
        controller_for(micro.manifest, report, 50.0)
    graph = micro.manifest.graph.model_copy(update={"selection": "threshold"})
    threshold = micro.manifest.model_copy(update={"graph": graph})
    with pytest.raises(TokenBudgetError, match="--selection budget"):
        controller_for(threshold, micro_engine.report, 50.0)
