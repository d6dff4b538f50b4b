"""Results to the sinks, in a thread of their own, so that the model never waits for an encoder."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from types import TracebackType

from runtime.errors import DeployError
from runtime.stream import Answer
from runtime.video.frame import Frame
from runtime.video.sink_types import Sink

logger = logging.getLogger(__name__)


class SinkWriter:
    """Delivers answers to sinks, and closes the sinks: normally after an end or an interrupt, else as failed.

    Nothing here waits for the thread but :meth:`join`. Whoever puts asks :attr:`room` before, so that memory stays
    bounded.

    Args:
        sinks: Open; each gets each result. The writer closes them. Without one, no mask is brought to the frame's size.
        on_answer: Called after the sinks with each answer; what it raises counts as a failed sink.
        changed: Notified when there is room again, when a sink failed, and when all is done.
        capacity: Answers that wait at most.

    Attributes:
        error: What ended the writing too early; the sinks are closed then, or about to be.
    """

    def __init__(
        self,
        sinks: Sequence[Sink],
        on_answer: Callable[[Answer], None],
        changed: threading.Condition,
        *,
        capacity: int = 4,
    ) -> None:
        self._sinks, self._on_answer, self._changed, self._capacity = sinks, on_answer, changed, capacity
        self._queue: queue.SimpleQueue[tuple[Frame, Answer] | BaseException | None] = queue.SimpleQueue()
        self._is_ended = False
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="sink-writer", daemon=True)
        self._thread.start()

    @property
    def room(self) -> int:
        """How many more answers may be put now."""
        return self._capacity - self._queue.qsize()

    def put(self, frame: Frame, answer: Answer) -> None:
        """Hand over one answer."""
        self._queue.put((frame, answer))

    def end(self, error: BaseException | None = None) -> None:
        """Close the sinks after what was put, as failed if the run ended with ``error``; may be called twice."""
        if not self._is_ended:
            self._is_ended = True
            self._queue.put(error)

    def join(self) -> None:
        """Wait until the sinks are closed; :meth:`end` was called before."""
        self._thread.join()

    def _work(self) -> None:
        try:
            with contextlib.ExitStack() as stack:
                for sink in self._sinks:
                    stack.push(_closing(sink))
                self._deliver()
        except BaseException as error:  # the caller's thread raises it
            if not isinstance(error, (DeployError, KeyboardInterrupt)):
                logger.debug("a result could not be delivered", exc_info=True)
            self.error = error
        self._notify()

    def _deliver(self) -> None:
        while (item := self._queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            frame, answer = item
            self._notify()
            if self._sinks:
                result = answer.result()
                for sink in self._sinks:
                    sink.write(frame, result)
            self._on_answer(answer)

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()


def _closing(sink: Sink) -> Callable[..., None]:
    """An exit callback that tells the sink whether the run failed."""

    def close(kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        sink.close(failed=kind is not None and issubclass(kind, Exception))

    return close
