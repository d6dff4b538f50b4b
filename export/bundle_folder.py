"""A bundle's folder appears whole or not at all: filled under a hidden name, then put in its place in one step."""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp

from runtime.errors import SinkError
from runtime.manifest import MANIFEST_FILE


@contextmanager
def partial_folder(target: Path) -> Iterator[Path]:
    """A hidden folder beside the target, removed at the end; those of exports that were killed are removed first.

    It is locked as long as this process lives, which tells it from one that was left behind.
    """
    prefix = f".{target.name}.partial-"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for left in target.parent.glob(f"{prefix}*"):
            if (lock := _lock(left)) is not None:
                shutil.rmtree(left, ignore_errors=True)
                os.close(lock)
        folder = Path(mkdtemp(prefix=prefix, dir=target.parent))
    except OSError as error:
        raise SinkError(f"{target} cannot be written: {error.strerror}. Choose another folder.") from error
    lock = _lock(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _lock(folder: Path) -> int | None:
    """A descriptor that holds the folder's lock; None if another process holds it, or there are no locks here."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def replace_folder(source: Path, target: Path) -> None:
    """Put ``source`` in the place of ``target``, which may exist.

    Linux exchanges the two in one step (renameat2 with RENAME_EXCHANGE), so that at every moment one of them is there;
    the older bundle is then at ``source``. On a file system without that, the older one is moved aside for a moment;
    a process killed in that moment leaves it as ``.NAME.older-bundle``.

    Raises:
        SinkError: ``target`` holds something that is no bundle.
        OSError: The file system refused; ``target`` is what it was.
    """
    source.chmod(0o755)  # mkdtemp made it private
    check_replaceable(target)
    aside = target.with_name(f".{target.name}.older-bundle")
    if not target.exists():
        source.rename(target)
    elif not _exchange(source, target):
        shutil.rmtree(aside, ignore_errors=True)
        target.rename(aside)
        try:
            source.rename(target)
        except OSError:
            aside.rename(target)
            raise
    shutil.rmtree(aside, ignore_errors=True)


def check_replaceable(target: Path) -> None:
    """Refuse a target that exists and is neither a bundle nor an empty folder.

    Raises:
        SinkError: It was left alone.
    """
    if not target.exists():
        return
    if not target.is_dir() or (any(target.iterdir()) and not (target / MANIFEST_FILE).is_file()):
        raise SinkError(f"{target} exists and is no bundle; it was left alone. Choose another folder.")


def _exchange(one: Path, other: Path) -> bool:
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):  # another C library, another system
        return False
    at_cwd, exchange = -100, 2
    return rename(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), exchange) == 0
