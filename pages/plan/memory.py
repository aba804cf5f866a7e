"""One GPU's memory as a stacked bar against its capacity."""

from __future__ import annotations

import itertools

import altair as alt
import pandas as pd
import streamlit as st

from engine.capacity import Plan
from engine.capacity.text import GIB, gib

_HEIGHT = 196
#: A segment narrower than this share of the bar has its size in the legend only.
_LABEL_SHARE = 0.08
# Fills that are legible on a light and on a dark page; text on them is white or, on the pale ones, dark.
_COLORS = {
    "Weights": "#6366f1",
    "Adapters": "#a855f7",
    "Draft model": "#c084fc",
    "Activations": "#d97706",
    "Runtime": "#64748b",
    "KV cache, goal": "#0f766e",
    "KV cache, spare": "#5eead4",
    "Kept free": "#9ca3af",
    "Missing": "#dc2626",
}
_PALE = ["KV cache, spare", "Kept free"]
_LINES = "#8b95a1"
# Heights of the drawing, 0 … 1: the lines' names above, the bar, the strip of what is missing below.
_NAME_ROWS = (0.95, 0.74)
_BAR = (0.2, 0.62)
_STRIP = (0.02, 0.12)


def segments(plan: Plan) -> pd.DataFrame:
    """The segments: ``part``, ``start`` and ``end`` in GiB, ``size`` in words, ``low`` and ``high`` of the drawing.

    They stand side by side as needed, also beyond the limit; "Missing" is the strip below, from the limit on.
    """
    memory = plan.memory
    goal = plan.kv_bytes_needed
    wanted = [
        ("Weights", memory.weights),
        ("Adapters", memory.adapters),
        ("Draft model", memory.draft),
        ("Activations", memory.activation),
        ("Runtime", memory.non_torch),
        ("KV cache, goal", goal),
    ]
    if plan.fits:
        wanted += [("KV cache, spare", memory.kv + memory.unused - goal), ("Kept free", memory.reserved)]
    rows, position = [], 0
    for part, size in wanted:
        if size:
            rows.append(_row(part, position, size, _BAR))
        position += size
    if not plan.fits:
        rows.append(_row("Missing", max(position - plan.shortfall, 0), plan.shortfall, _STRIP))
    return pd.DataFrame(rows)


def _row(part: str, start: int, size: int, place: tuple[float, float]) -> dict[str, object]:
    return {
        "part": part,
        "start": start / GIB,
        "end": (start + size) / GIB,
        "size": gib(size),
        "low": place[0],
        "high": place[1],
    }


def memory_bar(plan: Plan) -> None:
    """Draw the bar, its legend with every size, and lines at the limit and the capacity."""
    count = plan.request.gpus
    st.markdown("**Memory of the GPU**" if count == 1 else f"**Memory of each of the {count} GPUs**")
    st.altair_chart(_chart(plan, segments(plan)), width="stretch", key="plan-memory")


def _chart(plan: Plan, table: pd.DataFrame) -> alt.LayerChart:
    right = 1.002 * max(plan.memory.capacity / GIB, float(table["end"].max()))
    table["entry"] = table["part"] + ": " + table["size"]
    lines = sorted({plan.memory.limit / GIB, plan.memory.capacity / GIB})
    pieces = [_widest_piece(start, end, lines) for start, end in zip(table["start"], table["end"], strict=True)]
    table["middle"] = [(start + end) / 2 for start, end in pieces]
    wide = pd.Series([end - start > _LABEL_SHARE * right for start, end in pieces])
    table["label"] = table["size"].where(wide & (table["part"] != "Missing"), "")
    table["height"] = (table["low"] + table["high"]) / 2
    entries = list(table["entry"])
    x = alt.X(
        "start:Q",
        scale=alt.Scale(domain=[0, right], nice=False),
        axis=alt.Axis(title="GiB", grid=False, tickCount=10, format=",d"),
    )
    bars = (
        alt.Chart(table)
        .mark_rect()
        .encode(
            x=x,
            x2="end:Q",
            y=_y("low"),
            y2="high:Q",
            color=alt.Color(
                "entry:N",
                scale=alt.Scale(domain=entries, range=[_COLORS[part] for part in table["part"]]),
                legend=alt.Legend(
                    title=None, orient="bottom", columns=3, labelLimit=320, symbolType="square", offset=4
                ),
            ),
            tooltip=[alt.Tooltip("part:N", title="part"), alt.Tooltip("size:N", title="size")],
        )
    )
    text = alt.Chart(table).encode(x="middle:Q", y=_y("height"), text="label:N")
    pale = alt.FieldOneOfPredicate("part", _PALE)
    light = text.transform_filter(alt.LogicalNotPredicate(**{"not": pale})).mark_text(color="white", fontWeight=600)
    dark = text.transform_filter(pale).mark_text(color="#134e4a", fontWeight=600)
    return alt.layer(bars, light, dark, *_lines(plan, right)).properties(height=_HEIGHT)


def _widest_piece(start: float, end: float, lines: list[float]) -> tuple[float, float]:
    """The widest part of a segment that no line crosses: its label goes there."""
    edges = [start, *(line for line in lines if start < line < end), end]
    return max(itertools.pairwise(edges), key=lambda piece: piece[1] - piece[0])


def _y(field: str) -> alt.Y:
    return alt.Y(f"{field}:Q", scale=alt.Scale(domain=[0, 1]), axis=None)


def _lines(plan: Plan, right: float) -> list[alt.Chart]:
    """Dashed lines at the capacity and at what the engine may use of it, each with its name on a row of its own."""
    capacity, limit = plan.memory.capacity / GIB, plan.memory.limit / GIB
    marks = [(capacity, f"capacity {capacity:,.2f} GiB", capacity > 0.6 * right)]
    if limit < capacity:
        share = f"{100 * plan.request.utilization:.0f} %"
        # To the left of its line, so that the line of the capacity does not cross it, unless there is no room.
        marks.append((limit, f"the engine may use {share}: {limit:,.2f} GiB", limit > 0.32 * right))
    table = pd.DataFrame(
        [
            {"x": x, "text": text, "row": row, "zero": 0.0, "top": row, "toward_left": toward_left}
            for (x, text, toward_left), row in zip(marks, _NAME_ROWS, strict=False)
        ]
    )
    base = alt.Chart(table)
    name = base.encode(x="x:Q", y=_y("row"), text="text:N")
    return [
        base.mark_rule(strokeDash=[5, 3], strokeWidth=1.5, color=_LINES).encode(x="x:Q", y=_y("zero"), y2="top:Q"),
        name.transform_filter("datum.toward_left").mark_text(align="right", dx=-6, color=_LINES),
        name.transform_filter("!datum.toward_left").mark_text(align="left", dx=6, color=_LINES),
    ]
