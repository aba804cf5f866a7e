"""The live charts: what the engine did in the last minutes, with a mark at each toggle.

Time runs from left (past) to right (the last step); the axis counts seconds before it, so that a chart's
specification stays the same between refreshes and only its data is swapped. The specifications are plain Vega-Lite:
they are drawn every second, and building them through Altair's checked classes takes a hundred times longer.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import pandas as pd
import streamlit as st

from pages.shared.series import long

_HEIGHT = 165
_MARKS_SHOWN = 4
_MARK_COLOR = "#f43f5e"
Spec = dict[str, Any]


class Chart(NamedTuple):
    """One chart over the columns of a table.

    Attributes:
        title, unit: above the chart.
        columns: column of the table to its label.
        kind: a key of ``_MARK_OF``.
        top: where the value axis ends, unless a value is higher; None for the highest value.
    """

    title: str
    unit: str
    columns: dict[str, str]
    kind: str
    top: float | None = None


def live_charts(table: pd.DataFrame, marks: pd.DataFrame, window_s: float) -> None:
    """Draw the six charts, two in a row, from :func:`pages.live.series.bin_steps` and its marks."""
    draw_charts(_CHARTS, table, marks, window_s)


def draw_charts(
    charts: Sequence[Chart],
    table: pd.DataFrame,
    marks: pd.DataFrame,
    window_s: float,
    *,
    in_a_row: int = 2,
    height: int = _HEIGHT,
    labelled: bool = True,
) -> None:
    """Draw charts of one window of time.

    Args:
        table: with ``t``, seconds before the end (≤ 0), and every chart's columns.
        marks: see :func:`pages.live.series.event_marks`; they have labels in the first chart if ``labelled``.
        height: of a chart, pixels.
    """
    for row in range(0, len(charts), in_a_row):
        for column, chart in zip(st.columns(in_a_row), charts[row : row + in_a_row], strict=False):
            with column:
                st.markdown(f"**{chart.title}** :small[:gray[{chart.unit}]]")
                data = {"series": long(table, chart.columns), "marks": _placed(marks, window_s)}
                labels = tuple(chart.columns.values())
                spec = _spec(chart.kind, labels, window_s, labelled and chart is charts[0], chart.top)
                spec = {**spec, "height": height, "datasets": data}
                st.vega_lite_chart(spec, width="stretch", key=f"live-{chart.title}")


_CHARTS = (
    Chart("Throughput", "tokens/s", {"output_tokens_s": "output", "total_tokens_s": "with prompts"}, "line"),
    Chart("Requests", "running and waiting", {"running": "running", "waiting": "waiting"}, "steps"),
    Chart("Tokens computed", "tokens/s", {"decode": "decode", "prefill": "prefill", "draft": "drafts"}, "area"),
    Chart("Step time", "ms", {"step_mean_ms": "mean", "step_max_ms": "longest"}, "gaps"),
    Chart(
        "Prefix hits and draft acceptance",
        "%",
        {"prefix_hit": "prefix hits", "acceptance": "accepted drafts"},
        "points",
        100.0,
    ),
    Chart("Preemptions", "requests", {"preempted": "preempted"}, "bar"),
)
_MARK_OF: dict[str, Spec] = {
    "line": {"type": "line", "strokeWidth": 1.8, "interpolate": "monotone"},
    "gaps": {"type": "line", "strokeWidth": 1.8, "point": {"size": 7}},
    "area": {"type": "area", "opacity": 0.75},
    "steps": {"type": "area", "opacity": 0.75, "interpolate": "step-before"},
    "points": {"type": "circle", "size": 26, "opacity": 0.85},
    "bar": {"type": "bar"},
}


@functools.cache
def _spec(kind: str, labels: tuple[str, ...], window_s: float, labelled: bool, top: float | None) -> Spec:
    """The specification of a chart without its data and height."""
    y: Spec = {"field": "value", "type": "quantitative", "axis": {"title": None, "tickCount": 4}}
    if top is not None:
        y["scale"] = {"domain": {"unionWith": [0, top]}, "nice": False}
        y["axis"] = {"title": None, "values": [0, top / 2, top], "format": ",.3~r"}
    elif kind == "bar":
        y |= {"scale": {"domain": {"unionWith": [0, 1]}}, "axis": {"title": None, "tickMinStep": 1, "format": "d"}}
    elif kind == "steps":
        y["axis"] = {"title": None, "tickCount": 4, "tickMinStep": 1, "format": "d"}  # there is no half a request
    y["stack"] = "zero" if kind in ("area", "steps") else None
    series = {
        "data": {"name": "series"},
        "mark": {**_MARK_OF[kind], "clip": True},
        "encoding": {"x": _x(window_s), "y": y, "color": _color(labels), "tooltip": _TOOLTIP},
    }
    return {
        "layer": [series, *_marks(window_s, labelled)],
        "resolve": {"scale": {"y": "independent"}},
        "config": {"view": {"strokeWidth": 0}},
    }


_TOOLTIP = [
    {"field": "series", "title": "series"},
    {"field": "value", "type": "quantitative", "title": "value", "format": ",.1f"},
    {"field": "t", "type": "quantitative", "title": "seconds before the end", "format": ".0f"},
]


def _x(window_s: float) -> Spec:
    label_expr = "datum.value == 0 ? 'now' : datum.value <= -120 ? datum.value / 60 + ' min' : datum.value + ' s'"
    ticks = [-window_s * part / 4 for part in range(4, -1, -1)]
    axis = {"title": None, "labelExpr": label_expr, "values": ticks, "grid": False, "labelFlush": True}
    return {"field": "t", "type": "quantitative", "axis": axis, "scale": {"domain": [-window_s, 0], "nice": False}}


def _color(labels: tuple[str, ...]) -> Spec:
    top = {"title": None, "orient": "top", "direction": "horizontal", "offset": 0, "padding": 0}
    legend = top if len(labels) > 1 else None  # the title names a single one
    return {"field": "series", "type": "nominal", "scale": {"domain": list(labels)}, "legend": legend}


def _marks(window_s: float, labelled: bool) -> list[Spec]:
    """A dashed line at each toggle; in the first chart with labels, towards the middle so that none is cut."""
    x, tooltip = _x(window_s), [{"field": "summary", "title": "event"}]
    rule = {"type": "rule", "strokeDash": [3, 3], "color": _MARK_COLOR, "opacity": 0.8}
    layers: list[Spec] = [{"data": {"name": "marks"}, "mark": rule, "encoding": {"x": x, "tooltip": tooltip}}]
    if not labelled:
        return layers
    line = {"field": "line", "type": "quantitative", "axis": None, "scale": {"domain": [0, 6], "reverse": True}}
    for align, shift, side in (("right", -4, "datum.t > {}"), ("left", 4, "datum.t <= {}")):
        text = {"type": "text", "align": align, "baseline": "top", "dx": shift, "fontSize": 10, "color": _MARK_COLOR}
        layers.append(
            {
                "data": {"name": "marks"},
                "transform": [{"filter": f"datum.line >= 0 && {side.format(-window_s / 2)}"}],
                "mark": text,
                "encoding": {"x": x, "y": line, "text": {"field": "label"}, "tooltip": tooltip},
            }
        )
    return layers


def _placed(marks: pd.DataFrame, window_s: float) -> pd.DataFrame:
    """The marks with the line their label stands on; -1 for the older ones, which get none."""
    skipped = max(len(marks) - _MARKS_SHOWN, 0)
    return marks.assign(line=[max(place - skipped, -1) for place in range(len(marks))])
