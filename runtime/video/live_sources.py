"""Sources that go on without us: cameras and network streams. A lost one is connected again."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Protocol

from ..errors import SourceError, SourceLostError
from .frame import Frame, Picture
from .source_types import BaseSource

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LiveOptions:
    """How patient a live source is.

    Attributes:
        rtsp_transport: ``"tcp"`` (default: no torn pictures), ``"udp"`` or ``"http"``.
        open_timeout_s: How long connecting may take, seconds.
        read_timeout_s: A stream that is silent for so long is lost, seconds.
        max_retries: Attempts to connect again without a frame in between; None for no end.
        first_delay_s: Wait before the first of them; it doubles with each one.
        longest_delay_s: Longest wait between two of them.
    """

    rtsp_transport: str = "tcp"
    open_timeout_s: float = 10.0
    read_timeout_s: float = 5.0
    max_retries: int | None = None
    first_delay_s: float = 0.5
    longest_delay_s: float = 30.0

    def delay_s(self, attempt: int) -> float:
        """Wait before attempt number ``attempt``, counted from 0.

        >>> [LiveOptions().delay_s(attempt) for attempt in (0, 1, 2, 6, 5000)]
        [0.5, 1.0, 2.0, 30.0, 30.0]
        """
        return min(self.first_delay_s * 2.0 ** min(attempt, 100), self.longest_delay_s)


class Connection(Protocol):
    """One connection to a device or stream, until it is lost; opened when it is made."""

    frame_rate: float | None

    def pictures(self, on_error: Callable[[], None]) -> Generator[tuple[Picture, float | None], None, None]:
        """Pictures with their times; ends when the connection is lost. ``on_error`` is called for each broken one."""
        ...

    def missing(self) -> str | None:
        """After the last picture: why there are no more, None if nobody knows."""
        ...

    def close(self) -> None:
        """Give the device or stream free; may be called twice."""
        ...


class LiveSource(BaseSource):
    """Frames of a stream that has no end; lost connections are made again with growing delays.

    The first frame of a new connection carries ``discontinuity="reconnect"``, and its time follows the last one by as
    much as has passed on our clock.

    Args:
        connect: Makes a connection; its first error is raised from here, later ones are retried.
        name: What messages call the source.
        options: Delays and number of attempts.
        patient: Leave the first connection to the reading thread, where it too is tried again and again.
    """

    live = True

    def __init__(
        self, connect: Callable[[], Connection], name: str, options: LiveOptions, *, patient: bool = False
    ) -> None:
        self._connection = None if patient else connect()
        super().__init__(self._connection.frame_rate if self._connection else None, None)
        self._connect = connect
        self._name = name
        self._options = options
        self._attempts = 0
        self._last_frame_s = time.monotonic()
        self._logged: set[str] = set()

    def _generate(self) -> Generator[Frame, None, None]:
        connection = self._connection or self._connect_first()
        discontinuity = None
        while connection is not None:
            yield from self._deliver(connection, discontinuity)
            cause = connection.missing() or "the stream ended"
            connection.close()
            connection, discontinuity = self._connect_again(cause), "reconnect"
            self.counters.reconnects += connection is not None
            self._timeline.resume_after(time.monotonic() - self._last_frame_s)

    def _deliver(self, connection: Connection, discontinuity: str | None) -> Generator[Frame, None, None]:
        """The frames of one connection; the first one carries ``discontinuity``."""
        for picture, time_s in connection.pictures(self._count_decode_error):
            self._attempts = 0
            self._last_frame_s = time.monotonic()
            yield self._frame(picture, time_s, discontinuity)
            discontinuity = None

    def _connect_first(self) -> Connection | None:
        try:
            self._connection = self._connect()
        except SourceError as error:
            return self._connect_again(self._cause(error))
        return self._connection

    def _connect_again(self, cause: str) -> Connection | None:
        """A new connection, however often it takes; None if the source was closed meanwhile."""
        while not self._closing.is_set():
            self._log_once(cause)
            if self._attempts == self._options.max_retries:
                raise SourceLostError(
                    f"{self._name}: lost after {self.counters.frames_read} frames "
                    f"and not back after {self._attempts} attempts: {cause}"
                )
            self._closing.wait(self._options.delay_s(self._attempts))
            self._attempts += 1
            try:
                self._connection = self._connect()
            except SourceError as error:
                cause = self._cause(error)
            else:
                return self._connection
        return None

    def _cause(self, error: SourceError) -> str:
        return str(error).removeprefix(f"{self._name}: ")

    def _log_once(self, cause: str) -> None:
        level = logging.DEBUG if cause in self._logged else logging.WARNING
        self._logged.add(cause)
        logger.log(level, "%s: no connection, trying again: %s", self._name, cause)

    def _release(self) -> None:
        if self._connection is not None:
            self._connection.close()
