"""Freed pictures go back to the system, and the highest memory of a process is its own."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from runtime.memory import peak_memory_mib

SCRIPT = """
import numpy as np, psutil
from runtime.memory import return_large_arrays
assert return_large_arrays()
for size in (30, 20):  # glibc on its own would raise its limit on the first free, and keep the second in its heap
    array, keep = np.ones(size << 20, np.uint8), None
    del array
before = psutil.Process().memory_info().rss
arrays = [np.ones(2 << 20, np.uint8) for _ in range(20)]
small = np.ones(1000)  # lies above them in a heap
del arrays
print((psutil.Process().memory_info().rss - before) >> 20)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_freed_arrays_leave_the_process():
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert int(result.stdout) < 4


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
