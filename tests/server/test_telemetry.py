"""Telemetry reads what is there and states what is not."""

from __future__ import annotations

import json
import os
import sys
import time
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from engine.telemetry import Telemetry

GIB = 2**30


class FakeNvml:
    """Two devices with the management library's calls; the second one offers no power reading."""

    NVML_TEMPERATURE_GPU = 0
    NVML_CLOCK_SM = 1

    class NVMLError(Exception):
        pass

    class NVMLError_NotSupported(NVMLError):  # noqa: N801, N818 (the library's own name)
        pass

    class NVMLError_NoPermission(NVMLError):  # noqa: N801, N818
        pass

    def __init__(self, devices: int = 2, error: str | None = None) -> None:
        self.devices, self.error, self.shut_down = devices, error, False

    def nvmlInit(self) -> None:  # noqa: N802
        if self.error == "init":
            raise self.NVMLError("Driver Not Loaded")

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.shut_down = True

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        if self.error == "lost":
            raise self.NVMLError("GPU is lost")
        return self.devices

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetName(self, handle: int) -> bytes:  # noqa: N802
        return b"NVIDIA H100"

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:  # noqa: N802
        return SimpleNamespace(total=80 * GIB, used=(handle + 1) * GIB)

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> Any:  # noqa: N802
        return SimpleNamespace(gpu=87, memory=41)

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:  # noqa: N802
        if handle == 1:
            raise self.NVMLError_NotSupported("Not Supported")
        return 350_500

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: int) -> int:  # noqa: N802
        return 700_000

    def nvmlDeviceGetTemperature(self, handle: int, sensor: int) -> int:  # noqa: N802
        return 61

    def nvmlDeviceGetClockInfo(self, handle: int, clock: int) -> int:  # noqa: N802
        return 1980


def test_readings_of_process_and_machine_are_real():
    telemetry = Telemetry()
    ballast = bytearray(os.urandom(1) * (64 * 2**20))
    sample = telemetry.sample()
    assert sample["process"]["resident_bytes"] == pytest.approx(psutil.Process().memory_info().rss, rel=0.05)
    assert sample["process"]["resident_bytes"] > len(ballast)
    assert sample["process"]["threads"] >= 1
    assert 0 < sample["system"]["memory_available_bytes"] < sample["system"]["memory_total_bytes"]
    assert sample["system"]["memory_total_bytes"] == psutil.virtual_memory().total
    json.dumps(sample, allow_nan=False)


def test_busy_process_is_seen_by_each_sampler_for_itself():
    first, second = Telemetry(), Telemetry()
    end = time.process_time() + 0.4
    while time.process_time() < end:
        first.sample()  # a second reader must not cut this one's interval short
    reading = second.sample()
    assert reading["process"]["cpu_percent"] > 10
    assert reading["system"]["cpu_percent"] > 1


def test_missing_library_is_stated(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)  # importing it raises ImportError
    sample = Telemetry().sample()
    assert sample["gpu"] is None
    assert "nvidia-ml-py" in sample["gpu_reason"]


def test_gpus_are_read_and_what_a_device_lacks_is_none():
    nvml = FakeNvml()
    telemetry = Telemetry(nvml)
    sample = telemetry.sample()
    first, second = sample["gpu"]
    assert sample["gpu_reason"] is None
    assert first == {
        "index": 0,
        "name": "NVIDIA H100",
        "memory_total_bytes": 80 * GIB,
        "memory_used_bytes": GIB,
        "utilization_percent": 87,
        "memory_utilization_percent": 41,
        "temperature_c": 61,
        "power_w": 350.5,
        "power_limit_w": 700.0,
        "sm_clock_mhz": 1980,
    }
    assert second["power_w"] is None
    assert second["memory_used_bytes"] == 2 * GIB
    telemetry.close()
    assert nvml.shut_down
    assert telemetry.sample()["gpu"] is None


@pytest.mark.parametrize(
    ("nvml", "reason"),
    [
        (FakeNvml(error="init"), "Driver Not Loaded"),
        (FakeNvml(error="lost"), "GPU is lost"),
        (FakeNvml(devices=0), "no NVIDIA GPU"),
    ],
)
def test_gpus_that_cannot_be_read_do_not_harm_the_rest(nvml: FakeNvml, reason: str):
    sample = Telemetry(nvml).sample()
    assert sample["gpu"] is None
    assert reason in sample["gpu_reason"]
    assert sample["process"]["resident_bytes"] > 0


def test_readings_come_back_with_the_device():
    nvml = FakeNvml(error="lost")
    telemetry = Telemetry(nvml)
    assert telemetry.sample()["gpu"] is None
    nvml.error = None
    assert len(telemetry.sample()["gpu"]) == 2
