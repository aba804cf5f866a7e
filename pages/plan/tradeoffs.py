"""What moves the answer most, and what the alternatives are."""

from __future__ import annotations

from collections.abc import Sequence

import altair as alt
import pandas as pd
import streamlit as st

from engine.capacity import Deployment, ParetoPoint, Swing, pareto, sensitivity

_HEIGHT = 280
_LESS, _MORE, _HERE = "#d97706", "#0d9488", "#6366f1"
_SHOWN = 8
_LEAST_SWING = 0.005


def tornado_table(swings: Sequence[Swing], base: float) -> pd.DataFrame:
    """Long form: ``name``, ``start`` (the answer now) and ``end`` (the answer then), ``assumed``, ``change``."""
    rows = [
        {"name": swing.name, "start": base, "end": value, "assumed": label, "change": value / base - 1 if base else 0.0}
        for swing in swings
        for value, label in ((swing.low, swing.low_label), (swing.high, swing.high_label))
    ]
    return pd.DataFrame(rows, columns=["name", "start", "end", "assumed", "change"])


def tornado_chart(found: Deployment) -> None:
    """Bars from the largest load as planned to the one with each assumption lower and higher."""
    st.markdown("**Which assumption moves the answer most**")
    base = found.best.rate if found.best else 0.0
    swings = [swing for swing in sensitivity(found) if swing.width > _LEAST_SWING * base][:_SHOWN]
    if found.best is None or not swings:
        st.caption("No load keeps the objectives: there is nothing to vary.")
        return
    table = tornado_table(swings, found.best.rate)
    order = [swing.name for swing in swings]
    bars = (
        alt.Chart(table)
        .mark_bar(height=14, cornerRadius=2)
        .encode(
            x=alt.X(
                "start:Q",
                scale=alt.Scale(zero=False),
                axis=alt.Axis(title="largest load within the objectives (requests/s)", gridOpacity=0.4, tickCount=6),
            ),
            x2="end:Q",
            y=alt.Y("name:N", sort=order, axis=alt.Axis(title=None, labelLimit=170)),
            color=alt.condition("datum.change < 0", alt.value(_LESS), alt.value(_MORE)),
            tooltip=[
                alt.Tooltip("name:N", title="assumption"),
                alt.Tooltip("assumed:N", title="if it were"),
                alt.Tooltip("end:Q", title="requests/s", format=",.2f"),
                alt.Tooltip("change:Q", title="change", format="+.0%"),
            ],
        )
    )
    here = alt.Chart(pd.DataFrame({"x": [found.best.rate]})).mark_rule(color=_HERE, strokeWidth=2).encode(x="x:Q")
    st.altair_chart(alt.layer(bars, here).properties(height=_HEIGHT), width="stretch", key="plan-tornado")
    st.caption("Each is varied alone, by 20 % unless its tooltip says otherwise.")


def pareto_table(points: Sequence[ParetoPoint]) -> pd.DataFrame:
    """One row a point."""
    rows = [
        {
            "gpus": f"{point.tp} GPU{'s' if point.tp > 1 else ''}",
            "tp": point.tp,
            "users": point.users,
            "user": point.tokens_s_per_user,
            "gpu": point.tokens_s_per_gpu,
            "best": point.best,
        }
        for point in points
    ]
    return pd.DataFrame(rows, columns=["gpus", "tp", "users", "user", "gpu", "best"])


def pareto_chart(found: Deployment) -> None:
    """Throughput a GPU against speed a user, a line for each number of tensor-parallel GPUs."""
    st.markdown("**Throughput of a GPU against speed of a user**")
    table = pareto_table(pareto(found.plan.request.as_request(), found.workload))
    if table.empty or found.point is None:
        st.caption("The speeds of this GPU are not known.")
        return
    x = alt.X("user:Q", axis=alt.Axis(title="tokens/s of one user", gridOpacity=0.4), scale=alt.Scale(zero=True))
    y = alt.Y("gpu:Q", axis=alt.Axis(title="output tokens/s of a GPU", gridOpacity=0.4, format=",d"))
    order = list(dict.fromkeys(table.sort_values("tp")["gpus"]))
    lines = (
        alt.Chart(table)
        .mark_line(point=alt.OverlayMarkDef(size=45))
        .encode(
            x=x,
            y=y,
            color=alt.Color("gpus:N", sort=order, legend=alt.Legend(title=None, orient="top")),
            order="users:Q",
            tooltip=[
                alt.Tooltip("gpus:N", title="tensor parallel"),
                alt.Tooltip("users:Q", title="users on a copy", format=",d"),
                alt.Tooltip("user:Q", title="tokens/s of one user", format=",.1f"),
                alt.Tooltip("gpu:Q", title="tokens/s of a GPU", format=",.0f"),
                alt.Tooltip("best:N", title="unbeaten"),
            ],
        )
    )
    point = found.point
    row = {"user": 1 / point.tpot_s, "gpu": point.output_tokens_s / found.plan.request.gpus, "name": "the plan"}
    here = (
        alt.Chart(pd.DataFrame([row]))
        .mark_point(shape="diamond", filled=True, size=230, color=_HERE, opacity=1)
        .encode(x=x, y=y, tooltip=[alt.Tooltip("name:N", title=" ")])
    )
    st.altair_chart(alt.layer(lines, here).properties(height=_HEIGHT), width="stretch", key="plan-pareto")
    st.caption(":violet[:material/diamond:] the plan. Up and to the right is better; lines end where memory does.")
