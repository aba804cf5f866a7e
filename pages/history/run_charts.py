"""One run over time: its samples with events, its latencies, its requests."""

from __future__ import annotations

from typing import Any

import pandas as pd
import streamlit as st

from engine.measure.metrics import percentile
from engine.measure.results import RequestRecord, RunResult
from pages.history.charts import (
    PERCENTILES,
    histogram,
    latencies,
    marks_table,
    request_timeline,
    samples_table,
    time_chart,
)
from pages.shared.run_values import number_text
from pages.shared.text import plain

_TIMELINE_MOST = 400


def over_time(run: RunResult) -> None:
    """Charts of the samples, with a mark at each event, and the events as a table."""
    if not run.samples:
        st.caption("No samples were recorded: the run ended before the first one.")
        _events(run)
        return
    table, marks = samples_table(run.samples), marks_table(run.events)
    charts = [
        ("Throughput", "tokens/s", {"output_tokens_s": "output", "total_tokens_s": "with prompts"}, False),
        ("Requests", "requests", {"running": "running", "waiting": "waiting"}, True),
        ("KV cache", "blocks", {"kv_blocks_used": "in use", "kv_blocks_cached": "free, prefix kept"}, True),
        ("Step time", "ms", {"step_ms": "mean"}, False),
    ]
    if table["gpu_power_w"].notna().any():
        charts.append(("GPU power", "W", {"gpu_power_w": "board"}, False))
    if table["gpu_utilization_percent"].notna().any():
        charts.append(("GPU use", "% of time", {"gpu_utilization_percent": "a kernel ran"}, False))
    for start in range(0, len(charts), 2):
        for column, (title, unit, columns, stacked) in zip(st.columns(2), charts[start : start + 2], strict=False):
            with column:
                st.markdown(f"**{title}** :small[:gray[{unit}]]")
                chart = time_chart(table, columns, marks, stacked=stacked, labels=title == charts[0][0])
                st.altair_chart(chart, width="stretch", key=f"history-{title}")
    _events(run)


def _events(run: RunResult) -> None:
    if not run.events:
        return
    with st.expander(f"Events ({len(run.events)})", icon=":material/flag:"):
        rows = [
            {"Second": f"{event.t_s:.2f}", "Kind": plain(event.kind), "Event": plain(event.summary)}
            for event in run.events
        ]
        st.table(pd.DataFrame(rows).set_index("Second"), border="horizontal")


def latency_histograms(run: RunResult) -> None:
    """A histogram of each latency, with its percentiles."""
    found = {name: values for name, values in latencies(run).items() if values}
    if not found:
        st.caption("No request of this run completed, so there are no latencies.")
        return
    titles = {
        "TTFT": "Time to first token",
        "TPOT": "Time per output token",
        "ITL": "Gap between tokens",
        "E2E": "End to end",
    }
    names = list(found)
    for start in range(0, len(names), 2):
        for column, name in zip(st.columns(2, gap="medium"), names[start : start + 2], strict=False):
            with column:
                percentiles = ", ".join(f"p{n} {number_text(percentile(found[name], n) or 0)}" for n in PERCENTILES)
                caption = f"{name}, ms; {len(found[name]):,} values, {percentiles} (dashed)"
                st.markdown(f"**{titles[name]}** :small[:gray[{caption}]]")
                st.altair_chart(histogram(found[name]), width="stretch", key=f"history-{name}")


def request_timeline_and_table(run: RunResult) -> None:
    """A bar a request over the time of the run, and a row a request."""
    if not run.requests:
        st.caption("No request was recorded.")
        return
    shown = run.requests[:_TIMELINE_MOST]
    more = f" :small[:gray[the first {len(shown)} of {len(run.requests):,}]]" if len(shown) < len(run.requests) else ""
    st.markdown(f"**Timeline**{more}")
    st.altair_chart(request_timeline(shown), width="stretch", key="history-timeline")
    st.dataframe(_request_table(run.requests), hide_index=True, placeholder="–", height="auto")


def _request_table(requests: list[RequestRecord]) -> pd.DataFrame:
    drafted = any(request.draft_tokens for request in requests)
    rows = []
    for request in requests:
        row: dict[str, Any] = {
            "Request": request.index,
            "Arrival, s": round(request.arrival_s, 3),
            "Prompt": request.prompt_tokens,
            "of it cached": request.cached_tokens,
            "Output": request.output_tokens,
            "TTFT, ms": _rounded(request.ttft_ms),
            "TPOT, ms": _rounded(request.tpot_ms),
            "E2E, ms": _rounded(request.e2e_ms),
            "Preempted": request.preemptions,
        }
        if drafted:
            row |= {"Drafted": request.draft_tokens, "Accepted": request.accepted_tokens}
        rows.append(row | {"Finish": request.finish_reason, "Error": request.error or ""})
    return pd.DataFrame(rows)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 1)
