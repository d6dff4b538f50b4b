"""Several cameras on one engine: one that stalls, reconnects, ends, fails or is not there leaves the others alone."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest
from test_pipeline import ListSink, ListSource, files

from runtime.errors import SinkError, SourceError, SourceLostError, SourceNotFoundError
from runtime.pipeline import FAILURES_IN_A_ROW, Camera, run_cameras, run_stream
from runtime.stream import Stream
from runtime.video.live_sources import LiveOptions, LiveSource
from runtime.video.sources import open_source

FRAMES = 6
SOON_S = 20.0  # no test waits that long unless something is wrong


class StalledSource(ListSource):
    """Gives its pictures, and then nothing until ``wake`` is set; then ends."""

    live = True

    def __init__(self, pictures, wake: threading.Event) -> None:
        self._wake = wake
        super().__init__(pictures)

    def _generate(self):
        yield from super()._generate()
        self._wake.wait(SOON_S)


class FlakyConnection:
    """One connection: some pictures, then it is lost."""

    frame_rate = 30.0

    def __init__(self, pictures) -> None:
        self._pictures = pictures
        self.is_closed = False

    def pictures(self, on_error):
        for index, picture in enumerate(self._pictures):
            time.sleep(0.02)  # slower than the model: nothing is stale
            yield picture, index / 30

    def missing(self):
        return "the cable is out"

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def pictures(drifting_frames):
    return drifting_frames(FRAMES, size=(48, 80))


@pytest.fixture
def make_camera(micro, micro_engine, pictures):
    """``make_camera(source, *sinks)``: with a sink that notes the frames, as ``camera.sinks[0]``."""

    def make(source=None, *sinks, **options) -> Camera:
        source = source if source is not None else ListSource(pictures)
        return Camera(source, Stream(micro, micro_engine), [ListSink(), *sinks], **options)

    return make


def seen(camera: Camera) -> list[int]:
    return camera.sinks[0].indices


def test_each_camera_gives_what_it_gives_alone(tmp_path, micro, micro_engine, drifting_frames):
    clips = [drifting_frames(FRAMES + camera, size=(48, 80), seed=camera) for camera in range(3)]
    outputs = []
    for name in ("alone", "together"):
        folders = [tmp_path / f"{name}-{number}" for number in range(3)]
        cameras = []
        for clip, folder in zip(clips, folders, strict=True):
            folder.mkdir()
            sinks = files(folder, micro.manifest.classes)
            cameras.append(Camera(ListSource(clip), Stream(micro, micro_engine), sinks))
        summaries = [run_cameras([camera])[0] for camera in cameras] if name == "alone" else run_cameras(cameras)
        assert [summary.frames for summary in summaries] == [FRAMES, FRAMES + 1, FRAMES + 2]
        assert [summary.resets for summary in summaries] == [{"first frame": 1}] * 3
        outputs.append([(folder / "out.json").read_bytes() for folder in folders])
        assert all(sorted(path.name for path in folder.iterdir()) == ["out.json", "out.jsonl", "out.mp4"]
                   for folder in folders)  # fmt: skip
    assert outputs[0] == outputs[1]


def test_stalled_camera_holds_nobody(make_camera, pictures):
    wake = threading.Event()
    stalled, other = make_camera(StalledSource(pictures[:1], wake)), make_camera(ListSource(pictures * 5))
    done = threading.Event()
    last = 5 * FRAMES - 1
    other = Camera(
        other.source,
        other.stream,
        other.sinks,
        lambda answer: done.set() if answer.header.frame_index == last else None,
    )
    summaries = []
    thread = threading.Thread(target=lambda: summaries.extend(run_cameras([stalled, other])))
    thread.start()
    assert done.wait(SOON_S), "the other camera waits for the stalled one"
    assert thread.is_alive(), "the run is over although a camera is still there"
    wake.set()
    thread.join(SOON_S)
    assert [summary.frames for summary in summaries] == [1, 5 * FRAMES]
    assert seen(stalled) == [0] and seen(other) == list(range(5 * FRAMES))


def test_stalled_camera_does_not_hold_the_end(make_camera, pictures):
    """An interrupt ends the run although one camera's thread is inside a silent source."""
    stop, wake = threading.Event(), threading.Event()
    stalled = make_camera(StalledSource(pictures[:1], wake))
    threading.Timer(0.5, stop.set).start()
    started = time.monotonic()
    (summary,) = run_cameras([stalled], stop)
    assert time.monotonic() - started < SOON_S / 2
    assert summary.interrupted and stalled.sinks[0].closed_as == [False]
    wake.set()


def test_camera_that_reconnects_starts_without_a_prior_alone(make_camera, pictures):
    waiting = [FlakyConnection(pictures[:3]), FlakyConnection(pictures[3:])]
    options = LiveOptions(max_retries=2, first_delay_s=0.01)

    def connect():
        if not waiting:
            raise SourceNotFoundError("the camera is gone")
        return waiting.pop(0)

    flaky, other = make_camera(LiveSource(connect, "cam", options)), make_camera()
    summaries = run_cameras([flaky, other])
    assert summaries[0].resets["reconnect"] == 1 and summaries[0].source.reconnects == 1
    assert isinstance(summaries[0].lost, SourceLostError)
    assert summaries[1].resets == {"first frame": 1} and summaries[1].lost is None
    assert summaries[1].frames == FRAMES == len(seen(other))


def test_camera_that_ends_early_finishes_its_files_at_once(tmp_path, micro, micro_engine, make_camera, pictures):
    """Its files are whole while the other camera still runs."""
    short = Camera(ListSource(pictures[:2]), Stream(micro, micro_engine), files(tmp_path, micro.manifest.classes))
    wake = threading.Event()
    endless = make_camera(StalledSource(pictures[:1], wake))
    thread = threading.Thread(target=run_cameras, args=([short, endless],))
    thread.start()
    deadline_s = time.monotonic() + SOON_S
    while sorted(path.name for path in tmp_path.iterdir()) != ["out.json", "out.jsonl", "out.mp4"]:
        assert time.monotonic() < deadline_s, "the files wait for the other camera"
        time.sleep(0.02)
    assert thread.is_alive()
    wake.set()
    thread.join(SOON_S)
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("error", [SourceLostError("broke off"), SourceError("no right")], ids=["lost", "failed"])
def test_error_of_one_source_is_said_at_once_and_ends_it_alone(make_camera, pictures, error, caplog):
    bad, good = make_camera(ListSource(pictures[:2], error), name="camera 0"), make_camera(name="camera 1")
    summaries = run_cameras([bad, good])
    is_lost = isinstance(error, SourceLostError)
    assert (summaries[0].lost, summaries[0].failed) == ((error, None) if is_lost else (None, error))
    assert bad.sinks[0].closed_as == [not is_lost]
    assert summaries[1].frames == FRAMES and good.sinks[0].closed_as == [False]
    assert [record.getMessage() for record in caplog.records] == [f"camera 0 has ended: {error}"]


@pytest.mark.parametrize("error", [SinkError("the disk is full"), ValueError("a bug")], ids=["SinkError", "ValueError"])
def test_failed_sink_ends_its_camera_alone(make_camera, pictures, error):
    bad = make_camera(ListSource(pictures * 20), ListSink(bad=3, error=error))
    good = make_camera(ListSource(pictures * 3))
    summaries = run_cameras([bad, good])
    assert summaries[0].failed is error and bad.sinks[0].closed_as == bad.sinks[1].closed_as == [True]
    assert summaries[0].source.frames_read < 20 * FRAMES
    assert summaries[1].failed is None and seen(good) == list(range(3 * FRAMES))


def test_failed_sink_of_a_silent_camera_is_noticed(make_camera, pictures):
    wake, error = threading.Event(), SinkError("the disk is full")
    silent = make_camera(StalledSource(pictures[:1], wake), ListSink(bad=0, error=error))
    started = time.monotonic()
    (summary,) = run_cameras([silent])
    assert summary.failed is error and time.monotonic() - started < SOON_S / 2
    wake.set()


def test_steps_that_keep_failing_end_their_camera_alone(micro, micro_engine, faulty_engine, pictures, make_camera):
    bad = Camera(ListSource(pictures * 5), Stream(micro, faulty_engine(["fail"] * FAILURES_IN_A_ROW)), [ListSink()])
    good = make_camera()
    summaries = run_cameras([bad, good])
    assert summaries[0].failed_steps == FAILURES_IN_A_ROW and str(summaries[0].failed) == "the device is gone"
    assert summaries[1].frames == FRAMES


def test_slow_sink_holds_its_own_camera_alone(make_camera, pictures):
    slow = make_camera(ListSource(pictures), ListSink(pause_s=0.3))
    finished: list[str] = []
    slow = Camera(slow.source, slow.stream, slow.sinks, lambda answer: finished.append("slow"))
    fast = make_camera(ListSource(pictures * 2))
    fast = Camera(fast.source, fast.stream, fast.sinks, lambda answer: finished.append("fast"))
    run_cameras([slow, fast])
    assert finished.count("slow") == FRAMES and finished.count("fast") == 2 * FRAMES
    assert finished[-1] == "slow" and finished[: 2 * FRAMES].count("fast") >= 2 * FRAMES - 3


def test_interrupt_ends_all_cameras_with_complete_files(tmp_path, micro, micro_engine, drifting_frames):
    def interrupt(answer) -> None:
        if answer.header.frame_index == 4:
            raise KeyboardInterrupt

    folders, cameras = [tmp_path / "0", tmp_path / "1"], []
    for folder in folders:
        folder.mkdir()
        source = ListSource(drifting_frames(200, size=(48, 80)))
        sinks = files(folder, micro.manifest.classes)
        cameras.append(Camera(source, Stream(micro, micro_engine), sinks, interrupt if folder.name == "0" else None))
    summaries = run_cameras(cameras)
    assert [summary.interrupted for summary in summaries] == [True, True]
    for folder, summary in zip(folders, summaries, strict=True):
        lines = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
        assert [line["frame_index"] for line in lines] == list(range(summary.frames))
        assert (5 if folder.name == "0" else 1) <= summary.frames < 200
        assert sorted(path.name for path in folder.iterdir()) == ["out.json", "out.jsonl", "out.mp4"]


# --- a camera that is not there yet ---------------------------------------------------------------------------------


def test_patient_source_connects_when_the_camera_comes(make_camera, pictures):
    attempts: list[float] = []

    def connect():
        attempts.append(time.monotonic())
        if len(attempts) < 3:
            raise SourceNotFoundError("cam: nothing answers there")
        if len(attempts) > 3:
            raise SourceNotFoundError("cam: gone")
        return FlakyConnection(pictures)

    source = LiveSource(connect, "cam", LiveOptions(max_retries=2, first_delay_s=0.01), patient=True)
    assert attempts == [], "opening waits for nothing"
    late, other = make_camera(source), make_camera()
    summaries = run_cameras([late, other])
    assert summaries[1].frames == FRAMES
    assert summaries[0].frames > 0 and summaries[0].resets["first frame"] == 1
    assert summaries[0].source.reconnects == 0


def test_source_that_never_comes_ends_its_camera_after_its_attempts(make_camera):
    def connect():
        raise SourceNotFoundError("cam: nothing answers there")

    source = LiveSource(connect, "cam", LiveOptions(max_retries=2, first_delay_s=0.01), patient=True)
    absent, other = make_camera(source), make_camera()
    summaries = run_cameras([absent, other])
    assert isinstance(summaries[0].lost, SourceLostError) and "nothing answers there" in str(summaries[0].lost)
    assert summaries[0].frames == 0 and summaries[1].frames == FRAMES


def test_only_live_streams_are_waited_for(tmp_path: Path):
    with open_source("rtsp://127.0.0.1:9/none", patient=True) as source:
        assert source.live
    with pytest.raises(SourceNotFoundError):
        open_source(tmp_path / "none.mp4", patient=True)
    with pytest.raises(SourceNotFoundError):
        open_source("rtsp://127.0.0.1:9/none")


def test_run_stream_raises_what_ended_its_only_camera(micro, micro_engine, pictures):
    with pytest.raises(SourceError, match="no right"):
        run_stream(ListSource(pictures, SourceError("no right")), Stream(micro, micro_engine), [])
