"""The first NVIDIA GPU's power, temperature and clock, from the driver's library; no package is needed."""

from __future__ import annotations

import ctypes

_TEMPERATURE_GPU, _CLOCK_SM = 0, 1  # nvmlTemperatureSensors_t, nvmlClockType_t


class NvmlGpu:
    """An open handle.

    Attributes:
        name: As the driver calls it.
    """

    def __init__(self, library: ctypes.CDLL, handle: ctypes.c_void_p) -> None:
        self._library, self._handle = library, handle
        text = ctypes.create_string_buffer(96)
        self._call("nvmlDeviceGetName", text, ctypes.c_uint(len(text)))
        self.name = text.value.decode(errors="replace")

    def _call(self, function: str, *arguments: object) -> None:
        status = getattr(self._library, function)(self._handle, *arguments)
        if status != 0:
            raise OSError(f"{function} gave status {status}")

    def _read(self, function: str, *arguments: object) -> float:
        value = ctypes.c_uint()
        self._call(function, *arguments, ctypes.byref(value))
        return float(value.value)

    def power_w(self) -> float:
        """Of the whole board, watts."""
        return self._read("nvmlDeviceGetPowerUsage") / 1e3

    def temperature_c(self) -> float:
        """Of the GPU, degrees Celsius."""
        return self._read("nvmlDeviceGetTemperature", ctypes.c_int(_TEMPERATURE_GPU))

    def clock_mhz(self) -> float:
        """Of the multiprocessors, MHz."""
        return self._read("nvmlDeviceGetClockInfo", ctypes.c_int(_CLOCK_SM))


def open_nvml(library: str = "libnvidia-ml.so.1") -> NvmlGpu | None:
    """The first GPU; None where there is no driver, or no GPU."""
    try:
        loaded = ctypes.CDLL(library)
        handle = ctypes.c_void_p()
        if loaded.nvmlInit_v2() != 0 or loaded.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(handle)) != 0:
            return None
        return NvmlGpu(loaded, handle)
    except (OSError, AttributeError):
        return None
