"""A whole run: what comes out, in which order, and what is left when it ends early."""

from __future__ import annotations

import gc
import json
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest

from runtime import backend
from runtime.errors import FrameShapeError, SinkError, SourceFormatError, SourceLostError, StepError
from runtime.onnxruntime_backend import OnnxRuntimeBuffers
from runtime.pipeline import FAILURES_IN_A_ROW, run_stream
from runtime.stream import Stream
from runtime.video.letterbox import Letterbox
from runtime.video.sink_types import SinkContext
from runtime.video.sinks import JsonLinesSink, VideoSink, YouTubeVisSink
from runtime.video.source_types import BaseSource
from runtime.video.sources import open_source

FRAMES = 14


class ListSource(BaseSource):
    """Pictures from a list, and then an error if one is given."""

    def __init__(self, pictures, error: Exception | None = None) -> None:
        self._pictures, self._error_at_end = pictures, error
        self.released = False
        super().__init__(30.0, None)

    def _generate(self):
        for picture in self._pictures:
            yield self._frame(picture, None)
        if self._error_at_end is not None:
            raise self._error_at_end

    def _release(self) -> None:
        self.released = True


class ListSink(SinkContext):
    """Keeps what it gets; fails at frame ``bad`` with ``error``."""

    def __init__(self, bad: int | None = None, error: Exception | None = None, pause_s: float = 0.0) -> None:
        self.indices: list[int] = []
        self.closed_as: list[bool] = []
        self._bad, self._error, self._pause_s = bad, error, pause_s

    def write(self, frame, result) -> None:
        if frame.index == self._bad:
            raise self._error
        time.sleep(self._pause_s)
        assert frame.index == result.frame_index and frame.timestamp_s == result.timestamp_s
        self.indices.append(frame.index)

    def close(self, *, failed: bool = False) -> None:
        self.closed_as.append(failed)


def files(folder: Path, classes) -> list:
    """One sink of each kind that makes a file."""
    return [
        VideoSink(folder / "out.mp4", 30.0, classes),
        JsonLinesSink(folder / "out.jsonl", classes),
        YouTubeVisSink(folder / "out.json", 7),
    ]


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]


def assert_complete(folder: Path, count: int) -> None:
    """All three files hold ``count`` frames, and nothing else is there."""
    assert sorted(path.name for path in folder.iterdir()) == ["out.json", "out.jsonl", "out.mp4"]
    with open_source(folder / "out.mp4") as video:
        assert [frame.index for frame in video] == list(range(count))
    assert [line["frame_index"] for line in lines_of(folder)] == list(range(count))
    tracks = json.loads((folder / "out.json").read_text())
    assert tracks and all(len(track["segmentations"]) == count and track["video_id"] == 7 for track in tracks)


@pytest.fixture
def pictures(drifting_frames):
    return drifting_frames(FRAMES, size=(48, 80))


@pytest.fixture
def stream(micro, micro_engine):
    return Stream(micro, micro_engine)


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    deadline_s = time.monotonic() + 2
    while any(thread.name in ("frame-reader", "sink-writer") for thread in threading.enumerate()):
        assert time.monotonic() < deadline_s, "a thread of the pipeline still runs"
        time.sleep(0.01)


def test_frames_out_equal_frames_in(tmp_path, micro, stream, pictures):
    source, seen, memory = ListSource(pictures), [], ListSink()
    summary = run_stream(source, stream, [*files(tmp_path, micro.manifest.classes), memory], seen.append)
    assert_complete(tmp_path, FRAMES)
    assert [answer.header.frame_index for answer in seen] == memory.indices == list(range(FRAMES))
    assert summary.frames == FRAMES and summary.failed_steps == 0
    assert summary.source is source.counters and source.counters.frames_read == FRAMES
    assert source.released and memory.closed_as == [False]
    assert not summary.interrupted and summary.lost is None
    assert summary.resets == {"first frame": 1}
    assert summary.tracks == max(answer.result().instances.track_ids.max() for answer in seen) > 0
    assert 0 < summary.step_ms / 1e3 < summary.wall_s and summary.frames_per_second == FRAMES / summary.wall_s


def test_same_run_twice_gives_the_same_results(tmp_path, micro, micro_engine, pictures):
    runs = []
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        run_stream(ListSource(pictures), Stream(micro, micro_engine), files(folder, micro.manifest.classes))
        lines = [
            {key: value for key, value in line.items() if key not in ("step_ms", "latency_ms")}
            for line in lines_of(folder)
        ]
        runs.append((lines, (folder / "out.json").read_bytes(), (folder / "out.mp4").read_bytes()))
    assert runs[0][0] == runs[1][0] and runs[0][1] == runs[1][1]
    assert runs[0][2] == runs[1][2]


def test_run_without_sinks_and_without_frames(stream):
    source = ListSource([])
    summary = run_stream(source, stream, [])
    assert summary.frames == 0 and summary.frames_per_second == 0.0 and summary.resets == {}
    assert source.released


def test_without_sinks_no_mask_is_brought_to_the_frame(monkeypatch, stream, pictures):
    brought, answers = [], []
    original = Letterbox.masks_to_source
    monkeypatch.setattr(Letterbox, "masks_to_source", lambda self, masks: brought.append(0) or original(self, masks))
    summary = run_stream(ListSource(pictures), stream, [], answers.append)
    assert summary.frames == FRAMES and summary.tracks > 0 and not brought
    assert len(answers[-1].result().instances) > 0 and len(brought) == 1


# --- it ends early --------------------------------------------------------------------------------------------------


def test_interrupt_leaves_complete_files(tmp_path, micro, stream, pictures):
    source, count = ListSource(pictures), 5

    def interrupt(answer) -> None:
        if answer.header.frame_index == count - 1:
            raise KeyboardInterrupt

    summary = run_stream(source, stream, files(tmp_path, micro.manifest.classes), interrupt)
    assert summary.interrupted and summary.frames == count
    assert_complete(tmp_path, count)
    assert source.released


def test_lost_source_keeps_what_was_delivered(tmp_path, micro, stream, pictures):
    error = SourceLostError("the cable is out")
    summary = run_stream(ListSource(pictures, error), stream, files(tmp_path, micro.manifest.classes))
    assert summary.lost is error and not summary.interrupted
    assert summary.frames == FRAMES
    assert_complete(tmp_path, FRAMES)


@pytest.mark.parametrize("error", [SinkError("the disk is full"), ValueError("a bug")], ids=["SinkError", "ValueError"])
@pytest.mark.parametrize("place", [0, 3])
def test_failing_sink_ends_the_run_and_leaves_no_file(tmp_path, micro, stream, pictures, error, place):
    (tmp_path / "out.json").write_text("older results")
    source, sinks = ListSource(pictures * 20), files(tmp_path, micro.manifest.classes)
    sinks.insert(place, ListSink(bad=3, error=error))
    with pytest.raises(type(error), match=str(error)):
        run_stream(source, stream, sinks)
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]
    assert (tmp_path / "out.json").read_text() == "older results"
    assert source.released and source.counters.frames_read < 40  # it did not go on to the end


def test_sink_that_fails_on_the_last_frame_is_noticed(tmp_path, micro, stream, pictures):
    sinks = [*files(tmp_path, micro.manifest.classes), ListSink(bad=FRAMES - 1, error=SinkError("full"), pause_s=0.01)]
    with pytest.raises(SinkError):
        run_stream(ListSource(pictures), stream, sinks)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [SourceFormatError("no video"), ValueError("a bug")], ids=["SourceError", "bug"])
def test_other_errors_of_the_source_leave_no_file(tmp_path, micro, stream, pictures, error):
    source, sink = ListSource(pictures[:3], error), ListSink()
    with pytest.raises(type(error)):
        run_stream(source, stream, [*files(tmp_path, micro.manifest.classes), sink])
    assert list(tmp_path.iterdir()) == [] and sink.closed_as == [True]
    assert source.released


def test_error_of_the_caller_leaves_no_file(tmp_path, micro, stream, pictures):
    def fail(result) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_stream(ListSource(pictures), stream, files(tmp_path, micro.manifest.classes), fail)
    assert list(tmp_path.iterdir()) == []


# --- failed steps ---------------------------------------------------------------------------------------------------


def test_failed_steps_are_left_out_and_counted(micro, faulty_engine, pictures):
    faults = ["fail"] * (FAILURES_IN_A_ROW - 1) + [None, "fail"]
    source, sink = ListSource(pictures), ListSink()
    summary = run_stream(source, Stream(micro, faulty_engine(faults)), [sink])
    assert summary.failed_steps == FAILURES_IN_A_ROW and summary.frames == FRAMES - FAILURES_IN_A_ROW
    assert sink.indices == [9, 11, 12, 13] and sink.closed_as == [False]
    assert summary.resets == {"first frame": 1, "failed step": 10}


def test_ten_failed_steps_in_a_row_end_the_run(tmp_path, micro, faulty_engine, pictures):
    source, sinks = ListSource(pictures), files(tmp_path, micro.manifest.classes)
    with pytest.raises(StepError, match="the device is gone"):
        run_stream(source, Stream(micro, faulty_engine([None, *["fail"] * 10])), sinks)
    assert list(tmp_path.iterdir()) == [] and source.released


# --- memory ---------------------------------------------------------------------------------------------------------


class StuckSink(ListSink):
    """Does not finish its first frame before the source has come to a stop."""

    def __init__(self, source: ListSource) -> None:
        super().__init__()
        self._source = source
        self.read_ahead = 0

    def write(self, frame, result) -> None:
        while not self.indices and self.read_ahead < self._source.counters.frames_read:
            self.read_ahead = self._source.counters.frames_read
            time.sleep(0.4)
        super().write(frame, result)


def test_slow_sink_holds_the_source_back(stream, drifting_frames):
    """Frames in memory: 4 read ahead, 4 waiting for the sink, and one in the hands of each of the three threads."""
    source = ListSource(drifting_frames(40, size=(48, 80)))
    sink = StuckSink(source)
    run_stream(source, stream, [sink])
    assert sink.indices == list(range(40))
    assert sink.read_ahead <= 4 + 4 + 3


def test_nothing_of_a_frame_is_kept_after_it(stream, drifting_frames):
    """The pictures of frames long gone are free again."""
    alive, most = [], 0

    class Picture(np.ndarray):
        pass

    def pictures():
        nonlocal most
        for picture in drifting_frames(40, size=(48, 80)):
            view = picture.view(Picture)
            alive.append(weakref.ref(view))
            most = max(most, sum(reference() is not None for reference in alive))
            yield view

    source = ListSource(pictures())
    run_stream(source, stream, [StuckSink(source)])
    gc.collect()
    assert len(alive) == 40 and most <= 14


def test_nothing_of_a_run_waits_for_the_garbage_collector(micro, micro_engine, pictures, tmp_path):
    """An encoder alone is tens of megabytes: nothing may hold it in a circle."""
    source, stream, sink = (
        ListSource(pictures),
        Stream(micro, micro_engine),
        VideoSink(tmp_path / "out.mp4", 30.0, micro.manifest.classes),
    )
    kept = [weakref.ref(source), weakref.ref(stream), weakref.ref(sink)]
    gc.disable()
    try:
        run_stream(source, stream, [sink])
        del source, stream, sink
        assert [reference() for reference in kept] == [None] * 3
    finally:
        gc.enable()


# --- where and when a frame is letterboxed --------------------------------------------------------------------------


class Watch:
    """Notes in which thread frames are prepared, and whether a step ran meanwhile; steps take a while."""

    def __init__(self, monkeypatch, step_s: float = 0.005) -> None:
        self.threads: set[str] = set()
        self.beside_a_step = 0
        computing, prepare, run = threading.Event(), Stream.prepare, OnnxRuntimeBuffers.run

        def watched_prepare(stream, frame, **options):
            self.threads.add(threading.current_thread().name)
            self.beside_a_step += computing.is_set()
            return prepare(stream, frame, **options)

        def watched_run(buffers, budget):
            computing.set()
            time.sleep(step_s)
            try:
                return run(buffers, budget)
            finally:
                computing.clear()

        monkeypatch.setattr(Stream, "prepare", watched_prepare)
        monkeypatch.setattr(OnnxRuntimeBuffers, "run", watched_run)


@pytest.fixture
def all_cores_taken(micro_engine, monkeypatch) -> None:
    """The engine takes one thread, and that is all there are."""
    assert micro_engine.report.threads == 1
    monkeypatch.setattr(backend, "available_cores", lambda: 1)


def test_letterboxes_beside_a_step_that_leaves_a_core(micro, micro_engine, pictures, monkeypatch):
    monkeypatch.setattr(backend, "available_cores", lambda: 2)
    watch, sink = Watch(monkeypatch), ListSink()
    run_stream(ListSource(pictures), Stream(micro, micro_engine), [sink])
    assert watch.threads == {"frame-reader"} and watch.beside_a_step > 0
    assert sink.indices == list(range(FRAMES))


@pytest.mark.usefixtures("all_cores_taken")
def test_letterboxes_between_steps_that_take_all_cores(micro, micro_engine, pictures, monkeypatch):
    watch, sink = Watch(monkeypatch), ListSink()
    run_stream(ListSource(pictures), Stream(micro, micro_engine), [sink])
    assert watch.threads == {"MainThread", "between-steps_0"}, "the first frame has no step before it"
    assert watch.beside_a_step == 0
    assert sink.indices == list(range(FRAMES))


@pytest.mark.usefixtures("all_cores_taken")
def test_where_a_frame_is_letterboxed_changes_nothing(micro, micro_engine, pictures):
    answers = []
    run_stream(ListSource(pictures), Stream(micro, micro_engine), [], answers.append)
    with Stream(micro, micro_engine) as alone:
        for index, (answer, picture) in enumerate(zip(answers, pictures, strict=True)):
            got, want = answer.result(), alone.step(picture, timestamp_s=index / 30)
            np.testing.assert_array_equal(got.kept_stages, want.kept_stages)
            np.testing.assert_array_equal(got.instances.masks, want.instances.masks)
            assert got.reset_reason == want.reset_reason


@pytest.mark.usefixtures("all_cores_taken")
def test_bad_picture_in_the_middle_ends_the_run_as_failed(micro, micro_engine, pictures):
    sink = ListSink()
    source = ListSource([*pictures[:3], pictures[3].astype(np.float32), *pictures[4:]])
    with pytest.raises(FrameShapeError, match="float32"):
        run_stream(source, Stream(micro, micro_engine), [sink])
    assert sink.closed_as == [True] and source.released


class LiveSource(ListSource):
    """Frames come at their own pace."""

    live = True

    def _generate(self):
        for frame in super()._generate():
            time.sleep(0.01)
            yield frame


class HeldSink(ListSink):
    """Holds its first frame until the source has delivered so many."""

    def __init__(self, source: ListSource, until: int) -> None:
        super().__init__()
        self._source, self._until = source, until

    def write(self, frame, result) -> None:
        while not self.indices and self._source.counters.frames_read < self._until:
            time.sleep(0.01)
        super().write(frame, result)


@pytest.mark.usefixtures("all_cores_taken")
def test_no_frame_of_a_camera_is_prepared_before_there_is_room_for_its_answer(
    micro, micro_engine, drifting_frames, monkeypatch
):
    """It would be old by the time it is run: one answer is in the sink's hands and four wait, and no more."""
    Watch(monkeypatch, step_s=0.03)  # the next frame is always there when a step ends
    source = LiveSource(drifting_frames(60, size=(48, 80)))
    sink = HeldSink(source, until=50)
    run_stream(source, Stream(micro, micro_engine), [sink])
    assert sum(index < 48 for index in sink.indices) <= 5
    assert sink.indices[-1] >= 48
