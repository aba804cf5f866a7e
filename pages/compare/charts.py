"""Charts of a comparison: the ratio of each metric with its interval, and every single run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import streamlit as st

from engine.measure.comparison import MetricComparison, compare
from engine.measure.results import RunResult

#: The metrics of the interval chart, in its order; all others are in the table.
_HEADLINES = (
    "output_tokens_s",
    "goodput_requests_s",
    "ttft_ms_p50",
    "ttft_ms_p99",
    "tpot_ms_mean",
    "itl_ms_p99",
    "e2e_ms_p50",
    "step_ms_mean",
    "energy_per_output_token_j",
    "net_energy_per_output_token_j",
    "weights_bytes",
    "resident_bytes_peak",
)
_POINTS = ("output_tokens_s", "ttft_ms_p50", "tpot_ms_mean", "e2e_ms_p50")
_COLORS = {"B is better": "#0d9488", "A is better": "#db2777", "no difference shown": "#94a3b8", "neither": "#6366f1"}
_LADDERS = (
    (0.001, 0.01, 0.1, 1, 10, 100, 1000),
    (0.1, 0.25, 0.5, 1, 2, 4, 10),
    (0.25, 0.5, 0.7, 1, 1.4, 2, 3),
    (0.7, 0.8, 0.9, 1, 1.1, 1.25, 1.5),
    (0.9, 0.95, 0.98, 1, 1.02, 1.05, 1.1),
)


def interval_chart(compared: Sequence[MetricComparison]) -> None:
    """Ratio B/A of each headline metric with its 95 % interval, on a logarithmic axis around 1."""
    headlines = [item for item in compared if item.metric in _HEADLINES]
    st.markdown("**B compared with A** :small[:gray[ratio with 95 % interval; left of 1 is less, right is more]]")
    rows = [
        {
            "metric": item.label,
            "ratio": item.ratio,
            "low": item.ci_low if item.ci_low is not None else item.ratio,
            "high": item.ci_high if item.ci_high is not None else item.ratio,
            "result": result_label(item),
            "text": f"{item.ratio:.2f}×",
            "verdict": item.verdict,
        }
        for item in sorted(headlines, key=lambda item: _HEADLINES.index(item.metric))
        if item.ratio is not None
    ]
    if rows:
        st.vega_lite_chart(_interval_spec(rows), width="stretch", key="compare-intervals")


def _interval_spec(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A dot and a bar a metric around the line of "no difference"."""
    shown = [word for word in _COLORS if any(row["result"] == word for row in rows)]
    scale = {"domain": list(_COLORS), "range": list(_COLORS.values())}
    legend = {"title": None, "orient": "bottom", "values": shown, "symbolOpacity": 1}
    color = {"field": "result", "type": "nominal", "scale": scale, "legend": legend}
    log = {"type": "log", "nice": False, "padding": 28}
    x = {"field": "ratio", "type": "quantitative", "scale": log, "axis": _ratio_axis(rows)}
    names = [row["metric"] for row in rows]
    y = {"field": "metric", "type": "nominal", "sort": names, "axis": {"title": None, "labelLimit": 220, "grid": False}}
    tooltip = [{"field": name} for name in ("metric", "text", "verdict")]
    low, high = {"field": "low", "type": "quantitative", "title": None}, {"field": "high"}
    one = {"type": "rule", "strokeDash": [4, 3], "color": "#94a3b8"}
    bar, dot = {"type": "rule", "strokeWidth": 4, "opacity": 0.45}, {"type": "circle", "size": 90, "opacity": 1}
    return {
        "data": {"values": rows},
        "height": {"step": 36},
        "config": {"view": {"strokeWidth": 0}},
        "layer": [
            {"data": {"values": [{"ratio": 1.0}]}, "mark": one, "encoding": {"x": x}},
            {"mark": bar, "encoding": {"x": low, "x2": high, "y": y, "color": color, "tooltip": tooltip}},
            {"mark": dot, "encoding": {"x": x, "y": y, "color": color, "tooltip": tooltip}},
            {
                "mark": {"type": "text", "dy": -11, "fontSize": 11},
                "encoding": {"x": x, "y": y, "text": {"field": "text"}, "color": color},
            },
        ],
    }


def _ratio_axis(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Round ratios inside the range, from the coarsest ladder that has three of them."""
    low, high = min(1.0, *(row["low"] for row in rows)), max(1.0, *(row["high"] for row in rows))
    for ladder in _LADDERS:
        inside = [step for step in ladder if low * 0.99 <= step <= high * 1.01]
        if len(inside) >= 3:
            break
    return {"title": None, "values": inside, "labelExpr": "datum.value + '×'", "grid": False, "labelOverlap": False}


def result_label(item: MetricComparison) -> str:
    """The colour class of a metric: who is better, or that no difference was shown."""
    if item.better is not None:
        return f"{item.better} is better"
    shown = item.ci_low is not None and item.ci_high is not None and not item.ci_low <= 1.0 <= item.ci_high
    return "neither" if shown and item.higher_is_better is None else "no difference shown"


def single_runs(runs_a: Sequence[RunResult], runs_b: Sequence[RunResult]) -> None:
    """Every run as a point; the two runs of a repeat are joined, since they had the same requests."""
    st.markdown("**Single runs** :small[:gray[a line joins the two runs of a repeat]]")
    measured = [compare(runs_a, runs_b, metric) for metric in _POINTS]
    measured = [item for item in measured if item.values_a and item.values_b]
    for row in range(0, len(measured), 2):
        for column, item in zip(st.columns(2), measured[row : row + 2], strict=False):
            column.markdown(f":small[{item.label}, {item.unit}]")
            column.vega_lite_chart(_pairs(item), width="stretch", key=f"pairs-{item.metric}")


def _pairs(item: MetricComparison) -> dict[str, Any]:
    rows = [
        {"setting": arm, "value": value, "repeat": index + 1}
        for arm, values in (("A", item.values_a), ("B", item.values_b))
        for index, value in enumerate(values)
    ]
    x = {"field": "setting", "type": "nominal", "axis": {"title": None, "labelAngle": 0}, "scale": {"padding": 0.5}}
    y = {"field": "value", "type": "quantitative", "axis": {"title": None, "tickCount": 4}, "scale": {"zero": False}}
    color = {"field": "setting", "type": "nominal", "scale": {"domain": ["A", "B"]}, "legend": None}
    tooltip = [{"field": "setting"}, {"field": "repeat"}, {"field": "value", "type": "quantitative", "format": ",.2f"}]
    line = {"type": "line", "strokeWidth": 1, "opacity": 0.35, "color": "#94a3b8"}
    lines = {"mark": line, "encoding": {"x": x, "y": y, "detail": {"field": "repeat", "type": "nominal"}}}
    point = {"type": "circle", "size": 55, "opacity": 0.9}
    points = {"mark": point, "encoding": {"x": x, "y": y, "color": color, "tooltip": tooltip}}
    return {"data": {"values": rows}, "height": 130, "layer": [lines, points] if item.paired else [points]}
