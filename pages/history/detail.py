"""One run, opened: its figures, its course, its requests, and everything needed to repeat it."""

from __future__ import annotations

import streamlit as st

from engine.measure.results import RunResult
from pages.history.provenance import provenance_tab
from pages.history.run_charts import latency_histograms, over_time, request_timeline_and_table
from pages.history.run_metrics import all_metrics
from pages.shared.callbacks import act, show_action_error
from pages.shared.energy import PER_TOKEN, has_energy
from pages.shared.run_values import (
    HEADLINES,
    STATUS_COLORS,
    code_text,
    disturbance_lines,
    metric_info,
    metric_text,
    moment_text,
    run_name,
    setting_labels,
    status_labels,
)
from pages.shared.text import badge_label, plain
from storage import RunRow, Store

_TABS = ("Over time", "Latencies", "Requests", "All metrics", "Provenance")
_DISTURBANCES_SHOWN = 5
_IN_A_ROW = 4


def run_detail(store: Store, row: RunRow, run: RunResult) -> None:
    """Draw everything that is recorded of a run."""
    _heading(store, row, run)
    _outcome(store, row, run)
    if run.metrics:
        _headlines(run)
    tabs = st.tabs(list(_TABS), key="history-tab", on_change="rerun")
    for tab, draw in zip(
        tabs, (over_time, latency_histograms, request_timeline_and_table, all_metrics, provenance_tab), strict=True
    ):
        if tab.open is not False:  # only the tab that is seen is drawn
            with tab:
                draw(run)


def _heading(store: Store, row: RunRow, run: RunResult) -> None:
    with st.container(horizontal=True, vertical_alignment="center", gap="small"):
        st.subheader(plain(run_name(run)), anchor=False, width="content")
        for label in status_labels(row):
            st.badge(badge_label(label), color=STATUS_COLORS.get(label, "gray"))  # type: ignore[arg-type]
        for label in setting_labels(run.provenance.config):
            st.badge(badge_label(label), color="gray")
        with st.popover("Rename", icon=":material/edit:", type="tertiary"):
            key = f"history-label-{run.run_id}"
            st.text_input("Label", run.label, key=key, max_chars=200)
            st.button(
                "Save",
                type="primary",
                key="history-label-save",
                on_click=act,
                args=(key, lambda: store.set_label(run.run_id, st.session_state[key])),
            )
            show_action_error(key)
    facts = [
        moment_text(run.started_unix_s),
        plain(run.provenance.model),
        f"workload {plain(row.workload_name)}" if row.workload_name else "",
        f"{run.duration_s:,.1f} s" if run.duration_s else "",
        f"code {code_text(run.provenance.code_revision, run.provenance.code_dirty)}",
    ]
    st.caption(" · ".join(plain(fact) for fact in facts if fact))


def _outcome(store: Store, row: RunRow, run: RunResult) -> None:
    """What a reader must know before any figure of a run that did not complete."""
    if run.status == "failed":
        st.error(f"This run failed: {plain(run.error or 'no reason was recorded.')}", icon=":material/error:")
    elif run.status == "cancelled":
        done = sum(request.finish_reason in ("stop", "length") for request in run.requests)
        text = f"This run was cancelled after {done} of {len(run.requests)} requests. {plain(run.error or '')}"
        st.warning(text, icon=":material/cancel:")
    elif run.status == "running":
        _running(store, row)
    if run.disturbed:
        _disturbances(run)


def _disturbances(run: RunResult) -> None:
    lines = disturbance_lines(run)
    shown = "".join(f"\n- {line}" for line in lines[:_DISTURBANCES_SHOWN])
    more = f"\n- and {len(lines) - _DISTURBANCES_SHOWN} more" if len(lines) > _DISTURBANCES_SHOWN else ""
    st.warning(
        "This run was disturbed: its figures are not those of its setting alone, and it is left out of every average "
        f"and comparison.{shown}{more}",
        icon=":material/tsunami:",
    )


def _running(store: Store, row: RunRow) -> None:
    alive = row.owner.is_alive() if row.owner else False
    where = {
        True: "This run is under way; its figures come when it has ended.",
        False: "The process that ran this has ended.",
        None: "This run was started on another machine and may still be under way there.",
    }[alive]
    st.info(where, icon=":material/hourglass_top:")
    if alive is not True:
        reason = "Marked as failed by hand: the process that ran it has ended."
        st.button(
            "Mark it as failed",
            icon=":material/flag:",
            key="history-mark-failed",
            on_click=act,
            args=("mark-failed", store.fail_run, row.run_id, reason),
        )
        show_action_error("mark-failed")


def _headlines(run: RunResult) -> None:
    """The figures of a run, four in a row: in more columns the labels would be cut on a small screen."""
    names = (*HEADLINES, PER_TOKEN) if has_energy(run) else HEADLINES
    infos = [(metric_info(name), metric_text(name, run.metrics.get(name))) for name in names]
    figures = [(info.label, value, info.definition) for info, value in infos]
    done = sum(request.finish_reason in ("stop", "length") for request in run.requests)
    figures.append(("Requests done", f"{done:,} / {len(run.requests):,}", "Completed requests / all of the workload."))
    for start in range(0, len(figures), _IN_A_ROW):
        columns = st.columns(_IN_A_ROW)
        for column, (label, value, definition) in zip(columns, figures[start : start + _IN_A_ROW], strict=False):
            column.metric(label, value, help=definition, border=True)
