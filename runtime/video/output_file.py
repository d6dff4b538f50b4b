"""Files that appear under their name only when they are whole."""

from __future__ import annotations

import errno
import itertools
import os
import sqlite3
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import av

from ..errors import SinkError

_NUMBERS = itertools.count()
_HINTS = {
    errno.ENOSPC: "Free some space, or write to another disk.",
    errno.EDQUOT: "Free some space, or write to another disk.",
    errno.ENOENT: "Create the folder first.",
    errno.ENOTDIR: "A part of the path is a file; name a folder.",
    errno.EISDIR: "This is a folder; name a file.",
}
_USUAL_HINT = "Name a place that you may write to."


class OutputFile:
    """A hidden partial file beside the wanted one, which it replaces when it is complete.

    Until :meth:`commit`, a file that was there before stays as it was; a killed process leaves only the partial file.

    Args:
        path: The wanted file; its folder has to exist.

    Attributes:
        path: As given.
        partial: The file to write to, created empty; its suffix is that of ``path``.

    Raises:
        SinkError: The place is not writable; known before any work is done.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.partial = self.path.with_name(f".{self.path.stem}.{os.getpid()}-{next(_NUMBERS)}.part{self.path.suffix}")
        with writing(self.path):
            if self.path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            self.partial.touch()

    def commit(self) -> None:
        """Give the partial file its name, in one step.

        Raises:
            SinkError: That failed; the partial file is removed.
        """
        try:
            with writing(self.path):
                self.partial.replace(self.path)
        except SinkError:
            self.discard()
            raise

    def discard(self) -> None:
        """Remove the partial file if it is still there."""
        self.partial.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Generator[None, None, None]:
    """Turn what goes wrong while writing ``path`` into a SinkError that says what to do."""
    try:
        yield
    except (OSError, av.FFmpegError, sqlite3.Error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        hint = _HINTS.get(getattr(error, "errno", None) or 0, _USUAL_HINT)
        raise SinkError(f"{path}: cannot be written: {reason}. {hint}") from error
