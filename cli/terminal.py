"""What a command shows on the terminal: results on stdout, progress and the log on stderr; and how it is stopped."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

console = Console(width=None if sys.stdout.isatty() else 200)  # a pipe or a file wants whole lines
log_console = Console(stderr=True)


def say(text: str) -> None:
    """Print one line as it is: a path or a class name may hold brackets, and a pipe wants no line breaks."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def progress_bar() -> Progress:
    """A bar on stderr that is gone when it is done."""
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    return Progress(*columns, console=log_console, transient=True)


def plain_table(*columns: str) -> Table:
    """A table without lines, for :data:`console`."""
    made = Table(box=None, pad_edge=False)
    for name in columns:
        made.add_column(name, overflow="fold")
    return made


def print_rows(columns: tuple[str, ...], rows: tuple[tuple[str, ...], ...]) -> None:
    """Print such a table at once."""
    made = plain_table(*columns)
    for row in rows:
        made.add_row(*row)
    console.print(made)


@contextlib.contextmanager
def stop_on_signal() -> Iterator[threading.Event]:
    """An event that Ctrl-C or SIGTERM sets, so that a run ends between two frames and its files are finished."""
    stop = threading.Event()
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
