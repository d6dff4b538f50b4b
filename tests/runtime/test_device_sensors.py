"""Sensors of made-up devices, laid out as their kernels do it. No Jetson and no NVIDIA GPU was here."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from runtime.profiling.device_sensors import Sensor, SensorLog, find_sensors
from runtime.profiling.nvml import NvmlGpu, open_nvml


@pytest.fixture
def device(tmp_path):
    """``device(**{"sys/...": text})`` writes these files and gives their root."""

    def make(files: dict[str, str]) -> Path:
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return make


ORIN = {
    "sys/class/hwmon/hwmon3/in1_label": "VDD_IN\n",
    "sys/class/hwmon/hwmon3/in1_input": "5000\n",
    "sys/class/hwmon/hwmon3/curr1_input": "2400\n",
    "sys/class/hwmon/hwmon3/in2_label": "VDD_CPU_GPU_CV\n",
    "sys/class/hwmon/hwmon3/in2_input": "5000\n",
    "sys/class/hwmon/hwmon3/curr2_input": "800\n",
    "sys/class/hwmon/hwmon3/in7_label": "Sum of shunt voltages\n",
    "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
    "sys/class/thermal/thermal_zone0/temp": "48500\n",
    "sys/class/devfreq/17000000.gpu/cur_freq": "918000000\n",
    "sys/class/devfreq/15340000.vic/cur_freq": "115200000\n",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "1510400\n",
}


def test_jetson_orin_tells_power_temperature_and_clocks(device):
    found = {(sensor.kind, sensor.name): sensor for sensor in find_sensors(device(ORIN))}
    assert {key: sensor.read() for key, sensor in found.items()} == {
        ("power_w", "VDD_IN"): pytest.approx(12.0),
        ("power_w", "VDD_CPU_GPU_CV"): pytest.approx(4.0),
        ("temperature_c", "cpu-thermal"): pytest.approx(48.5),
        ("clock_mhz", "GPU"): pytest.approx(918.0),
        ("clock_mhz", "cpu0"): pytest.approx(1510.4),
    }
    assert [name for (_, name), sensor in found.items() if sensor.total] == ["VDD_IN"]


def test_device_that_tells_nothing_has_no_sensors(tmp_path):
    assert find_sensors(tmp_path) == []


def test_sensor_that_cannot_be_read_is_absent(device):
    root = device({**ORIN, "sys/class/thermal/thermal_zone0/temp": "asleep\n"})
    assert "cpu-thermal" not in {sensor.name for sensor in find_sensors(root)}


def test_energy_counter_of_a_cpu_gives_watts(device):
    folder = "sys/class/powercap/intel-rapl:0/"
    root = device({folder + "energy_uj": "1000000\n", folder + "name": "package-0\n"})
    (sensor,) = find_sensors(root)
    assert (sensor.name, sensor.total) == ("CPU package-0", True)
    time.sleep(0.05)
    (root / folder / "energy_uj").write_text("2000000\n")  # one joule
    assert 0 < sensor.read() <= 1 / 0.05
    (root / folder / "energy_uj").write_text("5\n")
    with pytest.raises(ValueError, match="started again"):
        sensor.read()


def test_log_keeps_readings_of_the_steps_that_are_asked_for():
    value = iter(range(1000))
    sensor = Sensor("power_w", "made up", lambda: float(next(value)), total=True)
    with SensorLog([sensor], interval_s=0.01) as log:
        time.sleep(0.2)
    everything = log.values(sensor)
    assert len(everything) >= 2 and everything == sorted(everything)
    when = log.samples[0][0]
    assert log.values(sensor, [when - 0.001])[0] == everything[0]
    assert log.values(sensor, [when + 1000.0]) == []


def test_failed_reading_is_left_out():
    def fail() -> float:
        raise OSError("asleep")

    sensor = Sensor("clock_mhz", "made up", fail)
    with SensorLog([sensor], interval_s=0.01) as log:
        time.sleep(0.05)
    assert log.samples and log.values(sensor) == []


def test_no_driver_means_no_gpu():
    assert open_nvml("libnot-there.so.1") is None
    assert open_nvml("libc.so.6") is None  # a library without these functions


class RecordingNvml:
    """Stands for the driver's library: answers each function with a number."""

    numbers = {"nvmlDeviceGetPowerUsage": 151_500, "nvmlDeviceGetTemperature": 61, "nvmlDeviceGetClockInfo": 1980}  # noqa: RUF012

    def __getattr__(self, function):
        def call(handle, *arguments):
            if function == "nvmlDeviceGetName":
                arguments[0].value = b"Made-up GPU"
            elif function in self.numbers:
                arguments[-1]._obj.value = self.numbers[function]
            else:
                return 3  # NVML_ERROR_NOT_SUPPORTED
            return 0

        return call


def test_nvml_readings_have_their_units():
    gpu = NvmlGpu(RecordingNvml(), None)
    assert (gpu.name, gpu.power_w(), gpu.temperature_c(), gpu.clock_mhz()) == ("Made-up GPU", 151.5, 61.0, 1980.0)


def test_nvml_function_that_is_refused_is_an_error(monkeypatch):
    monkeypatch.setattr(RecordingNvml, "numbers", {})
    with pytest.raises(OSError, match="nvmlDeviceGetPowerUsage gave status 3"):
        NvmlGpu(RecordingNvml(), None).power_w()
