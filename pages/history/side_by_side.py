"""Several runs side by side: their figures, in what they differ, their distributions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import streamlit as st

from engine.measure.comparison import disturbed_label
from engine.measure.results import RunResult
from pages.history.charts import distribution_curves, latencies, samples_table, throughput_curves
from pages.history.difference_table import show_differences
from pages.history.figures import figures_table
from pages.history.groups import Group, groups_by_run, groups_by_setting

MOST = 8
_BY_RUN, _BY_SETTING = "Each run", "By setting"


def compare_runs(runs: Sequence[RunResult]) -> None:
    """Draw the comparison of two or more runs; the first column is the baseline of the differences."""
    runs = sorted(runs, key=lambda run: (run.arm or "", run.repeat or 0, run.started_unix_s))
    settings = groups_by_setting(runs)
    repeated = 1 < len(settings) < len(runs)
    with st.container(horizontal=True, vertical_alignment="bottom"):
        st.subheader(f"{len(runs)} runs side by side", anchor=False, width="stretch")
        kind = _BY_RUN
        if repeated:
            kind = st.segmented_control(
                "Columns",
                [_BY_SETTING, _BY_RUN],
                default=_BY_SETTING,
                key="history-columns",
                required=True,
                label_visibility="collapsed",
            )
        groups = settings if kind == _BY_SETTING else groups_by_run(runs)
        everything = st.toggle("All metrics", key="history-all-metrics")
        names = [group.name for group in groups]
        baseline = st.selectbox("Baseline", names, key=f"history-baseline-{len(names)}", width=280)
    groups.sort(key=lambda group: group.name != baseline)
    if len(groups) > MOST:
        st.caption(f"The first {MOST} of {len(groups)} are shown.")
        groups = groups[:MOST]
    _left_out(groups)
    figures_table(groups, everything)
    show_differences(groups)
    _charts(groups)


def _left_out(groups: Sequence[Group]) -> None:
    """Say how many disturbed runs no average and no difference counts."""
    count = sum(len(group.runs) - len(group.counted) for group in groups)
    if count:
        text = disturbed_label(count)
        lone = " A column of its own shows what such a run measured." if any(not g.counted for g in groups) else ""
        st.warning(f"{text[0].upper()}{text[1:]}.{lone}", icon=":material/tsunami:")


def _charts(groups: Sequence[Group]) -> None:
    left, right = st.columns(2, gap="medium")
    with left:
        pooled = {group.name: _pooled(group) for group in groups}
        kinds = [kind for kind in ("TTFT", "TPOT", "ITL", "E2E") if any(found[kind] for found in pooled.values())]
        if kinds:
            st.markdown("**Distribution** :small[:gray[share of values at or below, ms]]")
            kind = st.segmented_control(
                "Latency", kinds, default=kinds[0], key="history-latency", required=True, label_visibility="collapsed"
            )
            values: Mapping[str, Sequence[float]] = {name: found[kind or kinds[0]] for name, found in pooled.items()}
            st.altair_chart(distribution_curves(values), width="stretch", key="history-distribution")
    with right:
        first = {group.name: (group.counted or group.runs)[0] for group in groups}
        tables = {name: samples_table(run.samples) for name, run in first.items() if run.samples}
        if tables:
            several = any(len(group.runs) > 1 for group in groups)
            st.markdown(f"**Throughput** :small[:gray[tokens/s{', first run of each setting' if several else ''}]]")
            st.space("medium")
            st.altair_chart(throughput_curves(tables), width="stretch", key="history-throughput")


def _pooled(group: Group) -> dict[str, list[float]]:
    pooled: dict[str, list[float]] = {"TTFT": [], "TPOT": [], "ITL": [], "E2E": []}
    for run in group.counted or group.runs[:1]:
        for name, values in latencies(run).items():
            pooled[name] += values
    return pooled
