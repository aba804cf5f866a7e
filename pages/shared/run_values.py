"""Runs as text: metrics with their units, the setting as what was changed, names for tables and legends."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from datetime import datetime, tzinfo
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import streamlit as st

from engine.config import knobs
from engine.measure.metrics import METRICS, MetricInfo
from engine.measure.results import RunResult
from pages.shared.messages import bytes_text, value_text
from pages.shared.text import plain
from storage import RunRow

HEADLINES = ("output_tokens_s", "ttft_ms_p50", "tpot_ms_mean", "itl_ms_p99", "e2e_ms_p50", "resident_bytes_peak")
QUALITY = ("perplexity", "perplexity_se", "kl_mean_nats", "kl_p99_nats", "same_top_percent")
RATIOS = ("slo_attainment", "acceptance_rate", "prefix_hit_rate")
DISTURBED, UNSHOWABLE = "disturbed", "cannot be shown"
STATUS_COLORS = {
    "completed": "green",
    "running": "blue",
    "cancelled": "orange",
    "failed": "red",
    DISTURBED: "orange",
    UNSHOWABLE: "red",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Knobs:
    """Labels and defaults of the knobs, by name."""

    labels: Mapping[str, str]
    defaults: Mapping[str, Any]
    groups: Mapping[str, str]


@functools.cache
def known_knobs() -> Knobs:
    """The knobs of this version of the engine."""
    all_knobs = knobs()
    return Knobs(
        labels={knob.name: knob.label for knob in all_knobs},
        defaults={knob.name: knob.default for knob in all_knobs},
        groups={knob.name: knob.group for knob in all_knobs},
    )


def metric_info(name: str) -> MetricInfo:
    """How to show a metric; one that this version does not know keeps its bare name."""
    return METRICS.get(name) or MetricInfo(name, "", None, "Not known to this version of Headroom.")


def metric_text(name: str, value: float | None) -> str:
    """A metric with its unit.

    >>> metric_text("output_tokens_s", 412.345), metric_text("prefix_hit_rate", 0.5), metric_text("ttft_ms_p50", None)
    ('412 tokens/s', '50.0 %', '–')
    """
    if value is None:
        return "–"
    unit = metric_info(name).unit
    if unit == "bytes":
        return bytes_text(value)
    if name in RATIOS:
        return f"{100 * value:.1f} %"
    return f"{number_text(value)} {unit}".rstrip()


def reference_text(run: RunRow | RunResult) -> str:
    """What the figures of quality are measured against; "" where none was measured."""
    if not any(run.metrics.get(name) is not None for name in QUALITY):
        return ""
    return run.quality_reference or "not recorded"


def number_text(value: float) -> str:
    """A number with three to four telling digits; a whole number as it is.

    >>> number_text(1234.5), number_text(56.78), number_text(0.01234), number_text(12.0)
    ('1,234', '56.8', '0.0123', '12')
    """
    if value == int(value) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"


def changed_knobs(config: Mapping[str, Any]) -> dict[str, Any]:
    """The knobs of a configuration that are not at their default; the model has a column of its own."""
    defaults = known_knobs().defaults
    return {name: value for name, value in config.items() if name != "model" and (name, value) not in defaults.items()}


def setting_labels(config: Mapping[str, Any]) -> list[str]:
    """The setting as its changes, one phrase a knob: ``["weights int4", "batching static"]``."""
    return [f"{name.replace('_', ' ')} {value_text(value)}" for name, value in changed_knobs(config).items()]


def status_labels(run: RunRow) -> list[str]:
    """How a run ended, and whether something else happened meanwhile: chips of its row."""
    if run.unshowable is not None:
        return [UNSHOWABLE]
    return [run.status, DISTURBED] if run.disturbed else [run.status]


def disturbance_lines(run: RunRow | RunResult) -> list[str]:
    """What disturbed a run, each with its second of the run, as Markdown."""
    entries = sorted(run.disturbed, key=lambda entry: entry["time_unix_s"])
    return [f"after {entry['time_unix_s'] - run.started_unix_s:,.1f} s: {plain(entry['what'])}" for entry in entries]


def run_name(run: RunRow | RunResult) -> str:
    """A run in a few words, for headings and lists."""
    if isinstance(run, RunRow) and run.unshowable is not None:
        return run.label or f"run {run.run_id[:12]}"
    arm = f"{run.arm}{'' if run.repeat is None else run.repeat + 1}" if run.arm else ""
    parts = [run.label or str(run.provenance.workload.get("name", "")) or "run", arm]
    return " · ".join(part for part in parts if part)


def code_text(revision: str, dirty: bool | None) -> str:
    """A code revision as people write it.

    >>> code_text("b930249d1c2a", True), code_text("", None)
    ('b930249 + changes', '–')
    """
    if not revision:
        return "–"
    return revision[:7] + (" + changes" if dirty else "")


def reader_timezone() -> tzinfo | None:
    """The time zone of the reader's browser; None (this computer's) where it is not known."""
    try:
        name = st.context.timezone
        return ZoneInfo(name) if name else None
    except (ZoneInfoNotFoundError, ValueError):
        return None


def moment_text(unix_s: float) -> str:
    """A moment on the reader's clock."""
    return datetime.fromtimestamp(unix_s).astimezone(reader_timezone()).strftime("%d %b %Y, %H:%M:%S")
