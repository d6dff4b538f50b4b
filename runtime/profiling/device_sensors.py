"""Power, temperature and clocks while something is measured, from what the device tells without extra packages.

======================  ===========================================================================================
NVIDIA desktop GPUs     NVML, the driver's own library, through ctypes
Jetson                  INA3221 power monitors in hwmon, the GPU's devfreq; what tegrastats prints comes from there
any Linux               thermal zones, CPU clocks, RAPL (readable by root alone on most systems)
======================  ===========================================================================================

What a device does not tell is absent, never guessed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from runtime.profiling.nvml import open_nvml

if TYPE_CHECKING:
    from typing_extensions import Self

Read = Callable[[], float]
INTERVAL_S = 0.2


@dataclass(frozen=True)
class Sensor:
    """One reading.

    Attributes:
        kind: ``power_w``, ``temperature_c`` or ``clock_mhz``.
        name: What is measured, in the device's words.
        total: True for the power of a whole device, board or CPU, not of a part of another sensor's; the energy of a
            frame is the sum of those.
    """

    kind: str
    name: str
    read: Read
    total: bool = False


def find_sensors(root: Path = Path("/")) -> list[Sensor]:
    """All sensors that give a value now.

    Args:
        root: Where ``sys`` is.
    """
    found = [*_hwmon_power(root), *_rapl(root), *_thermal(root), *_clocks(root), *_nvml()]
    return [sensor for sensor in found if _try(sensor) is not None]


def _try(sensor: Sensor) -> float | None:
    try:
        return sensor.read()
    except (OSError, ValueError):  # a sensor that is asleep or not for us
        return None


def _number(path: Path) -> float:
    return float(path.read_text())


def _text(path: Path) -> str:
    return path.read_text().strip()


def _hwmon_power(root: Path) -> Iterator[Sensor]:
    """Rails of an INA3221: ``VDD_IN`` is the whole module of a Jetson Orin; milliamperes times millivolts."""
    for label in sorted((root / "sys/class/hwmon").glob("hwmon*/in*_label")):
        number = label.name.removeprefix("in").removesuffix("_label")
        volts, amperes = label.with_name(f"in{number}_input"), label.with_name(f"curr{number}_input")
        if amperes.exists() and volts.exists():
            name = _text(label)
            yield Sensor("power_w", name, _product(volts, amperes), total=name in ("VDD_IN", "POM_5V_IN"))


def _product(volts: Path, amperes: Path) -> Read:
    return lambda: _number(volts) * _number(amperes) / 1e6


def _rapl(root: Path) -> Iterator[Sensor]:
    """Packages of Intel and AMD CPUs: energy counters in microjoules, which start again from 0 now and then."""
    for energy in sorted((root / "sys/class/powercap").glob("intel-rapl:?/energy_uj")):
        yield Sensor("power_w", f"CPU {_name_beside(energy)}", _EnergyCounter(energy), total=True)


def _name_beside(file: Path) -> str:
    name = file.with_name("name")
    return _text(name) if name.exists() else file.parent.name


class _EnergyCounter:
    """Mean power since the reading before."""

    def __init__(self, path: Path) -> None:
        self._path, self._last = path, (time.perf_counter(), _energy(path))

    def __call__(self) -> float:
        before, now = self._last, (time.perf_counter(), _energy(self._path))
        if now[1] is None or before[1] is None:
            raise OSError(f"{self._path} cannot be read")
        self._last = now
        if now[1] < before[1]:
            raise ValueError(f"{self._path} started again")
        return (now[1] - before[1]) / 1e6 / max(now[0] - before[0], 1e-9)


def _energy(path: Path) -> float | None:
    try:
        return _number(path)
    except OSError:
        return None


def _thermal(root: Path) -> Iterator[Sensor]:
    for zone in sorted((root / "sys/class/thermal").glob("thermal_zone*")):
        if (zone / "type").exists():
            yield Sensor("temperature_c", _text(zone / "type"), _scaled(zone / "temp", 1e-3))


def _clocks(root: Path) -> Iterator[Sensor]:
    """Clock of every CPU in kHz, of a Jetson's GPU in Hz."""
    cpus = sorted((root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_cur_freq"))
    for path in cpus:
        yield Sensor("clock_mhz", path.parts[-3], _scaled(path, 1e-3))
    for path in sorted((root / "sys/class/devfreq").glob("*/cur_freq")):
        if any(word in path.parent.name for word in ("gpu", "ga10b", "gv11b")):
            yield Sensor("clock_mhz", "GPU", _scaled(path, 1e-6))


def _scaled(path: Path, factor: float) -> Read:
    return lambda: _number(path) * factor


def _nvml() -> Iterator[Sensor]:
    gpu = open_nvml()
    if gpu is not None:
        yield Sensor("power_w", gpu.name, gpu.power_w, total=True)
        yield Sensor("temperature_c", gpu.name, gpu.temperature_c)
        yield Sensor("clock_mhz", f"{gpu.name} SM", gpu.clock_mhz)


class SensorLog:
    """Reads sensors in a thread as long as it is open.

    Attributes:
        sensors: What is read.
        samples: Time on the clock of ``time.perf_counter`` and the readings, None where one failed.
    """

    def __init__(self, sensors: Sequence[Sensor], interval_s: float = INTERVAL_S) -> None:
        self.sensors = tuple(sensors)
        self.samples: list[tuple[float, tuple[float | None, ...]]] = []
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sensors", daemon=True)

    def __enter__(self) -> Self:
        if self.sensors:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            self.samples.append((time.perf_counter(), tuple(_try(sensor) for sensor in self.sensors)))

    def values(self, sensor: Sensor, started_s: Sequence[float] | None = None) -> list[float]:
        """Readings of a sensor; only those within ``INTERVAL_S`` after one of these times, if they are given."""
        column = self.sensors.index(sensor)
        picked = [(when, values[column]) for when, values in self.samples]
        return [value for when, value in picked if value is not None and _near(when, started_s)]


def _near(when: float, started_s: Sequence[float] | None) -> bool:
    return started_s is None or any(0.0 <= when - start <= INTERVAL_S for start in started_s)
