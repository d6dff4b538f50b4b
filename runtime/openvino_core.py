"""OpenVINO's entry point, one for the whole process."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from runtime.errors import BackendUnavailableError

if TYPE_CHECKING:
    import openvino as ov

DEVICE = "CPU"


def openvino_core() -> ov.Core:
    """The one ``Core`` of this process, which lives as long as it does.

    Each ``Core`` that compiles for a CPU gives the thread another stack for signal handlers, and puts back the one that
    was there before when it goes. Of two that go in the order in which they came, the second puts back the unmapped
    stack of the first, and the next signal that Python handles (Ctrl-C, a child that ends) kills the process without a
    word. Seen with OpenVINO 2026.4.

    Raises:
        BackendUnavailableError: OpenVINO is not installed.
    """
    try:
        import openvino  # noqa: F401
    except ImportError as error:
        raise BackendUnavailableError("OpenVINO is not installed. Install it: pip install '.[openvino]'") from error
    return _core()


@cache
def _core() -> ov.Core:
    import openvino

    return openvino.Core()


def computes_in_bf16() -> bool:
    """Whether this CPU has bf16 arithmetic (AMX or AVX512-BF16).

    Raises:
        BackendUnavailableError: OpenVINO is not installed.
    """
    return "BF16" in openvino_core().get_property(DEVICE, "OPTIMIZATION_CAPABILITIES")
