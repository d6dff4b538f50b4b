"""Which machine this is, and what state it is in."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

_BOARD = Path("/proc/device-tree/model")  # Jetson and other boards
_CPU = Path("/proc/cpuinfo")
_GPUS = Path("/proc/driver/nvidia/gpus")  # one folder per card, where NVIDIA's desktop and server driver is

# What a reader of a report wants to know of the device: driver, power mode, clocks
_FILES = (Path("/etc/nv_tegra_release"), Path("/proc/device-tree/model"))
_COMMANDS = (
    ("lscpu",),
    ("nvidia-smi",),
    ("nvidia-smi", "--query-gpu=name,driver_version,pstate,clocks.sm,clocks.mem,power.limit", "--format=csv"),
    ("nvpmodel", "-q"),
    ("jetson_clocks", "--show"),
)


def machine_name() -> str:
    """Processor or board, and NVIDIA cards: the same for every machine of that make.

    It is what an engine that passed :func:`runtime.reference.verify_engine` passed on. A host's name is no part of it:
    containers get a new one at every start.
    """
    board = _read(_BOARD).strip("\0\n ")
    return ", ".join([board or cpu_name(), *_gpu_names()])


def cpu_name() -> str:
    """The processor, as the system calls it, and its family and model: virtual machines often give only a brand."""
    info = _read(_CPU)
    name = _field(info, "model name") or platform.processor() or platform.machine()
    family, model = _field(info, "cpu family"), _field(info, "model")
    return f"{name} (family {family}, model {model})" if family and model else name


def available_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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


def describe_device() -> dict[str, str]:
    """What the system tells about itself, by the file or command that told it; what is not there is left out."""
    texts = {str(path): _read(path).strip("\0\n ") for path in _FILES}
    texts |= {" ".join(command): _output(command) for command in _COMMANDS}
    return {name: text for name, text in texts.items() if text}


def _output(command: tuple[str, ...]) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=20, stdin=subprocess.DEVNULL, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
