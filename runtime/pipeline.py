"""Sources -> streams -> sinks, each in a thread of its own, so that the model never waits for a decoder or an encoder.

The reader's thread also letterboxes the frames of a recording if the model leaves it a core; if not, another thread
does so between two steps, when the cores are free. The writer's brings masks to the source's size where a sink wants
them. So the caller's thread does little but run the model. It goes in rounds: each camera that has a frame ready, and
room for its answer, takes part; nobody waits for the others.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING

from runtime.budget_controller import TargetCount
from runtime.errors import SourceLostError, StepError
from runtime.memory import reuse_freed_pictures
from runtime.sink_writer import SinkWriter
from runtime.stream import Answer, PreparedFrame, Stream
from runtime.stream_group import StreamGroup
from runtime.video.reader import FrameReader
from runtime.video.sink_types import Sink
from runtime.video.source_types import Source, SourceCounters

if TYPE_CHECKING:
    from typing_extensions import Self

logger = logging.getLogger(__name__)

FAILURES_IN_A_ROW = 10  # steps; then the camera ends with the last error
_STOP_CHECK_S = 0.2  # a signal handler may set the event, but not wake anybody


@dataclass
class RunSummary:
    """What a run did with one camera.

    Attributes:
        frames: Frames that went through the model and whose results were delivered.
        failed_steps: Frames on which the backend failed.
        wall_s: From the start to the last result written.
        step_ms: Sum of the time spent in the backend on those frames.
        resets: Frames without a prior, by reason.
        tracks: Different objects seen.
        source: What the source counted.
        target: How the latency target was held, by all cameras together; None without one.
        interrupted: The user or the system ended the run.
        lost: The source broke off; what was delivered before is written.
        failed: What else ended the camera; its files are removed.
    """

    frames: int = 0
    failed_steps: int = 0
    wall_s: float = 0.0
    step_ms: float = 0.0
    resets: Counter[str] = field(default_factory=Counter)
    tracks: int = 0
    source: SourceCounters | None = None
    target: TargetCount | None = None
    interrupted: bool = False
    lost: SourceLostError | None = None
    failed: Exception | None = None

    @property
    def frames_per_second(self) -> float:
        """Frames over the wall time."""
        return self.frames / self.wall_s if self.wall_s else 0.0


@dataclass(frozen=True)
class Camera:
    """A source with its stream and its sinks.

    Attributes:
        source: Open; the run closes it.
        sinks: Open; the run closes them.
        on_answer: Called with each answer, in order, in the thread that writes the sinks, after them; what it raises
            ends the camera.
        name: What messages call it; one without a name leaves it to the caller to say how it ended.
    """

    source: Source
    stream: Stream
    sinks: Sequence[Sink] = ()
    on_answer: Callable[[Answer], None] | None = None
    name: str = ""


def run_stream(
    source: Source,
    stream: Stream,
    sinks: Sequence[Sink],
    on_answer: Callable[[Answer], None] | None = None,
    stop: threading.Event | None = None,
) -> RunSummary:
    """Run one source to its end, or until it is interrupted: :func:`run_cameras` with one camera.

    Raises:
        DeployError: A sink failed, or the backend failed on many frames in a row. So with errors of ``on_answer``.
    """
    (summary,) = run_cameras([Camera(source, stream, sinks, on_answer)], stop)
    if summary.failed is not None:
        raise summary.failed
    return summary


def run_cameras(cameras: Sequence[Camera], stop: threading.Event | None = None) -> list[RunSummary]:
    """Run several cameras to their ends, or until they are interrupted; one that ends or fails leaves the others alone.

    Whatever ends a camera, its sinks are closed: normally after an end, an interrupt or a lost source, so that what
    was written is complete and readable; as failed after any other error, so that nothing half-written stays.
    The C library's allocator is told to keep what frames free for the next ones, for the whole process
    (:mod:`runtime.memory`).

    Args:
        cameras: Their streams are on one engine, and share one controller or have none.
        stop: Set it, from a signal handler for example, to end the run after the frames at hand.

    Returns:
        What became of each camera; nothing that ended one of them is raised.
    """
    reuse_freed_pictures()
    changed = threading.Condition()
    with contextlib.ExitStack() as stack:
        between = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="between-steps"))
        lanes = [stack.enter_context(_Lane(camera, changed, between)) for camera in cameras]
        for camera in cameras:
            stack.enter_context(camera.stream)
        try:
            _run_rounds(lanes, StreamGroup([camera.stream for camera in cameras]), changed, stop or threading.Event())
        except KeyboardInterrupt:
            _interrupt(lanes)
        for lane in lanes:
            lane.finish()
    return [lane.summary for lane in lanes]


def _run_rounds(
    lanes: Sequence[_Lane], group: StreamGroup, changed: threading.Condition, stop: threading.Event
) -> None:
    def prepare_next() -> None:
        for lane in lanes:
            lane.prepare_next()

    while any(lane.is_open for lane in lanes):
        with changed:
            changed.wait_for(lambda: any(lane.is_ready for lane in lanes), timeout=_STOP_CHECK_S)
        if stop.is_set():
            _interrupt(lanes)
            return
        ready = {camera: prepared for camera, lane in enumerate(lanes) if (prepared := lane.take()) is not None}
        for camera, answer in group.infer(ready, prepare_next).items() if ready else ():
            lanes[camera].deliver(ready[camera], answer)


def _interrupt(lanes: Sequence[_Lane]) -> None:
    for lane in lanes:
        if lane.is_open:
            lane.summary.interrupted = True
            lane.end()


class _Lane:
    """One camera on its way through a run: its reader, its writer, and what became of it."""

    def __init__(self, camera: Camera, changed: threading.Condition, between: ThreadPoolExecutor) -> None:
        controller = camera.stream.controller
        self.summary = RunSummary(
            resets=camera.stream.reset_counts,
            source=camera.source.counters,
            target=None if controller is None else controller.count,
        )
        self.is_open = True
        self._camera = camera
        self._failures = 0  # steps, in a row
        self._writer = SinkWriter(
            camera.sinks, functools.partial(_count, self.summary, time.perf_counter(), camera.on_answer), changed
        )
        # Of a live source only the newest frame is run: it is prepared when its turn has come, or nearly so. So is
        # every frame where a step takes all cores: beside a step letterboxing holds up one of its threads, and all
        # others wait for that one.
        beside = camera.stream.engine.report.leaves_a_core and not camera.source.live
        prepare = camera.stream.prepare if beside else None
        self._reader: FrameReader[PreparedFrame] = FrameReader(camera.source, prepare=prepare, changed=changed)
        self._between = None if beside else between
        self._next: Future[PreparedFrame] | None = None

    def __enter__(self) -> Self:
        self._reader.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end(error)
        self._reader.close()
        self._writer.join()

    @property
    def is_ready(self) -> bool:
        """Whether :meth:`take` has something to do."""
        has_failed = self._writer.error is not None  # a silent source must not hide it
        has_next = self._next is not None or self._reader.is_ready
        return self.is_open and (has_failed or (has_next and self._writer.room > 0))

    def prepare_next(self) -> None:
        """Begin with the frame after the one whose step has just ended, if it is there and its turn comes next."""
        is_next = self.is_open and self._reader.is_ready and self._writer.room > 1  # one is for the answer at hand
        if self._between is not None and self._next is None and is_next:
            self._next = self._between.submit(self._prepare)

    def take(self) -> PreparedFrame | None:
        """The next frame if there is one, and room for its answer; the camera's end is noticed here.

        Raises:
            KeyboardInterrupt: ``on_answer`` raised it.
        """
        if not self.is_ready:
            return None
        if self._writer.error is not None:
            self._fail(self._writer.error)
            return None
        upcoming, self._next = self._next, None
        try:
            return self._prepare() if upcoming is None else upcoming.result()
        except StopIteration:
            self.end()
        except SourceLostError as error:
            self.summary.lost = error
            self._say(error)
            self.end()
        except Exception as error:
            self._fail(error)
        return None

    def _prepare(self) -> PreparedFrame:
        item = self._reader.take()
        return item if isinstance(item, PreparedFrame) else self._camera.stream.prepare(item, in_place=True)

    def deliver(self, prepared: PreparedFrame, answer: Answer | StepError) -> None:
        """Hand an answer to the sinks; a failed step is counted, and too many in a row end the camera."""
        if isinstance(answer, Answer):
            self._failures = 0
            self._writer.put(prepared.frame, answer)
            return
        self._failures, self.summary.failed_steps = self._failures + 1, self.summary.failed_steps + 1
        logger.warning(
            "%sframe %d: %s", f"{self._camera.name}, " * bool(self._camera.name), prepared.frame.index, answer
        )
        if self._failures == FAILURES_IN_A_ROW:
            self._fail(answer)

    def end(self, error: BaseException | None = None) -> None:
        """Read no more, and let the writer finish; waits for neither."""
        self.is_open = False
        self._reader.stop()
        self._writer.end(error)

    def finish(self) -> None:
        """Wait for the writer, whose error is the camera's."""
        self._writer.join()
        if isinstance(self._writer.error, KeyboardInterrupt):
            self.summary.interrupted = True
        elif isinstance(self._writer.error, Exception):
            self.summary.failed = self._writer.error

    def _fail(self, error: BaseException) -> None:
        self.end(error)
        if not isinstance(error, Exception):
            raise error
        self.summary.failed = error
        self._say(error)

    def _say(self, error: Exception) -> None:
        """The other cameras may go on for long, so the end of one is said when it comes."""
        if self._camera.name:
            logger.error("%s has ended: %s", self._camera.name, error)


def _count(summary: RunSummary, started_s: float, on_answer: Callable[[Answer], None] | None, answer: Answer) -> None:
    summary.frames += 1
    summary.step_ms += answer.header.step_ms
    summary.tracks = max([summary.tracks, *answer.detections.track_ids.tolist()])  # ids count up
    summary.wall_s = time.perf_counter() - started_s
    if on_answer is not None:
        on_answer(answer)
