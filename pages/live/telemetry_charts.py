"""What the hardware does: the engine's GPU or, without one, processor and memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import streamlit as st

from engine.capacity.text import GIB
from engine.telemetry.gpu import own_gpu
from pages.live.charts import Chart, draw_charts
from pages.shared.messages import bytes_text
from pages.shared.text import plain

Sample = Mapping[str, Any]
_BINS = 120
_HEIGHT = 120
#: Title, unit, columns of :func:`values_of` with their labels, and the value that the axis ends at.
_Panel = tuple[str, str, dict[str, str], float | str | None]
GPU_PANELS: tuple[_Panel, ...] = (
    ("GPU use", "% of time", {"gpu_percent": "a kernel ran"}, 100.0),
    ("Memory access", "% of time", {"memory_percent": "memory was read or written"}, 100.0),
    ("GPU memory", "GiB", {"memory_gib": "in use"}, "memory_total_gib"),
    ("Power", "W", {"power_w": "board"}, "power_limit_w"),
    ("Clocks", "MHz", {"sm_clock_mhz": "SM", "memory_clock_mhz": "memory"}, None),
    ("Temperature", "°C", {"temperature_c": "die"}, 100.0),
)
CPU_PANELS: tuple[_Panel, ...] = (
    ("Processor", "% of all cores", {"worker_percent": "worker", "machine_percent": "machine"}, 100.0),
    ("Main memory", "GiB", {"worker_gib": "worker", "machine_gib": "machine"}, "machine_total_gib"),
)


def telemetry_charts(samples: Sequence[Sample], marks: pd.DataFrame, end_unix_s: float, window_s: float) -> None:
    """Draw the charts, and above them which device it is, what holds it back, or why there is no GPU reading.

    Args:
        samples: :class:`engine.telemetry.readings.Sample`, oldest first.
        marks: toggles, see :func:`pages.live.series.event_marks`.
        end_unix_s: right edge, wall clock; window_s: width, seconds.
    """
    if not samples:
        st.caption("Readings of the hardware appear as soon as the worker answers.")
        return
    latest = samples[-1]
    panels, in_a_row = (CPU_PANELS, 2) if own_gpu(latest.get("gpu")) is None else (GPU_PANELS, 3)
    values = values_of(latest)
    st.markdown(headline(latest))
    st.caption(" · ".join(_reading(panel, values) for panel in panels))
    charts = [Chart(title, unit, keys, "line", _end(top, values)) for title, unit, keys, top in panels]
    table = bin_samples(samples, end_unix_s, window_s)
    draw_charts(charts, table, marks, window_s, in_a_row=in_a_row, height=_HEIGHT, labelled=False)


def _end(top: float | str | None, latest: Mapping[str, float | None]) -> float | None:
    return latest.get(top) if isinstance(top, str) else top


def _reading(panel: _Panel, latest: Mapping[str, float | None]) -> str:
    """The newest values as text: ``Power 350 of 700 W``, ``Processor worker 34, machine 99 % of all cores``."""
    title, unit, keys, top = panel
    shown = [_number(latest.get(key)) if len(keys) == 1 else f"{keys[key]} {_number(latest.get(key))}" for key in keys]
    limit = latest.get(top) if isinstance(top, str) else None
    return f"{title} {', '.join(shown)}{'' if limit is None else f' of {_number(limit)}'} {unit}"


def _number(value: float | None) -> str:
    return "not readable," if value is None else f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def headline(sample: Sample) -> str:
    """Markdown: the GPU and what holds its clocks back, or the machine and why no GPU is shown."""
    gpus = sample.get("gpu")
    gpu = own_gpu(gpus)
    if gpu is None:
        system = sample["system"]
        machine = f"**Machine** · {system['cpu_count']} cores, {bytes_text(system['memory_total_bytes'])}"
        if not gpus:
            return f"{machine} · no GPU reading: {plain(sample.get('gpu_reason') or 'there is no NVIDIA GPU.')}"
        return f"{machine} · the model is not on a GPU; {plain(', '.join(map(_other_gpu, gpus)))}"
    parts = [f"**{plain(gpu['name'] or 'GPU')}** · GPU {gpu['index']} of NVML"]
    if gpu["error"]:
        parts.append(f":red-badge[cannot be read: {plain(gpu['error'])}]")
    parts += [f":orange-badge[clocks held back: {plain(reason)}]" for reason in gpu["throttle_reasons"] or ()]
    return " ".join(parts)


def _other_gpu(gpu: Mapping[str, Any]) -> str:
    facts = [
        f"{gpu[key]:.0f} {unit}"
        for key, unit in (("power_w", "W"), ("utilization_percent", "% busy"))
        if gpu[key] is not None
    ]
    return f"GPU {gpu['index']} ({gpu['name'] or 'no name'}){': ' if facts else ''}{', '.join(facts)}"


def values_of(sample: Sample) -> dict[str, float | None]:
    """What the panels draw of a sample, in their units; None for what could not be read."""
    process, system = sample["process"], sample["system"]
    values: dict[str, float | None] = {
        "worker_percent": process["cpu_percent"] / max(system["cpu_count"] or 1, 1),  # of a process 100 is one core
        "machine_percent": system["cpu_percent"],
        "worker_gib": process["resident_bytes"] / GIB,
        "machine_gib": (system["memory_total_bytes"] - system["memory_available_bytes"]) / GIB,
        "machine_total_gib": system["memory_total_bytes"] / GIB,
    }
    gpu = own_gpu(sample.get("gpu"))
    if gpu is not None:
        used, total = gpu["memory_used_bytes"], gpu["memory_total_bytes"]
        values |= {
            "gpu_percent": gpu["utilization_percent"],
            "memory_percent": gpu["memory_utilization_percent"],
            "memory_gib": None if used is None else used / GIB,
            "memory_total_gib": None if total is None else total / GIB,
            "power_w": gpu["power_w"],
            "power_limit_w": gpu["power_limit_w"],
            "sm_clock_mhz": gpu["sm_clock_mhz"],
            "memory_clock_mhz": gpu["memory_clock_mhz"],
            "temperature_c": gpu["temperature_c"],
        }
    return values


def bin_samples(samples: Sequence[Sample], end_unix_s: float, window_s: float) -> pd.DataFrame:
    """Means in equal bins of time, a row for each bin in which something was read, oldest first.

    Args:
        samples: in any order; those outside of the window are left out.
        end_unix_s: right edge, wall clock; window_s: width, seconds.

    Returns:
        ``t``, the bin's right edge in seconds before the end (≤ 0), and the columns of :func:`values_of`; NaN for what
        was not read.
    """
    start, width = end_unix_s - window_s, window_s / _BINS
    inside = [sample for sample in samples if start < sample["time_unix_s"] <= end_unix_s]
    columns = dict.fromkeys(key for _, _, keys, _ in (*GPU_PANELS, *CPU_PANELS) for key in keys)
    rows = pd.DataFrame([values_of(sample) for sample in inside], columns=list(columns), dtype=float)
    slots = [min(int((sample["time_unix_s"] - start) / width), _BINS - 1) for sample in inside]
    means = rows.groupby(pd.Series(slots, dtype=int)).mean()
    means.insert(0, "t", -window_s + width * (means.index.to_numpy() + 1))
    return means.reset_index(drop=True)
