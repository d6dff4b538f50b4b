"""Reading ahead in a thread: what is dropped, what waits, how it ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from video_clips import write_clip

from runtime.errors import SourceLostError
from runtime.video.frame import Frame
from runtime.video.reader import FrameReader
from runtime.video.source_types import BaseSource
from runtime.video.sources import open_source


class ScriptedSource(BaseSource):
    """Runs a script that yields discontinuities, one per frame."""

    def __init__(self, script: Iterator[str | None], *, live: bool) -> None:
        self._script = script
        self.live = live
        self.released = threading.Event()
        super().__init__(30.0, None)

    def _generate(self) -> Iterator[Frame]:
        for discontinuity in self._script:
            yield self._frame(np.zeros((4, 4, 3), np.uint8), None, discontinuity)

    def _release(self) -> None:
        self.released.set()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 2
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.005)


def test_file_loses_nothing_however_slow_the_consumer(tmp_path):
    with FrameReader(open_source(write_clip(tmp_path / "clip.mp4", frames=12)), queue_size=2) as reader:
        indices = []
        for frame in reader:
            time.sleep(0.005)
            indices.append(frame.index)
    assert indices == list(range(12))
    assert reader.source.counters.frames_dropped == 0


def test_frames_are_prepared_in_the_reading_thread_and_in_order():
    threads = set()

    def prepare(frame: Frame) -> int:
        threads.add(threading.current_thread().name)
        return 10 * frame.index

    with FrameReader(ScriptedSource(iter([None] * 7), live=False), prepare=prepare, queue_size=2) as reader:
        assert list(reader) == [0, 10, 20, 30, 40, 50, 60]
    assert threads == {"frame-reader"}


def test_error_of_prepare_reaches_the_consumer():
    def prepare(frame: Frame) -> int:
        return 1 // (1 - frame.index)

    source = ScriptedSource(iter([None] * 7), live=False)
    with FrameReader(source, prepare=prepare) as reader:
        assert next(reader) == 1
        with pytest.raises(ZeroDivisionError):
            next(reader)
    assert source.released.is_set()


def test_file_is_read_ahead_no_further_than_the_queue():
    source = ScriptedSource(iter([None] * 100), live=False)
    with FrameReader(source, queue_size=3) as reader:
        wait_until(lambda: source.counters.frames_read >= 4)
        time.sleep(0.05)
        assert source.counters.frames_read == 4  # three wait, one is in the thread's hand
        assert next(reader).index == 0


def test_live_gives_the_newest_and_counts_what_it_drops():
    """What a dropped frame said goes over to the one that took its place."""
    steps = threading.Semaphore(0)

    def script() -> Iterator[str | None]:
        for discontinuity in (None, None, "reconnect", None, "resolution change", None):
            steps.acquire()
            yield discontinuity

    source = ScriptedSource(script(), live=True)
    with FrameReader(source) as reader:
        seen = []
        for count in (1, 3, 2):  # frames that come before the consumer takes one
            read = source.counters.frames_read + count
            steps.release(count)
            wait_until(lambda read=read: source.counters.frames_read == read and reader._frames[0].index == read - 1)
            seen.append(next(reader))
        assert next(reader, None) is None
    assert [(frame.index, frame.discontinuity) for frame in seen] == [
        (0, None),
        (3, "reconnect"),
        (5, "resolution change"),
    ]
    assert source.counters.frames_read == 6 and source.counters.frames_dropped == 3


@pytest.mark.parametrize("live", [True, False])
def test_error_comes_after_the_frames_before_it(live):
    def script() -> Iterator[str | None]:
        yield None
        raise SourceLostError("cable pulled")

    with FrameReader(ScriptedSource(script(), live=live)) as reader:
        assert next(reader).index == 0
        with pytest.raises(SourceLostError, match="cable pulled"):
            next(reader)
        assert next(reader, None) is None


@pytest.mark.parametrize("live", [True, False])
def test_close_wakes_a_waiting_consumer(live):
    """The source is silent: nobody can wake its thread, which frees the source when it comes back."""
    silence = threading.Event()

    def script() -> Iterator[str | None]:
        silence.wait(5)
        yield None

    source = ScriptedSource(script(), live=live)
    reader = FrameReader(source)
    got = []
    with reader:
        consumer = threading.Thread(target=lambda: got.extend(reader))
        consumer.start()
        time.sleep(0.05)
        threading.Timer(0.1, silence.set).start()
        began_s = time.monotonic()
        reader.close()
        consumer.join(1)
        assert not consumer.is_alive() and time.monotonic() - began_s < 0.5
        assert got == [] and source.released.wait(1)


def test_close_wakes_a_blocked_producer_and_ends_the_iteration():
    source = ScriptedSource(iter([None] * 100), live=False)
    reader = FrameReader(source, queue_size=1)
    with reader:
        wait_until(lambda: source.counters.frames_read == 2)
        began_s = time.monotonic()
        reader.close()
        reader.close()
        assert time.monotonic() - began_s < 0.2
        assert list(reader) == [] and source.released.is_set()


def test_waiting_costs_no_processor_time():
    def script() -> Iterator[str | None]:
        time.sleep(0.4)
        yield None

    with FrameReader(ScriptedSource(script(), live=True)) as reader:
        began_s = time.process_time()
        next(reader)
        assert time.process_time() - began_s < 0.1
