"""The table of runs, and which of them are selected in it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import pandas as pd
import streamlit as st

from engine.measure.metrics import METRICS
from pages.shared.run_values import (
    RATIOS,
    STATUS_COLORS,
    code_text,
    reader_timezone,
    run_name,
    setting_labels,
    status_labels,
)
from storage import RunRow

_SHOWN_METRICS = ("output_tokens_s", "ttft_ms_p50", "tpot_ms_mean", "itl_ms_p99", "e2e_ms_p50")
_SHOWN = ("Started", "Label", "Status", "Workload", "Setting", "Arm", *_SHOWN_METRICS, "Requests", "Code")
_OPEN = "history-open"
_ROW_HEIGHT = 32


def runs_table(rows: Sequence[RunRow]) -> list[str]:
    """Draw the table and return the ids of the selected runs.

    The selection follows the runs, not their places: when the list changes, the runs that were selected still are.
    """
    run_ids = [row.run_id for row in rows]
    remembered = [run_id for run_id in st.session_state.get(_OPEN, []) if run_id in run_ids]
    digest = hashlib.sha256("".join(run_ids).encode()).hexdigest()[:12]
    state: Any = st.dataframe(
        table_of(rows),
        key=f"history-table-{digest}",
        row_height=_ROW_HEIGHT,
        height=min(_ROW_HEIGHT * (len(rows) + 1) + 3, 390),
        hide_index=True,
        placeholder="–",
        column_order=_SHOWN,
        column_config=_columns(95 if all(len(status_labels(row)) == 1 for row in rows) else 170),
        on_select="rerun",
        selection_mode="multi-row",
        selection_default={"selection": {"rows": [run_ids.index(run_id) for run_id in remembered]}},
    )
    selected = [run_ids[place] for place in state.selection.rows if place < len(run_ids)]
    st.session_state[_OPEN] = selected
    return selected


def select_runs(run_ids: Sequence[str]) -> None:
    """Select these runs when the table is drawn next (from a link of another page)."""
    for key in [key for key in st.session_state if str(key).startswith("history-table-")]:
        del st.session_state[key]
    st.session_state[_OPEN] = list(run_ids)


def table_of(rows: Sequence[RunRow]) -> pd.DataFrame:
    """One line a run: what identifies it, its setting as chips, and every metric in a column of its own name."""
    moments = [math.nan if row.unshowable else row.started_unix_s for row in rows]
    started = pd.to_datetime(moments, unit="s", utc=True)
    zone = reader_timezone()
    table = {
        "Started": started.tz_convert(zone) if zone is not None else started,
        "Label": [row.label if row.unshowable is None else f"{run_name(row)}: {row.unshowable}" for row in rows],
        "Status": [status_labels(row) for row in rows],
        "Model": [row.model for row in rows],
        "Workload": [row.workload_name for row in rows],
        "Setting": [setting_labels(row.provenance.config) for row in rows],
        "Arm": [f"{row.arm} {'' if row.repeat is None else row.repeat + 1}" if row.arm else "" for row in rows],
        **{name: pd.array([row.metrics.get(name) for row in rows], dtype="Float64") for name in METRICS},
        "Requests": [row.num_requests for row in rows],
        "Duration": [row.duration_s for row in rows],
        "Code": [code_text(row.provenance.code_revision, row.provenance.code_dirty) for row in rows],
        "Seed": [row.provenance.seed for row in rows],
        "Config hash": [row.provenance.config_hash for row in rows],
        "Workload hash": [row.provenance.workload_hash[:16] for row in rows],
        "Comparison": [row.comparison_id or "" for row in rows],
        "Run id": [row.run_id for row in rows],
    }
    return pd.DataFrame(table)


def _columns(status_width: int) -> dict[str, Any]:
    number = st.column_config.NumberColumn
    columns: dict[str, Any] = {
        "Started": st.column_config.DatetimeColumn(format="D MMM, HH:mm:ss", width=115),
        "Label": st.column_config.TextColumn(width=215),
        "Status": st.column_config.MultiselectColumn(
            options=list(STATUS_COLORS), color=list(STATUS_COLORS.values()), width=status_width
        ),
        "Workload": st.column_config.TextColumn(width=90),
        "Setting": st.column_config.ListColumn(width=145, help="Knobs that are not at their default."),
        "Arm": st.column_config.TextColumn(width=45, help="Setting A or B of a comparison, and the repetition."),
        "Requests": number(width=70, format="localized"),
        "Duration": number("Duration, s", format="%.1f"),
        "Code": st.column_config.TextColumn(width=110, help="Git revision; “+ changes”: the tree was not clean."),
    }
    for name, info in METRICS.items():
        label = f"{info.label}, {info.unit}" if info.unit and info.unit != "bytes" else info.label
        kind = "bytes" if info.unit == "bytes" else "percent" if name in RATIOS else "%.1f"
        columns[name] = number(_SHORT.get(name, label), format=kind, help=info.definition, width=80)
    return columns


_SHORT = {
    "output_tokens_s": "Tokens/s",
    "ttft_ms_p50": "TTFT p50, ms",
    "tpot_ms_mean": "TPOT, ms",
    "itl_ms_p99": "ITL p99, ms",
    "e2e_ms_p50": "E2E p50, ms",
}
