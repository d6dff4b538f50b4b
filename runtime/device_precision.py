"""Which precision an NVIDIA GPU computes in, by its compute capability."""

from __future__ import annotations

import re

from runtime.errors import BackendUnavailableError
from runtime.manifest import Manifest

# First compute capability with tensor cores for it: CUDA C++ Programming Guide, "Compute Capabilities".
FIRST_CAPABILITY = {"fp32": 0, "fp16": 70, "int8": 72, "bf16": 80, "fp8": 89}

_NAMES = {
    70: "Volta",
    72: "Jetson Xavier",
    75: "Turing",
    80: "A100",
    86: "Ampere",
    87: "Jetson Orin",
    89: "Ada",
    90: "Hopper",
}


def check_device_precision(manifest: Manifest, capability: str) -> None:
    """Refuse a device that has not what a bundle computes in.

    Args:
        manifest: Of the bundle.
        capability: Compute capability as ``sm87``, ``SM87`` or ``8.7``.

    Raises:
        BackendUnavailableError: The device lacks the precision, or this is no compute capability.
    """
    number = capability_number(capability)
    for precision in (manifest.precision, manifest.rest_precision):
        first = FIRST_CAPABILITY[precision]
        if number < first:
            name = f" ({_NAMES[number]})" if number in _NAMES else ""
            raise BackendUnavailableError(
                f"this bundle computes in {precision}, and sm{number}{name} has no {precision}: it came with sm{first} "
                f"({_NAMES[first]}). {_instead(precision)}"
            )


def capability_number(capability: str) -> int:
    """Compute capability as an integer.

    Raises:
        BackendUnavailableError: This is none.

    >>> capability_number("sm87"), capability_number("8.7"), capability_number("12.0")
    (87, 87, 120)
    """
    match = re.fullmatch(r"(?:sm_?)?(\d+)\.?(\d)[a-z]?", capability.strip().lower())
    if match is None:
        raise BackendUnavailableError(f"{capability!r} is no compute capability; they are written sm87 or 8.7.")
    return int(match[1] + match[2])


def _instead(precision: str) -> str:
    if precision == "fp8":
        return "Make one in int8: deploy.py calibrate BUNDLE --source VIDEO --precision int8 --rest fp16"
    return "Export the checkpoint in fp32, or in fp16 where the device has that: --precision fp16"
