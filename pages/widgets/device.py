"""What the device does: the engine's GPU or, without one, processor and memory of the worker and the machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import streamlit as st

from pages.widgets.live_charts import Chart, draw_charts

_GIB = 2**30
_HEIGHT = 120
_NO_MARKS = pd.DataFrame(columns=["t", "label", "summary"])
Reading = Mapping[str, Any]

GPU_CHARTS: tuple[Chart, ...] = (
    ("GPU use", "%", {"gpu_percent": "kernels ran", "memory_percent": "memory busy"}, "line"),
    ("GPU memory", "GiB", {"memory_gib": "in use", "memory_total_gib": "of the device"}, "line"),
    ("GPU power", "W", {"power_w": "drawn", "power_limit_w": "limit"}, "line"),
    ("GPU clocks", "MHz", {"sm_clock_mhz": "multiprocessors", "memory_clock_mhz": "memory"}, "line"),
)
CPU_CHARTS: tuple[Chart, ...] = (
    ("Processor", "% of all cores", {"worker_percent": "worker", "machine_percent": "machine"}, "line"),
    ("Process and machine memory", "GiB", {"worker_gib": "worker", "machine_gib": "machine in use"}, "line"),
)


def device(readings: Sequence[Reading], end_unix_s: float, window_s: float) -> None:
    """Draw the readings of a window of time, and say what holds the GPU back or why there is none.

    Args:
        readings: samples of :class:`engine.telemetry.Telemetry`, oldest first.
        end_unix_s: right edge (wall clock); window_s: width, seconds.
    """
    inside = [reading for reading in readings if end_unix_s - window_s < reading["time_unix_s"] <= end_unix_s]
    if not inside:
        st.caption("Readings of the device appear when the worker gives them.")
        return
    gpu = own_gpu(inside[-1])
    st.markdown(f"**Device** · {describe(inside[-1], gpu)}")
    charts = CPU_CHARTS if gpu is None else GPU_CHARTS
    draw_charts(charts, device_table(inside, end_unix_s), _NO_MARKS, window_s, _HEIGHT)


def own_gpu(reading: Reading) -> Mapping[str, Any] | None:
    """The GPU that the engine's model is on, else the first; None without any."""
    gpus = reading.get("gpu") or ()
    return next((gpu for gpu in gpus if gpu.get("own")), next(iter(gpus), None))


def describe(reading: Reading, gpu: Mapping[str, Any] | None) -> str:
    """One line: the GPU with its temperature and what holds its clocks back, or the machine and why there is no GPU."""
    if gpu is None:
        cores = reading["system"].get("cpu_count")
        return f"{cores} cores, no GPU: {reading.get('gpu_reason') or 'none was found.'}"
    parts = [str(gpu.get("name") or "GPU")]
    if gpu.get("temperature_c") is not None:
        parts.append(f"{gpu['temperature_c']:.0f} °C")
    if gpu.get("error"):
        parts.append(str(gpu["error"]))
    reasons = gpu.get("throttle_reasons")
    if reasons:
        parts.append(f":orange-badge[held back: {', '.join(reasons)}]")
    return " · ".join(parts)


def device_table(readings: Sequence[Reading], end_unix_s: float) -> pd.DataFrame:
    """One row a reading: ``t`` (seconds before the end, ≤ 0) and what the charts draw; NaN for what was not read."""
    return pd.DataFrame([{"t": reading["time_unix_s"] - end_unix_s, **_values(reading)} for reading in readings])


def _values(reading: Reading) -> dict[str, float | None]:
    gpu = own_gpu(reading)
    process, system = reading["process"], reading["system"]
    if gpu is None:
        return {
            # Of a process 100 is one core; of the machine it is all of them.
            "worker_percent": process["cpu_percent"] / max(system.get("cpu_count") or 1, 1),
            "machine_percent": system["cpu_percent"],
            "worker_gib": process["resident_bytes"] / _GIB,
            "machine_gib": (system["memory_total_bytes"] - system["memory_available_bytes"]) / _GIB,
        }
    used, total = gpu.get("memory_used_bytes"), gpu.get("memory_total_bytes")
    return {
        "gpu_percent": gpu.get("utilization_percent"),
        "memory_percent": gpu.get("memory_utilization_percent"),
        "memory_gib": None if used is None else used / _GIB,
        "memory_total_gib": None if total is None else total / _GIB,
        "power_w": gpu.get("power_w"),
        "power_limit_w": gpu.get("power_limit_w"),
        "sm_clock_mhz": gpu.get("sm_clock_mhz"),
        "memory_clock_mhz": gpu.get("memory_clock_mhz"),
    }
