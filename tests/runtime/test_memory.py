"""What a frame frees serves the next one, very large arrays go back, and a process has its own highest memory."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from runtime.memory import peak_memory_mib

LARGE = """
import numpy as np, psutil
from runtime.memory import reuse_freed_pictures
assert reuse_freed_pictures()
for size in (30, 20):  # glibc on its own would raise its limit on the first free, and keep the second in its heap
    array, keep = np.ones(size << 20, np.uint8), None
    del array
before = psutil.Process().memory_info().rss
arrays = [np.ones(5 << 20, np.uint8) for _ in range(10)]
small = np.ones(1000)  # lies above them in a heap
del arrays
print((psutil.Process().memory_info().rss - before) >> 20)
"""
PICTURES = """
import resource, numpy as np
from runtime.memory import reuse_freed_pictures
assert reuse_freed_pictures()
def frame():
    return [np.ones(size, np.uint8) for size in (540 * 960 * 4, 540 * 960 * 3, 3 * 720 * 1280)]
frame()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    frame()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 20)
"""
needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")


def printed(script: str) -> int:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return int(done.stdout)


@needs_glibc
def test_very_large_arrays_leave_the_process():
    assert printed(LARGE) < 4


@needs_glibc
def test_pictures_of_a_frame_serve_the_next():
    assert printed(PICTURES) < 20, "page faults a frame, of which a picture of 2 MB alone has 500"


PEAK = """
import os
from runtime.memory import peak_memory_mib
array = bytearray(80 << 20)
del array
print(peak_memory_mib(os.getpid()))
"""


def test_peak_is_that_of_the_process_and_not_of_its_parent():
    ballast = b"x" * (300 << 20)  # what getrusage would tell the child of
    result = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    assert 80 < float(result.stdout) < 200 < len(ballast) >> 20
    assert peak_memory_mib(2**22 + 1) is None, "no process has this number"
