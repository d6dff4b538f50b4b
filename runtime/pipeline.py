"""Source -> stream -> sinks, each in a thread of its own, so that the model never waits for a decoder or an encoder."""

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
from runtime.results import FrameResult
from runtime.stream import Stream
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
        frames: Frames that went through the model.
        failed_steps: Frames on which the backend failed.
        wall_s: From the first frame taken to the last result written.
        step_ms: Sum of the time spent in the backend.
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

    Args:
        source: Open; closed by this function.
        stream: Where the frames go.
        sinks: Open; closed by this function.
        on_result: Called with each result, in the caller's thread.
        stop: Set it, from a signal handler for example, to end the run after the frame at hand.

    Raises:
        DeployError: A sink failed, or the backend failed on many frames in a row.
    """
    summary = RunSummary()
    started = time.perf_counter()
    with contextlib.ExitStack() as stack:
        for sink in sinks:
            stack.push(_closing(sink))
        writer = stack.enter_context(SinkWriter(sinks))
        reader = stack.enter_context(FrameReader(source, stop=stop))
        with stream:
            try:
                _pump(reader, stream, writer, summary, on_result)
                summary.interrupted = stop is not None and stop.is_set()
            except KeyboardInterrupt:
                summary.interrupted = True
            except SourceLostError as error:
                summary.lost = error
        writer.finish()
    summary.wall_s = time.perf_counter() - started
    summary.resets, summary.source = stream.reset_counts, source.counters
    return summary


def _pump(
    reader: FrameReader,
    stream: Stream,
    writer: SinkWriter,
    summary: RunSummary,
    on_result: Callable[[FrameResult], None] | None,
) -> None:
    failures, last_track = 0, 0
    for frame in reader:
        try:
            result = stream.step(frame)
        except StepError as error:
            failures, summary.failed_steps = failures + 1, summary.failed_steps + 1
            logger.warning("frame %d: %s", frame.index, error)
            if failures == FAILURES_IN_A_ROW:
                raise
            continue
        failures = 0
        writer.put(frame, result)
        summary.frames += 1
        summary.step_ms += result.step_ms
        last_track = max([last_track, *result.instances.track_ids.tolist()])
        summary.tracks = last_track
        if on_result is not None:
            on_result(result)


def _closing(sink: Sink) -> Callable[..., None]:
    """An exit callback that tells the sink whether the run failed."""

    def close(kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        sink.close(failed=kind is not None and issubclass(kind, Exception))

    return close


class SinkWriter:
    """Writes results to all sinks in a thread; a full queue makes the caller wait, so that memory stays bounded."""

    def __init__(self, sinks: Sequence[Sink], *, queue_size: int = 4) -> None:
        self._sinks = sinks
        self._queue: queue.Queue[tuple[Frame, FrameResult] | None] = queue.Queue(queue_size)
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._write, name="sink-writer", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def put(self, frame: Frame, result: FrameResult) -> None:
        """Hand over one result.

        Raises:
            DeployError: A sink has failed; the run has to end.
        """
        self._raise_error()
        if self._sinks:
            self._queue.put((frame, result))

    def finish(self) -> None:
        """Wait until everything is written.

        Raises:
            DeployError: A sink has failed.
        """
        self._stop()
        self._raise_error()

    def _stop(self) -> None:
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _write(self) -> None:
        while (item := self._queue.get()) is not None:
            if self._error is not None:
                continue  # keep taking, so that nobody waits for room in the queue
            try:
                for sink in self._sinks:
                    sink.write(*item)
            except DeployError as error:
                self._error = error
            except Exception as error:
                logger.exception("a sink failed")
                self._error = error
