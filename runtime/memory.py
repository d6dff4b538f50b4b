"""Memory of a process: its highest, and how one that runs for days is kept from growing."""

from __future__ import annotations

import ctypes
from pathlib import Path

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # parameters of glibc's mallopt
_LARGE_BYTES = 4 * 2**20  # beyond it NumPy asks for huge pages, and a fresh array is cheap
_SPARE_BYTES = 16 * 2**20
_ARENAS = 2


def reuse_freed_pictures() -> bool:
    """Tell glibc to keep what a frame frees for the next one, in two heaps; True where that is possible.

    Pictures and masks of the same sizes come and go with every frame. Where they go back to the system each time, the
    next ones come page by page, zeroed: with all sinks at 720p 4400 page faults a frame, 56 ms instead of 50 for a
    small model. Left to itself glibc has a heap for each thread and moves its limits as it goes: memory of ``run`` grew
    by 22 MiB after frame 100 of a 289-frame clip. Arrays of 4 MiB and more go back, and so does more than 16 MiB of
    spare room at the end of a heap.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    wanted = {_MMAP_THRESHOLD: _LARGE_BYTES, _TRIM_THRESHOLD: _SPARE_BYTES, _ARENA_MAX: _ARENAS}
    return all(mallopt(parameter, value) for parameter, value in wanted.items())


def peak_memory_mib(process: int) -> float | None:
    """Highest resident memory so far of a process, MiB; None if it has ended, or the system does not tell.

    It is Linux's VmHWM: what ``getrusage`` and ``wait4`` tell of a process begins with the memory of its parent.
    """
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:")), None)
