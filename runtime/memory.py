"""Keeping a process that runs for days from growing: large arrays go back to the system when they are freed."""

from __future__ import annotations

import ctypes

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
