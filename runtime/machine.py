"""Which machine this is."""

from __future__ import annotations

import platform
from pathlib import Path

_BOARD = Path("/proc/device-tree/model")  # Jetson and other boards
_CPU = Path("/proc/cpuinfo")
_GPUS = Path("/proc/driver/nvidia/gpus")  # one folder per card, where NVIDIA's desktop and server driver is


def machine_name() -> str:
    """Processor or board, and NVIDIA cards: the same for every machine of that make.

    It is what an engine that passed :func:`runtime.reference.verify_engine` passed on. A host's name is no part of it:
    containers get a new one at every start.
    """
    board = _read(_BOARD).strip("\0\n ")
    return ", ".join([board or _cpu_name(), *_gpu_names()])


def _cpu_name() -> str:
    return _field(_read(_CPU), "model name") or platform.processor() or platform.machine()


def _gpu_names() -> list[str]:
    return [_field(_read(path), "Model") or "GPU" for path in sorted(_GPUS.glob("*/information"))]


def _field(text: str, name: str) -> str:
    """The value after ``name`` and a colon, in the first line that has it."""
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon and key.strip() == name:
            return value.strip()
    return ""


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
