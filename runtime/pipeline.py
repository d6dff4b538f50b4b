"""Source -> stream -> sinks, each in a thread of its own, so that the model never waits for a decoder or an encoder.

The reader's thread also letterboxes the frames of a recording, and the writer's brings masks to the source's size, so
that the caller's thread does little but run the model.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING

from runtime.errors import DeployError, SourceLostError, StepError
from runtime.memory import return_large_arrays
from runtime.results import FrameResult
from runtime.stream import Answer, PreparedFrame, Stream
from runtime.video.frame import Frame
from runtime.video.reader import FrameReader
from runtime.video.sinks import Sink
from runtime.video.sources import Source, SourceCounters

if TYPE_CHECKING:
    from typing_extensions import Self

logger = logging.getLogger(__name__)

FAILURES_IN_A_ROW = 10  # steps; then the run ends with the last error


@dataclass
class RunSummary:
    """What a run did.

    Attributes:
        frames: Frames that went through the model and whose results were delivered.
        failed_steps: Frames on which the backend failed.
        wall_s: From the first frame taken to the last result written.
        step_ms: Sum of the time spent in the backend on those frames.
        resets: Frames without a prior, by reason.
        tracks: Different objects seen.
        source: What the source counted.
        interrupted: The user or the system ended the run.
        lost: The source broke off; what was delivered before is written.
    """

    frames: int = 0
    failed_steps: int = 0
    wall_s: float = 0.0
    step_ms: float = 0.0
    resets: Counter[str] = field(default_factory=Counter)
    tracks: int = 0
    source: SourceCounters | None = None
    interrupted: bool = False
    lost: SourceLostError | None = None

    @property
    def frames_per_second(self) -> float:
        """Frames over the wall time."""
        return self.frames / self.wall_s if self.wall_s else 0.0


def run_stream(
    source: Source,
    stream: Stream,
    sinks: Sequence[Sink],
    on_result: Callable[[FrameResult], None] | None = None,
    stop: threading.Event | None = None,
) -> RunSummary:
    """Run a source to its end, or until it is interrupted.

    Whatever ends the run, the sinks are closed: normally after an end, an interrupt or a lost source, so that what
    was written is complete and readable; as failed after any other error, so that nothing half-written stays.
    The C library's allocator is told to give large arrays back, for the whole process (:mod:`runtime.memory`).

    Args:
        source: Open; closed by this function.
        stream: Where the frames go.
        sinks: Open; closed by this function.
        on_result: Called with each result, in order, in the thread that writes the sinks; what it raises ends the run.
        stop: Set it, from a signal handler for example, to end the run after the frame at hand.

    Raises:
        DeployError: A sink failed, or the backend failed on many frames in a row.
    """
    summary = RunSummary()
    return_large_arrays()
    started = time.perf_counter()
    with contextlib.ExitStack() as stack:
        for sink in sinks:
            stack.push(_closing(sink))
        writer = stack.enter_context(SinkWriter(sinks, summary, on_result))
        # of a live source only the newest frame is run: it is prepared when its turn comes
        prepare = None if source.live else stream.prepare
        reader = stack.enter_context(FrameReader(source, prepare=prepare, stop=stop))
        with stream:
            try:
                _pump(reader, stream, writer, summary)
                summary.interrupted = stop is not None and stop.is_set()
                writer.finish()
            except KeyboardInterrupt:
                summary.interrupted = True
            except SourceLostError as error:
                summary.lost = error
        writer.finish()
    summary.wall_s = time.perf_counter() - started
    summary.resets, summary.source = stream.reset_counts, source.counters
    return summary


def _pump(reader: FrameReader[PreparedFrame], stream: Stream, writer: SinkWriter, summary: RunSummary) -> None:
    failures = 0
    for item in reader:
        prepared = item if isinstance(item, PreparedFrame) else stream.prepare(item)
        try:
            answer = stream.infer(prepared)
        except StepError as error:
            failures, summary.failed_steps = failures + 1, summary.failed_steps + 1
            logger.warning("frame %d: %s", prepared.frame.index, error)
            if failures == FAILURES_IN_A_ROW:
                raise
            continue
        failures = 0
        writer.put(prepared.frame, answer)


def _closing(sink: Sink) -> Callable[..., None]:
    """An exit callback that tells the sink whether the run failed."""

    def close(kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        sink.close(failed=kind is not None and issubclass(kind, Exception))

    return close


class SinkWriter:
    """Delivers results in a thread; a full queue makes the caller wait, so that memory stays bounded.

    Args:
        sinks: Each gets each result.
        summary: Counts what was delivered.
        on_result: Called after the sinks.
        queue_size: Answers that wait at most.
    """

    def __init__(
        self,
        sinks: Sequence[Sink],
        summary: RunSummary,
        on_result: Callable[[FrameResult], None] | None = None,
        *,
        queue_size: int = 4,
    ) -> None:
        self._sinks, self._summary, self._on_result = sinks, summary, on_result
        self._queue: queue.Queue[tuple[Frame, Answer] | None] = queue.Queue(queue_size)
        self._error: BaseException | None = None
        self._raised = False
        self._thread = threading.Thread(target=self._write, name="sink-writer", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def put(self, frame: Frame, answer: Answer) -> None:
        """Hand over one answer.

        Raises:
            DeployError: A sink has failed; the run has to end. So with whatever ``on_result`` raised.
        """
        self._raise_error()
        self._queue.put((frame, answer))

    def finish(self) -> None:
        """Wait until everything is delivered.

        Raises:
            DeployError: As :meth:`put`; an error is raised once.
        """
        self._stop()
        self._raise_error()

    def _stop(self) -> None:
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()

    def _raise_error(self) -> None:
        if (error := self._error) is not None and not self._raised:
            self._raised = True
            raise error

    def _write(self) -> None:
        while (item := self._queue.get()) is not None:
            if self._error is not None:
                continue  # keep taking, so that nobody waits for room in the queue
            try:
                self._deliver(*item)
            except BaseException as error:  # the caller's thread raises it
                if not isinstance(error, (DeployError, KeyboardInterrupt)):
                    logger.exception("a result could not be delivered")
                self._error = error

    def _deliver(self, frame: Frame, answer: Answer) -> None:
        result, summary = answer.result(), self._summary
        for sink in self._sinks:
            sink.write(frame, result)
        summary.frames += 1
        summary.step_ms += result.step_ms
        summary.tracks = max([summary.tracks, *result.instances.track_ids.tolist()])  # ids count up
        if self._on_result is not None:
            self._on_result(result)
