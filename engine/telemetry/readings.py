"""Readings of the process, the machine and its GPUs, cheap enough to be taken several times a second."""

from __future__ import annotations

import time
from typing import Any, TypedDict

import psutil

from engine.telemetry.gpu import GpuReader, GpuReading, mark_own

# CPU times are counted in hundredths of a second: a percentage over less than this would be noise.
_SHORTEST_S = 0.05


class ProcessReading(TypedDict):
    """This process: bytes that it holds, CPU use (100 is one core busy all the time), threads."""

    resident_bytes: int
    cpu_percent: float
    threads: int


class SystemReading(TypedDict):
    """The machine: bytes of memory, CPU use (100 is every core busy all the time), logical cores."""

    memory_total_bytes: int
    memory_available_bytes: int
    cpu_percent: float
    cpu_count: int | None


class Sample(TypedDict):
    """One reading of everything, JSON-ready.

    Attributes:
        time_unix_s: wall clock.
        process, system: see there.
        gpu: one reading a device, or None; gpu_reason: why there is none, else None.
    """

    time_unix_s: float
    process: ProcessReading
    system: SystemReading
    gpu: list[GpuReading] | None
    gpu_reason: str | None


class Telemetry:
    """Samples this process, this machine and, where there is an NVIDIA driver, its GPUs. Not thread-safe.

    CPU percentages are means since the previous sample of the same object (0 in the first one).

    Attributes:
        engine_gpu: which GPU the engine's model is on, from :func:`engine.telemetry.gpu.gpu_uuid`; None for none.
    """

    def __init__(self) -> None:
        self.engine_gpu: str | None = None
        self._process = psutil.Process()
        self._gpus = GpuReader()
        self._read_s = time.monotonic()
        self._times = psutil.cpu_times()
        self._own_s = time.process_time()
        self._percent = (0.0, 0.0)

    def sample(self) -> Sample:
        """One reading. Never raises because of a GPU: what cannot be read is None."""
        memory = psutil.virtual_memory()
        process_percent, system_percent = self._cpu_percent()
        with self._process.oneshot():
            process = ProcessReading(
                resident_bytes=self._process.memory_info().rss,
                cpu_percent=process_percent,
                threads=self._process.num_threads(),
            )
        system = SystemReading(
            memory_total_bytes=memory.total,
            memory_available_bytes=memory.available,
            cpu_percent=system_percent,
            cpu_count=psutil.cpu_count(),
        )
        gpus = self._gpus.read()
        if gpus is not None:
            mark_own(gpus, self.engine_gpu)
        return Sample(time_unix_s=time.time(), process=process, system=system, gpu=gpus, gpu_reason=self._gpus.reason)

    def close(self) -> None:
        """Release the management library; further samples have no GPU readings."""
        self._gpus.close()

    def _cpu_percent(self) -> tuple[float, float]:
        """(this process, the machine) since the last sample; that of the last one if it was only just taken."""
        # psutil.cpu_percent() keeps its interval in the module: two samplers would cut each other's short
        now_s, times, own_s = time.monotonic(), psutil.cpu_times(), time.process_time()
        elapsed_s = now_s - self._read_s
        if elapsed_s < _SHORTEST_S:
            return self._percent
        total, idle = sum(times) - sum(self._times), _idle(times) - _idle(self._times)
        busy = 100.0 * (1.0 - idle / total) if total > 0 else 0.0
        own = 100.0 * (own_s - self._own_s) / elapsed_s
        self._percent = (round(max(0.0, own), 1), round(min(100.0, max(0.0, busy)), 1))
        self._read_s, self._times, self._own_s = now_s, times, own_s
        return self._percent


def _idle(times: Any) -> float:
    return float(times.idle + getattr(times, "iowait", 0.0))
