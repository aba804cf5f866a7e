"""The roofline of one GPU with the operators of a step at the planned load."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import altair as alt
import pandas as pd
import streamlit as st

from engine.capacity import Deployment
from engine.capacity.speed.serving import Serving

_HEIGHT = 370
_ROOF, _STEP = "#94a3b8", "#6366f1"
_BOUNDS = {"memory": "#0d9488", "compute": "#d97706"}
_LEAST, _MOST = 0.25, 4096.0
#: Operators closer than this in the logarithm of both axes share a label.
_ONE_SPOT = 0.7


def operator_table(serving: Serving, running: float, prefill: float = 0.0) -> pd.DataFrame:
    """One row an operator: ``name``, ``intensity`` (FLOP a byte), ``tflops`` reached, ``ms``, ``share`` of the step,
    ``bound``."""
    operators = serving.operators(running, prefill)
    total = sum(item.seconds for item in operators)
    rows = [
        {
            "name": item.name,
            "intensity": item.intensity,
            "tflops": item.flops / item.seconds / 1e12 if item.seconds else 0.0,
            "ms": 1e3 * item.seconds,
            "share": item.seconds / total,
            "bound": item.bound,
        }
        for item in operators
    ]
    return pd.DataFrame(rows)


def roofline_chart(found: Deployment) -> None:
    """Draw the roof, each operator of a decode step, and the whole step as the operating point."""
    if found.serving is None or found.point is None:
        return
    st.markdown("**Roofline of a step that decodes**")
    table = operator_table(found.serving, found.point.running)
    st.altair_chart(_chart(found.serving, table), width="stretch", key="plan-roofline")
    largest = table.head(4)
    top = ", ".join(f"{name} {share:.0%}" for name, share in zip(largest["name"], largest["share"], strict=True))
    st.caption(f"{table['ms'].sum():,.1f} ms with {found.point.running:,.0f} requests on each copy: {top}.")


def _chart(serving: Serving, table: pd.DataFrame) -> alt.LayerChart:
    model = serving.model
    peak, bandwidth = model.peak_flops / 1e12, model.bandwidth / 1e12
    ridge = peak / bandwidth
    roof = pd.DataFrame({"intensity": [_LEAST, ridge, _MOST], "tflops": [_LEAST * bandwidth, peak, peak]})
    x = alt.X(
        "intensity:Q",
        scale=alt.Scale(type="log", domain=[_LEAST, _MOST], clamp=True),
        axis=alt.Axis(title="FLOP per byte moved", grid=False, values=[1, 10, 100, 1000], format=",d"),
    )
    heights = alt.Scale(type="log", domain=[_LEAST * bandwidth, peak * 2.5], clamp=True, nice=False)
    y = alt.Y(
        "tflops:Q",
        scale=heights,
        axis=alt.Axis(title="TFLOP/s reached", gridOpacity=0.4, values=[0.1, 1, 10, 100, 1000, 10000], format=",~g"),
    )
    worked = table[(table["intensity"] > 0) & (table["tflops"] > 0)]
    tips = [
        alt.Tooltip("name:N", title="operator"),
        alt.Tooltip("ms:Q", title="ms of the step", format=",.2f"),
        alt.Tooltip("share:Q", title="share of the step", format=".0%"),
        alt.Tooltip("intensity:Q", title="FLOP per byte", format=",.1f"),
        alt.Tooltip("bound:N", title="limited by"),
    ]
    color = alt.Color(
        "bound:N",
        scale=alt.Scale(domain=list(_BOUNDS), range=list(_BOUNDS.values())),
        legend=alt.Legend(
            title=None,
            orient="top",
            labelExpr="'limited by ' + (datum.label == 'compute' ? 'arithmetic' : datum.label)",
        ),
    )
    size = alt.Size("ms:Q", scale=alt.Scale(range=[50, 420]), legend=None)
    line = alt.Chart(roof).mark_line(color=_ROOF, strokeWidth=2.5).encode(x=x, y=y)
    dots = alt.Chart(worked).mark_circle(opacity=0.85).encode(x=x, y=y, color=color, size=size, tooltip=tips)
    labels = alt.Chart(_labels(worked)).mark_text(
        align="left", dx=15, dy=7, color="#8b95a1", fontSize=11, lineBreak="\n"
    )
    name = labels.encode(x=x, y=y, text="name:N")
    return alt.layer(line, dots, name, _whole(table, x, y)).properties(height=_HEIGHT)


def _labels(table: pd.DataFrame) -> pd.DataFrame:
    """One label a spot of the roof: operators that lie on one another are named together, the longest first."""
    spots: list[dict[str, Any]] = []
    for row in table.sort_values("ms", ascending=False).to_dict("records"):
        near = next((spot for spot in spots if _near(spot, row)), None)
        if near is None:
            spots.append({"name": row["name"], "intensity": row["intensity"], "tflops": row["tflops"]})
        else:
            near["name"] += f",\n{row['name']}"  # in lines: the right edge is near
    return pd.DataFrame(spots, columns=["name", "intensity", "tflops"])


def _near(first: Mapping[Any, Any], second: Mapping[Any, Any]) -> bool:
    return all(abs(math.log(first[axis] / second[axis])) < _ONE_SPOT for axis in ("intensity", "tflops"))


def _whole(table: pd.DataFrame, x: alt.X, y: alt.Y) -> alt.Chart:
    """The operating point: all FLOPs over the whole duration, overhead and communication included."""
    seconds = table["ms"].sum() / 1e3
    flops = (table["tflops"] * table["ms"] / 1e3).sum()
    moved = (table["tflops"] * table["ms"] / 1e3 / table["intensity"].where(table["intensity"] > 0)).sum()
    point = pd.DataFrame(
        [{"name": "the whole step", "intensity": flops / moved if moved else 0.0, "tflops": flops / seconds}]
    )
    point["ms"], point["share"], point["bound"] = 1e3 * seconds, 1.0, "all of it"
    tips = [alt.Tooltip("name:N", title=" "), alt.Tooltip("ms:Q", title="ms", format=",.2f")]
    mark = alt.Chart(point).mark_point(shape="diamond", filled=True, size=230, color=_STEP, opacity=1)
    return mark.encode(x=x, y=y, tooltip=tips)
