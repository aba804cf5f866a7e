"""Readings of the process, the machine and its GPUs, cheap enough to be taken several times a second."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from typing import Any

import psutil


class Telemetry:
    """Samples this process, this machine and, where NVIDIA's management library can be had, its GPUs.

    CPU percentages are means since the previous sample of the same object (0 in the first one); of the process, 100 is
    one core busy all the time. GPU readings need the optional package ``nvidia-ml-py``; without it, or without a
    driver, ``gpu`` is None and ``gpu_reason`` says why.

    Args:
        nvml: the module to read GPUs with, in place of an installed ``pynvml``.
    """

    def __init__(self, nvml: Any = None) -> None:
        self._process = psutil.Process()
        self._process.cpu_percent()  # starts the interval of the first sample
        self._cpu_times = psutil.cpu_times()
        self._nvml: Any = None
        self._gpu_reason: str | None = None
        self._start_nvml(nvml)

    def sample(self) -> dict[str, Any]:
        """One reading, JSON-ready.

        Returns:
            ``time_unix_s``; ``process`` (``resident_bytes``, ``cpu_percent``, ``threads``); ``system``
            (``memory_total_bytes``, ``memory_available_bytes``, ``cpu_percent``, ``cpu_count``); ``gpu``: a list with
            one mapping a device, or None; ``gpu_reason``: why there is none, else None. A GPU's reading that the device
            does not offer is None.
        """
        memory = psutil.virtual_memory()
        with self._process.oneshot():
            process = {
                "resident_bytes": self._process.memory_info().rss,
                "cpu_percent": self._process.cpu_percent(),
                "threads": self._process.num_threads(),
            }
        gpu = self._sample_gpus()
        return {
            "time_unix_s": time.time(),
            "process": process,
            "system": {
                "memory_total_bytes": memory.total,
                "memory_available_bytes": memory.available,
                "cpu_percent": self._system_cpu_percent(),
                "cpu_count": psutil.cpu_count(),
            },
            "gpu": gpu,
            "gpu_reason": self._gpu_reason,
        }

    def close(self) -> None:
        """Release the management library; further samples have no GPU readings."""
        if self._nvml is not None:
            nvml, self._nvml, self._gpu_reason = self._nvml, None, "the telemetry was closed."
            nvml.nvmlShutdown()

    def _system_cpu_percent(self) -> float:
        # psutil.cpu_percent() keeps its interval in the module: two samplers would cut each other's short
        before, now = self._cpu_times, psutil.cpu_times()
        total = sum(now) - sum(before)
        idle = now.idle - before.idle + getattr(now, "iowait", 0.0) - getattr(before, "iowait", 0.0)
        if total <= 0:
            return 0.0
        self._cpu_times = now
        return round(min(100.0, max(0.0, 100.0 * (1.0 - idle / total))), 1)

    def _start_nvml(self, given: Any) -> None:
        try:
            nvml: Any = given or importlib.import_module("pynvml")  # optional: not among the requirements
        except ImportError:
            self._gpu_reason = "the package nvidia-ml-py is not installed."
            return
        try:
            nvml.nvmlInit()
        except nvml.NVMLError as problem:
            self._gpu_reason = f"NVIDIA's management library cannot be used: {problem}."
            return
        self._nvml = nvml

    def _sample_gpus(self) -> list[dict[str, Any]] | None:
        if self._nvml is None:
            return None
        try:
            handles = [self._nvml.nvmlDeviceGetHandleByIndex(i) for i in range(self._nvml.nvmlDeviceGetCount())]
            readings = [self._sample_gpu(index, handle) for index, handle in enumerate(handles)]
        except self._nvml.NVMLError as problem:  # a driver that is being replaced, a device that fell off the bus
            self._gpu_reason = f"the GPUs cannot be read: {problem}."
            return None
        self._gpu_reason = None if readings else "there is no NVIDIA GPU."
        return readings or None

    def _sample_gpu(self, index: int, handle: Any) -> dict[str, Any]:
        nvml = self._nvml
        memory = self._read(lambda: nvml.nvmlDeviceGetMemoryInfo(handle))
        rates = self._read(lambda: nvml.nvmlDeviceGetUtilizationRates(handle))
        power = self._read(lambda: nvml.nvmlDeviceGetPowerUsage(handle))
        limit = self._read(lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle))
        name = nvml.nvmlDeviceGetName(handle)
        return {
            "index": index,
            "name": name.decode() if isinstance(name, bytes) else name,
            "memory_total_bytes": None if memory is None else memory.total,
            "memory_used_bytes": None if memory is None else memory.used,
            "utilization_percent": None if rates is None else rates.gpu,
            "memory_utilization_percent": None if rates is None else rates.memory,
            "temperature_c": self._read(lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
            "power_w": None if power is None else power / 1e3,
            "power_limit_w": None if limit is None else limit / 1e3,
            "sm_clock_mhz": self._read(lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)),
        }

    def _read(self, reading: Callable[[], Any]) -> Any:
        """A reading, or None where this device does not offer it: virtual GPUs and MIG slices leave out some."""
        try:
            return reading()
        except (self._nvml.NVMLError_NotSupported, self._nvml.NVMLError_NoPermission):
            return None
