"""How many requests fit, by their context."""

from __future__ import annotations

from collections.abc import Sequence

import altair as alt
import pandas as pd
import streamlit as st

from engine.capacity import CurvePoint, Plan

_HEIGHT = 260
_FITS = "#0d9488"
_GOAL_COLORS = {True: "#6366f1", False: "#dc2626"}
_PUBLISHED = "#d97706"
_REAL = "what fits"
_CLAIM = "by the published formula"
_GOAL = {True: "the goal, which fits", False: "the goal, which does not fit"}


def curve_table(points: Sequence[CurvePoint]) -> pd.DataFrame:
    """Long form: ``context``, ``series``, ``requests``; points at which nothing fits are left out (the axis is
    logarithmic)."""
    rows = [
        {"context": point.context, "series": series, "requests": requests}
        for point in points
        for series, requests in ((_REAL, point.max_concurrency), (_CLAIM, point.published))
        if requests > 0
    ]
    return pd.DataFrame(rows, columns=["context", "series", "requests"])


def concurrency_chart(plan: Plan, points: Sequence[CurvePoint]) -> None:
    """Draw what fits, what the published formula promises, and the goal as a point."""
    st.markdown("**Concurrent requests by context**")
    table = curve_table(points)
    goal = pd.DataFrame(
        [
            {
                "context": plan.request.context,
                "requests": plan.request.concurrency,
                "series": _GOAL[plan.fits],
            }
        ]
    )
    st.altair_chart(_chart(table, goal, _GOAL_COLORS[plan.fits]), width="stretch", key="plan-curve")


def _chart(table: pd.DataFrame, goal: pd.DataFrame, color: str) -> alt.LayerChart:
    ticks = sorted({value for value in table["context"] if value & (value - 1) == 0})
    x = alt.X(
        "context:Q",
        scale=alt.Scale(type="log", base=2, nice=False),
        axis=alt.Axis(title="context per request (tokens)", values=ticks, format=",d", labelOverlap=True, grid=False),
    )
    y = alt.Y(
        "requests:Q",
        scale=alt.Scale(type="log"),
        axis=alt.Axis(title="concurrent requests", format=",d", values=[10**n for n in range(7)], gridOpacity=0.5),
    )
    names = [_REAL, _CLAIM, str(goal["series"].iloc[0])]
    hue = alt.Color(
        "series:N",
        scale=alt.Scale(domain=names, range=[_FITS, _PUBLISHED, color]),
        legend=alt.Legend(title=None, orient="top", symbolType="circle", symbolStrokeWidth=0, labelLimit=260),
    )
    dash = alt.StrokeDash("series:N", scale=alt.Scale(domain=names, range=[[1, 0], [5, 4], [1, 0]]), legend=None)
    tips = [
        alt.Tooltip("series:N", title=" "),
        alt.Tooltip("context:Q", title="context (tokens)", format=",d"),
        alt.Tooltip("requests:Q", title="requests", format=",d"),
    ]
    lines = alt.Chart(table).mark_line(point=True).encode(x=x, y=y, color=hue, strokeDash=dash, tooltip=tips)
    point = (
        alt.Chart(goal)
        .mark_point(size=190, filled=True, shape="diamond", opacity=1)
        .encode(x="context:Q", y="requests:Q", color=hue, tooltip=tips)
    )
    return alt.layer(lines, point).properties(height=_HEIGHT)
