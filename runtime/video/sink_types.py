"""What every sink has: its protocol, and the life of one that makes a file."""

from __future__ import annotations

import os
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from ..errors import SinkError
from ..results import FrameResult
from .frame import Frame
from .output_file import OutputFile, writing

if TYPE_CHECKING:
    from typing_extensions import Self


class Sink(Protocol):
    """Takes frames with their results, in order. Nothing of either is used after :meth:`write` has returned."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def write(self, frame: Frame, result: FrameResult) -> None:
        """Take one frame.

        Raises:
            SinkError: It cannot be written; the sink is closed, and what it had written is removed.
        """
        ...

    def close(self, *, failed: bool = False) -> None:
        """Finish; may be called twice. With ``failed`` what was written is removed and an older output stays.

        Raises:
            SinkError: The end cannot be written; what was written before is removed.
        """
        ...


class SinkContext:
    """The ``with`` of every sink: closes it, as failed after an error, but not after Ctrl-C or ``sys.exit``."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(failed=isinstance(error, Exception))

    def close(self, *, failed: bool = False) -> None:
        """Finish; may be called twice."""
        raise NotImplementedError


class FileSink(SinkContext):
    """A sink that makes one file, which is hidden until it is complete.

    Args:
        path: The file to make; an older one is replaced at :meth:`close`, not before.

    Raises:
        SinkError: The place is not writable.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = OutputFile(path)
        self._is_closed = False
        try:
            with writing(self._file.path):
                self._open()
        except SinkError:
            self._file.discard()
            raise

    def write(self, frame: Frame, result: FrameResult) -> None:
        """Take one frame.

        Raises:
            SinkError: It cannot be written; the sink is closed, and what it had written is removed.
        """
        if self._is_closed:
            raise SinkError(f"{self._file.path}: closed, so frame {result.frame_index} has nowhere to go.")
        try:
            with writing(self._file.path):
                self._write(frame, result)
        except SinkError:
            self.close(failed=True)
            raise

    def close(self, *, failed: bool = False) -> None:
        """Finish; may be called twice. With ``failed`` what was written is removed and an older output stays.

        Raises:
            SinkError: The end cannot be written; what was written before is removed.
        """
        if self._is_closed:
            return
        self._is_closed = True
        is_complete = False
        try:
            if not failed:
                with writing(self._file.path):
                    is_complete = self._finish()
        finally:
            self._release()
            if not is_complete:
                self._file.discard()
        if is_complete:
            self._file.commit()

    def _open(self) -> None:
        """Open what is written to; leaves nothing open after an error."""
        raise NotImplementedError

    def _write(self, frame: Frame, result: FrameResult) -> None:
        raise NotImplementedError

    def _finish(self) -> bool:
        """Write what is left; False if that makes nothing worth keeping."""
        raise NotImplementedError

    def _release(self) -> None:
        """Close everything without an error, whatever state it is in."""
        raise NotImplementedError
