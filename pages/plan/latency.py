"""Latency against load, with the objectives drawn in."""

from __future__ import annotations

from collections.abc import Sequence

import altair as alt
import pandas as pd
import streamlit as st

from engine.capacity import Deployment, OperatingPoint

_HEIGHT = 185
_P95, _MEAN, _GOAL, _SLO = "#0d9488", "#94a3b8", "#6366f1", "#dc2626"
PANELS = (
    ("first token (ms)", "ttft_p95_s", "ttft_s", "ttft_s"),
    ("each token (ms)", "tpot_p95_s", "tpot_s", "tpot_s"),
)


def load_table(points: Sequence[OperatingPoint], copies: int) -> pd.DataFrame:
    """Long form: ``users``, ``panel``, ``series``, ``ms``, ``tokens_s``."""
    rows = [
        {
            "users": point.in_system * copies,
            "panel": panel,
            "series": series,
            "ms": 1e3 * getattr(point, field),
            "tokens_s": point.output_tokens_s,
        }
        for point in points
        for panel, p95, mean, _ in PANELS
        for series, field in (("95th percentile", p95), ("mean", mean))
    ]
    return pd.DataFrame(rows, columns=["users", "panel", "series", "ms", "tokens_s"])


def load_chart(found: Deployment) -> None:
    """Draw both latencies against the number of users at once, the objectives and the planned load."""
    if found.serving is None or found.point is None:
        return
    st.markdown("**Latency by users at once**")
    table = load_table(found.serving.sweep(18), found.plan.request.dp)
    here = found.point.in_system * found.plan.request.dp
    for index, (panel, _, _, slo) in enumerate(PANELS):
        chart = _panel(table, panel, getattr(found.objectives, slo), here)
        st.altair_chart(chart, width="stretch", key=f"plan-load-{index}")
    st.caption(
        ":violet[:material/more_vert:] planned load · :red[:material/horizontal_rule:] objective · breaks first as the "
        f"load grows: **{found.first_limit}**"
    )


def _panel(table: pd.DataFrame, panel: str, objective: float | None, here: float) -> alt.LayerChart:
    part = table[table["panel"] == panel]
    x = alt.X(
        "users:Q",
        scale=alt.Scale(type="log", nice=False),
        axis=alt.Axis(
            title="users at once" if panel == PANELS[-1][0] else None,
            format=",d",
            values=[10**n for n in range(7)],
            grid=False,
        ),
    )
    y = alt.Y(
        "ms:Q", scale=alt.Scale(type="log"), axis=alt.Axis(title=panel, gridOpacity=0.4, tickCount=4, format=",.4~g")
    )
    names = ["95th percentile", "mean"]
    color = alt.Color(
        "series:N",
        scale=alt.Scale(domain=names, range=[_P95, _MEAN]),
        legend=alt.Legend(title=None, orient="top") if panel == PANELS[0][0] else None,
    )
    tips = [
        alt.Tooltip("series:N", title=" "),
        alt.Tooltip("users:Q", title="users at once", format=",.0f"),
        alt.Tooltip("ms:Q", title=panel, format=",.1f"),
        alt.Tooltip("tokens_s:Q", title="output tokens/s", format=",.0f"),
    ]
    layers: list[alt.Chart] = [alt.Chart(part).mark_line(point=True).encode(x=x, y=y, color=color, tooltip=tips)]
    if here > 0:
        rule = alt.Chart(pd.DataFrame({"users": [here]})).mark_rule(color=_GOAL, strokeWidth=2, strokeDash=[2, 3])
        layers.append(rule.encode(x="users:Q"))
    if objective is not None:
        rule = alt.Chart(pd.DataFrame({"ms": [1e3 * objective]})).mark_rule(
            color=_SLO, strokeWidth=1.5, strokeDash=[6, 4]
        )
        layers.append(rule.encode(y="ms:Q"))
    return alt.layer(*layers).properties(height=_HEIGHT, width="container")
