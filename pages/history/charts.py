"""Charts of recorded runs: time series with event marks, distributions, the timeline of requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import altair as alt
import numpy as np
import pandas as pd

from engine.measure.results import EventRecord, RequestRecord, RunResult, SampleRecord
from engine.outputs import EngineEvent
from pages.shared.series import long, short_label

AnyChart = TypeVar("AnyChart", alt.Chart, alt.LayerChart)
_MARK_COLOR = "#f43f5e"
_BINS = 32
_AXIS_AND_LEGEND = 110  # pixels that the page takes from a chart's height for what stands around the bars
_CURVE_POINTS = 300
_EVENT_KINDS = ("reconfigure", "load", "error")
PERCENTILES = (50, 99)
PHASES = ("until the first token", "generating")


def samples_table(samples: Sequence[SampleRecord]) -> pd.DataFrame:
    """The samples as columns; ``t`` in seconds from the run's start."""
    names = [*SampleRecord.__slots__]
    return pd.DataFrame([[getattr(sample, name) for name in names] for sample in samples], columns=names).rename(
        columns={"t_s": "t"}
    )


def marks_table(events: Sequence[EventRecord]) -> pd.DataFrame:
    """Toggles, loads and errors as rows of ``t``, ``label`` (short) and ``summary``."""
    rows = [
        {
            "t": event.t_s,
            "label": short_label(EngineEvent(0, 0.0, event.kind, event.summary, event.detail)),
            "summary": event.summary,
        }
        for event in events
        if event.kind in _EVENT_KINDS
    ]
    return pd.DataFrame(rows, columns=["t", "label", "summary"])


def time_chart(
    table: pd.DataFrame, columns: Mapping[str, str], marks: pd.DataFrame, *, stacked: bool = False, labels: bool = False
) -> alt.LayerChart:
    """Columns of :func:`samples_table` over time, with a dashed line at each event (``labels``: and its name)."""
    names = list(columns.values())
    data = long(table, dict(columns)).dropna()
    data["order"] = data["series"].map(names.index)  # the first name at the bottom of a stack
    step = 1 if stacked else alt.Undefined  # what is stacked is counted: there is no half a request
    axis = alt.Axis(title=None, tickCount=4, tickMinStep=step)
    y = alt.Y("value:Q", axis=axis, stack="zero" if stacked else None)
    base = alt.Chart(data)
    # Requests and blocks hold their value until the next sample; a rate belongs to the whole interval.
    drawn = (
        base.mark_area(opacity=0.75, interpolate="step-after")
        if stacked
        else base.mark_line(strokeWidth=1.8, interpolate="monotone")
    )
    tooltip = [
        alt.Tooltip("series:N", title="series"),
        alt.Tooltip("value:Q", title="value", format=",.1f"),
        alt.Tooltip("t:Q", title="seconds", format=".1f"),
    ]
    lines = drawn.encode(x=_seconds("t:Q", table), y=y, color=_color(names), tooltip=tooltip)
    if stacked:
        lines = lines.encode(order="order:Q")
    return _framed(alt.layer(lines, *_rules(marks, table, labels)), 170)


def histogram(values: Sequence[float], unit: str = "ms") -> alt.LayerChart:
    """How often which value occurs, with dashed lines at :data:`PERCENTILES`."""
    counts, edges = np.histogram(np.asarray(values, dtype=float), bins=min(_BINS, max(6, len(values) // 2)))
    data = pd.DataFrame({"low": edges[:-1], "high": edges[1:], "count": counts, "floor": 0})
    scale = alt.Scale(domain=[float(edges[0]), float(edges[-1])], nice=False, zero=False)
    x = alt.X("low:Q", axis=alt.Axis(title=None, tickCount=6, grid=False), scale=scale)
    bars = (
        alt.Chart(data)
        .mark_bar(opacity=0.8, binSpacing=1)
        .encode(
            x=x,
            x2="high:Q",
            y=alt.Y("count:Q", axis=alt.Axis(title=None, tickCount=3, tickMinStep=1)),
            y2="floor:Q",
            tooltip=[
                alt.Tooltip("low:Q", title=f"from, {unit}", format=",.1f"),
                alt.Tooltip("high:Q", title=f"to, {unit}", format=",.1f"),
                alt.Tooltip("count:Q", title="how many"),
            ],
        )
    )
    quantiles = pd.DataFrame({"low": np.percentile(values, PERCENTILES), "name": [f"p{n}" for n in PERCENTILES]})
    tooltip = [alt.Tooltip("name:N", title="percentile"), alt.Tooltip("low:Q", title=unit, format=",.1f")]
    rules = alt.Chart(quantiles).mark_rule(strokeDash=[4, 3], color=_MARK_COLOR, strokeWidth=1.5)
    return _framed(alt.layer(bars, rules.encode(x=x, tooltip=tooltip)), 150)


def distribution_curves(values: Mapping[str, Sequence[float]], unit: str = "ms") -> alt.Chart:
    """Cumulative distributions, one curve a name: the share of values at or below x."""
    frames = [_curve(name, sorted(found)) for name, found in values.items() if len(found)]
    data = pd.concat(frames) if frames else pd.DataFrame(columns=["series", "value", "share"])
    curve = (
        alt.Chart(data)
        .mark_line(strokeWidth=2, interpolate="step-after")
        .encode(
            x=alt.X("value:Q", axis=alt.Axis(title=unit, grid=False), scale=alt.Scale(nice=False)),
            y=alt.Y("share:Q", axis=alt.Axis(title=None, format="%", tickCount=5), scale=alt.Scale(domain=[0, 1])),
            color=_color(list(values)),
            tooltip=[
                alt.Tooltip("series:N", title="run"),
                alt.Tooltip("value:Q", title=unit, format=",.1f"),
                alt.Tooltip("share:Q", title="share at or below", format=".1%"),
            ],
        )
    )
    return _framed(curve, 260)


def throughput_curves(tables: Mapping[str, pd.DataFrame]) -> alt.Chart:
    """Output tokens per second over the time of each run, one curve a name."""
    frames = [table.assign(series=name) for name, table in tables.items() if not table.empty]
    data = pd.concat(frames) if frames else pd.DataFrame(columns=["series", "t", "output_tokens_s"])
    curve = (
        alt.Chart(data)
        .mark_line(strokeWidth=1.8, interpolate="monotone", opacity=0.9)
        .encode(
            x=_seconds("t:Q", data),
            y=alt.Y("output_tokens_s:Q", axis=alt.Axis(title=None, tickCount=5)),
            color=_color(list(tables)),
            tooltip=[
                alt.Tooltip("series:N", title="run"),
                alt.Tooltip("output_tokens_s:Q", title="tokens/s", format=",.1f"),
                alt.Tooltip("t:Q", title="seconds", format=".1f"),
            ],
        )
    )
    return _framed(curve, 260)


def request_timeline(requests: Sequence[RequestRecord]) -> alt.Chart:
    """A bar a request: from its arrival to its first token, and from there to its last."""
    data = pd.DataFrame([row for place, request in enumerate(requests) for row in _phases(place, request)])
    height = int(np.clip(11 * len(requests), 60, 500)) + _AXIS_AND_LEGEND
    y = alt.Y("place:O", axis=alt.Axis(title="request", labels=len(requests) <= 40, ticks=False, grid=False))
    bars = (
        alt.Chart(data)
        .mark_bar(height={"band": 0.8})
        .encode(
            x=alt.X("start:Q", axis=alt.Axis(title="seconds since the start of the run", grid=True, tickCount=10)),
            x2="end:Q",
            y=y,
            color=_color(list(PHASES), offset=8),
            tooltip=[alt.Tooltip(f"{name}:N", title=title) for name, title in _TIMELINE_TOOLTIP.items()],
        )
    )
    return _framed(bars, height)


_TIMELINE_TOOLTIP = {
    "request": "request",
    "phase": "phase",
    "milliseconds": "ms",
    "prompt": "prompt tokens",
    "cached": "of them cached",
    "output": "output tokens",
    "finish": "finish",
    "preemptions": "preemptions",
}


def _phases(place: int, request: RequestRecord) -> list[dict[str, Any]]:
    end_s = request.arrival_s + (request.e2e_ms or request.ttft_ms or 0.0) / 1e3
    first_s = request.arrival_s + request.ttft_ms / 1e3 if request.ttft_ms is not None else end_s
    facts = {
        "place": place,
        "request": request.index,
        "prompt": request.prompt_tokens,
        "cached": request.cached_tokens,
        "output": request.output_tokens,
        "finish": request.error or request.finish_reason,
        "preemptions": request.preemptions,
    }
    spans = zip(PHASES, ((request.arrival_s, first_s), (first_s, end_s)), strict=True)
    return [
        {
            **facts,
            "series": phase,
            "phase": phase,
            "start": start,
            "end": end,
            "milliseconds": round(1e3 * (end - start), 1),
        }
        for phase, (start, end) in spans
    ]


def latencies(run: RunResult) -> dict[str, list[float]]:
    """TTFT, TPOT, ITL and E2E of a run's requests, milliseconds, as the metrics count them."""
    requests = [request for request in run.requests if request.finish_reason in ("stop", "length")]
    return {
        "TTFT": [request.ttft_ms for request in requests if request.ttft_ms is not None],
        "TPOT": [request.tpot_ms for request in requests if request.tpot_ms is not None],
        "ITL": [gap for request in requests for gap in request.itl_ms],
        "E2E": [request.e2e_ms for request in requests if request.e2e_ms is not None],
    }


def _curve(name: str, ordered: Sequence[float]) -> pd.DataFrame:
    """The cumulative distribution, thinned to what a screen can show."""
    places = np.unique(np.linspace(0, len(ordered) - 1, _CURVE_POINTS).round().astype(int))
    values = [ordered[place] for place in places]
    return pd.DataFrame({"series": name, "value": values, "share": (places + 1) / len(ordered)})


def _seconds(field: str, table: pd.DataFrame) -> alt.X:
    end = float(table["t"].max()) if len(table) else 1.0
    axis = alt.Axis(title=None, labelExpr="datum.value + ' s'", tickCount=6, grid=False)
    return alt.X(field, axis=axis, scale=alt.Scale(domain=[0, end], nice=False))


def _color(names: list[str], offset: int = 0) -> alt.Color:
    legend = alt.Legend(title=None, orient="top", direction="horizontal", offset=offset, padding=0, labelLimit=260)
    return alt.Color("series:N", sort=names, scale=alt.Scale(domain=names), legend=legend)


def _rules(marks: pd.DataFrame, table: pd.DataFrame, labels: bool) -> list[alt.Chart]:
    base = alt.Chart(marks).encode(x=_seconds("t:Q", table), tooltip=["summary:N"])
    rule = base.mark_rule(strokeDash=[3, 3], color=_MARK_COLOR, opacity=0.8)
    if not labels:
        return [rule]
    text = base.mark_text(align="left", baseline="top", dx=3, fontSize=10, color=_MARK_COLOR)
    return [rule, text.encode(y=alt.value(2), text="label:N")]


def _framed(chart: AnyChart, height: int) -> AnyChart:
    framed: AnyChart = chart.properties(height=height).configure_view(strokeWidth=0)
    return framed
