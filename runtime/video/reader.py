"""Reading in a thread of its own, so that decoding and the model run side by side."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Generic, TypeVar

from .frame import Frame
from .source_types import Source

if TYPE_CHECKING:
    from typing_extensions import Self

logger = logging.getLogger(__name__)

T = TypeVar("T")

_JOIN_TIMEOUT_S = 1.0
_STOP_CHECK_S = 0.2


class FrameReader(Generic[T]):
    """An iterator over a source's frames, or what ``prepare`` makes of them, that a thread reads ahead.

    Of a live source only the newest frame waits: when it is not taken in time, the next one replaces it and is counted
    as ``counters.frames_dropped``. What a dropped frame had to say (:attr:`Frame.discontinuity`) goes over to the frame
    that replaces it. Of other sources up to ``queue_size`` frames wait and none is dropped.

    The thread starts with the context. An error of the source is raised to the consumer, after the frames that were
    read before it.

    Args:
        source: An open source; the reader closes it.
        prepare: Called with each frame in the reading thread; what it returns is handed over instead of the frame.
            Not for live sources, whose frames may be dropped.
        queue_size: Frames that wait at most, each a decoded picture in memory; for sources that are not live.
        stop: Once it is set the iteration ends; a signal handler may set it, which may not take a lock.
        changed: Notified when a frame or the end has come; several readers may share one, for who waits for any.
    """

    def __init__(
        self,
        source: Source,
        *,
        prepare: Callable[[Frame], T] | None = None,
        queue_size: int = 4,
        stop: threading.Event | None = None,
        changed: threading.Condition | None = None,
    ) -> None:
        self.source = source
        self._prepare = prepare
        self._stop = stop or threading.Event()
        self._capacity = max(1, queue_size)
        self._frames: deque[Frame | T] = deque()
        self._changed = changed or threading.Condition()
        self._error: BaseException | None = None
        self._ended = False
        self._closing = False
        self._thread = threading.Thread(target=self._read, name="frame-reader", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[Frame | T]:
        return self

    def __next__(self) -> Frame | T:
        """The next frame; waits for it.

        Raises:
            StopIteration: The source has ended, or the reader was closed.
            DeployError: What the source raised, once.
        """
        with self._changed:
            while not self._changed.wait_for(lambda: self.is_ready, timeout=_STOP_CHECK_S) and not self._stop.is_set():
                pass
            return self.take()

    @property
    def is_ready(self) -> bool:
        """Whether :meth:`take` has an answer."""
        return bool(self._frames) or self._ended or self._closing

    def take(self) -> Frame | T:
        """The next frame, which is there; raises as :meth:`__next__`."""
        with self._changed:
            if self._closing or self._stop.is_set():
                raise StopIteration
            if not self._frames:
                error, self._error = self._error, None
                raise error or StopIteration
            self._changed.notify_all()
            return self._frames.popleft()

    def stop(self) -> None:
        """Read no more and close the source, without waiting for the thread; may be called twice, from any thread."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self.source.close()

    def close(self) -> None:
        """Stop, and wait a moment for the thread.

        A thread that waits for a silent camera cannot be woken: it is left to end by itself, at the latest after the
        source's time limit, and closes the source then.
        """
        self.stop()
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join(_JOIN_TIMEOUT_S)

    def _read(self) -> None:
        try:
            for frame in self.source:
                if not self._put(frame if self._prepare is None else self._prepare(frame)):
                    break
        except BaseException as error:  # the consumer's thread raises it
            self._error = error
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _put(self, frame: Frame | T) -> bool:
        """Hand over one frame, as soon as there is room; False if nobody wants it any more."""
        with self._changed:
            if self.source.live and self._frames:
                stale = self._frames.popleft()
                assert isinstance(frame, Frame) and isinstance(stale, Frame), "frames of a live source are not prepared"
                frame.discontinuity = frame.discontinuity or stale.discontinuity
                self.source.counters.frames_dropped += 1
            self._changed.wait_for(lambda: len(self._frames) < self._capacity or self._closing)
            self._frames.append(frame)
            self._changed.notify_all()
            return not self._closing
