"""Memory of a process: its highest, and how one that runs for days is kept from growing."""

from __future__ import annotations

import ctypes
from pathlib import Path

_MMAP_THRESHOLD, _ARENA_MAX = -3, -8  # parameters of glibc's mallopt
_LARGE_BYTES = 256 * 1024
_ARENAS = 2


def return_large_arrays() -> bool:
    """Tell glibc to map arrays of 256 KiB and more for themselves; True where that is possible.

    glibc raises that limit by itself, up to 32 MiB, and then keeps pictures and masks of several threads in heaps that
    fragment: memory of `run` with all sinks grew by 22 MiB after frame 100 of a 289-frame clip, and by at most 2 MiB
    with this (``benchmarks/results/endurance.json``).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGE_BYTES)) and bool(mallopt(_ARENA_MAX, _ARENAS))


def peak_memory_mib(process: int) -> float | None:
    """Highest resident memory so far of a process, MiB; None if it has ended, or the system does not tell.

    It is Linux's VmHWM: what ``getrusage`` and ``wait4`` tell of a process begins with the memory of its parent.
    """
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:")), None)
