"""What every source has: its protocol, its counters, one clock, and a life that may end from another thread."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from .frame import Frame, Picture

if TYPE_CHECKING:
    from typing_extensions import Self

_USUAL_FRAME_RATE = 25.0


@dataclass
class SourceCounters:
    """What happened on the way to the consumer; counts since the source was opened.

    Attributes:
        frames_read: Frames that the source delivered.
        frames_dropped: Frames of a live source that were stale before anybody took them.
        reconnects: Connections made again after one was lost.
        decode_errors: Packets that did not decode; the video goes on after them.
    """

    frames_read: int = 0
    frames_dropped: int = 0
    reconnects: int = 0
    decode_errors: int = 0


class Source(Protocol):
    """Where frames come from: an iterator that is opened when it is made and closed once.

    Attributes:
        live: Whether the source goes on without us, so that stale frames are better dropped.
        frame_rate: Frames per second as the source announces them, None if it does not.
        frame_count: Frames as the source announces them, None if it does not; for progress bars, not a promise.
        counters: Updated while frames are read.
    """

    live: bool
    frame_rate: float | None
    frame_count: int | None
    counters: SourceCounters

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def __iter__(self) -> Iterator[Frame]: ...

    def __next__(self) -> Frame:
        """The next frame.

        Raises:
            SourceLostError: The source broke off; the frames before are good.
            StopIteration: The source has ended, or was closed.
        """
        ...

    def close(self) -> None:
        """Free the device, file or connection; may be called twice, and from another thread than the reading one."""
        ...


class BaseSource:
    """A source made from one generator of frames.

    :meth:`close` never waits: when another thread is inside the decoder, that thread frees what there is to free as
    soon as it comes back.
    """

    live = False

    def __init__(self, frame_rate: float | None, frame_count: int | None) -> None:
        self.frame_rate = frame_rate
        self.frame_count = frame_count
        self.counters = SourceCounters()
        self._closing = threading.Event()
        self._inside = threading.Lock()
        self._timeline = Timeline(frame_rate)
        self._last_size: tuple[int, int] | None = None
        self._frames = self._generate()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[Frame]:
        return self

    def __next__(self) -> Frame:
        try:
            with self._inside:
                return self._advance()
        finally:
            if self._closing.is_set():
                self.close()

    def close(self) -> None:
        """Free the device, file or connection; may be called twice, and from another thread than the reading one."""
        self._closing.set()
        if self._inside.acquire(blocking=False):
            try:
                self._frames.close()
                self._release()
            finally:
                self._inside.release()

    def _advance(self) -> Frame:
        if self._closing.is_set():
            raise StopIteration
        frame = next(self._frames)
        if self._closing.is_set():
            raise StopIteration
        return frame

    def _generate(self) -> Generator[Frame, None, None]:
        raise NotImplementedError

    def _release(self) -> None:
        raise NotImplementedError

    def _frame(self, picture: Picture, time_s: float | None, discontinuity: str | None = None) -> Frame:
        """Number, stamp and count one picture; a new size is a discontinuity."""
        frame = Frame(picture, self.counters.frames_read, self._timeline.stamp(time_s), discontinuity)
        size = frame.height, frame.width
        if frame.discontinuity is None and self._last_size not in (None, size):
            frame.discontinuity = "resolution change"
        self._last_size = size
        self.counters.frames_read += 1
        return frame

    def _count_decode_error(self) -> None:
        self.counters.decode_errors += 1


class Timeline:
    """A source's time stamps, repaired so that they strictly ascend.

    A stamp that is missing or not later than the one before is replaced by one frame period after it. When the next
    stamp is too early again, the clock was set back (joined files, a camera that started anew) and is shifted for good.

    >>> timeline = Timeline(frame_rate=10)
    >>> [round(timeline.stamp(t), 3) for t in (5.0, 5.1, None, 5.3, 5.2, 5.5, 0.0, 0.1, 0.3)]
    [5.0, 5.1, 5.2, 5.3, 5.4, 5.5, 5.6, 5.7, 5.9]
    """

    def __init__(self, frame_rate: float | None) -> None:
        self._period_s = 1 / (frame_rate or _USUAL_FRAME_RATE)
        self._last_s: float | None = None
        self._shift_s = 0.0
        self._was_early = False
        self._resume_s: float | None = None

    def stamp(self, time_s: float | None) -> float:
        """Time of the next frame in seconds, from what the source says, None if it says nothing."""
        if self._last_s is None:
            self._last_s = time_s or 0.0
        elif self._resume_s is not None:
            self._set_forward(self._resume_s, time_s)
        elif time_s is not None and time_s + self._shift_s > self._last_s:
            self._last_s, self._was_early = time_s + self._shift_s, False
        else:
            self._set_forward(self._last_s + self._period_s, time_s if self._was_early else None)
            self._was_early = time_s is not None
        return self._last_s

    def resume_after(self, gap_s: float) -> None:
        """Let the next frame follow ``gap_s`` seconds after the last one, whatever the source's new clock says."""
        if self._last_s is not None:
            self._resume_s = self._last_s + max(gap_s, self._period_s)

    def _set_forward(self, now_s: float, time_s: float | None) -> None:
        """Make it ``now_s``, and let the source's clock go on from there if it says ``time_s``."""
        self._last_s, self._resume_s = now_s, None
        if time_s is not None:
            self._shift_s = now_s - time_s
