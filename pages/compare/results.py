"""What a comparison found: verdict, intervals, single runs, the literature's claim next to it, and what really ran."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import streamlit as st

from engine.measure.comparison import MetricComparison, compare_all, disturbed_label
from engine.measure.results import RunResult, to_json
from pages.compare.charts import interval_chart, single_runs
from pages.compare.energy import compared_energy
from pages.compare.quality import claims, quality_cost
from pages.shared.links import HISTORY, link_to
from pages.shared.messages import bytes_text, value_text
from pages.shared.run_values import disturbance_lines
from pages.shared.text import plain

_DISTURBANCES_SHOWN = 5


def split_arms(runs: Sequence[RunResult]) -> tuple[list[RunResult], list[RunResult]]:
    """The runs of A and of B, by repeat."""
    ordered = sorted(runs, key=lambda run: run.repeat or 0)
    return [run for run in ordered if run.arm == "A"], [run for run in ordered if run.arm == "B"]


def differing_knobs(runs_a: Sequence[RunResult], runs_b: Sequence[RunResult]) -> dict[str, tuple[Any, Any]]:
    """Knobs whose value differs between the two arms, ``{knob: (in A, in B)}``."""
    if not runs_a or not runs_b:
        return {}
    a, b = runs_a[0].provenance.config, runs_b[0].provenance.config
    return {name: (a.get(name), b.get(name)) for name in a if a.get(name) != b.get(name)}


def results(runs: Sequence[RunResult], *, final: bool = True) -> None:
    """Draw the result of a comparison from its runs; while it goes on (not ``final``) only the figures so far."""
    runs_a, runs_b = split_arms(runs)
    compared = compare_all(runs_a, runs_b)
    _disturbed(runs)
    if not compared:
        st.info("Neither setting has a completed run yet.", icon=":material/hourglass_empty:")
        return
    change = differing_knobs(runs_a, runs_b)
    _headline(compared, runs_a, runs_b, change)
    left, right = st.columns([1.25, 1], gap="medium")
    with left:
        interval_chart(compared)
    with right:
        single_runs(runs_a, runs_b)
    if not final:
        return
    quality_cost(runs_a, runs_b)
    claims(runs_a, runs_b, change)
    _table(compared)
    compared_energy(runs_a, runs_b)
    _paths(runs_a[0], runs_b[0])
    _links(runs)


def _disturbed(runs: Sequence[RunResult]) -> None:
    """Which runs no figure here counts, and why."""
    found = [run for run in runs if run.disturbed]
    if not found:
        return
    text = disturbed_label(len(found))
    lines = [
        f"{run.arm or 'run'}, repeat {(run.repeat or 0) + 1}, {line}"
        for run in found
        for line in disturbance_lines(run)
    ]
    listed = "".join(f"\n- {line}" for line in lines[:_DISTURBANCES_SHOWN])
    st.warning(f"{text[0].upper()}{text[1:]}.{listed}", icon=":material/tsunami:")


def _headline(
    compared: Sequence[MetricComparison],
    runs_a: Sequence[RunResult],
    runs_b: Sequence[RunResult],
    change: Mapping[str, tuple[Any, Any]],
) -> None:
    main = next((item for item in compared if item.metric == "output_tokens_s"), compared[0])
    for column, arm, runs, mean, spread in zip(
        st.columns(2), "AB", (runs_a, runs_b), (main.mean_a, main.mean_b), (main.spread_a, main.spread_b), strict=True
    ):
        setting = ", ".join(f"{name} = {value_text(pair['AB'.index(arm)])}" for name, pair in change.items())
        noise = f"± {100 * spread:.1f} % between runs" if spread is not None else "one run"
        counted = sum(not run.disturbed for run in runs)
        column.metric(
            f"{arm}: {plain(setting) or 'the same setting'}",
            f"{mean or 0:,.1f} {main.unit}",
            delta=f"{noise}, {counted} run{'s' if counted != 1 else ''}",
            delta_color="off",
            delta_arrow="off",
            border=True,
        )
    st.info(f"**{plain(main.label)}**: {plain(main.verdict)}", icon=":material/balance:")
    for warning in dict.fromkeys(main.warnings):
        st.caption(f":material/warning: {plain(warning)}")


def _table(compared: Sequence[MetricComparison]) -> None:
    st.markdown("**All metrics**")
    rows = [
        {
            "Metric": item.label,
            "A": _with_spread(item.mean_a, item.spread_a, item.unit),
            "B": _with_spread(item.mean_b, item.spread_b, item.unit),
            "B / A": None if item.ratio is None else item.ratio,
            "Verdict": item.verdict,
        }
        for item in compared
    ]
    st.dataframe(
        pd.DataFrame(rows),
        hide_index=True,
        width="stretch",
        column_config={
            "B / A": st.column_config.NumberColumn(format="%.3f×", width="small"),
            "Verdict": st.column_config.TextColumn(width="large"),
        },
    )


def _with_spread(mean: float | None, spread: float | None, unit: str) -> str:
    if mean is None:
        return "–"
    value = bytes_text(mean) if unit == "bytes" else f"{mean:,.4g} {unit}".rstrip()
    return value if spread is None else f"{value} ± {100 * spread:.1f} %"


def _paths(run_a: RunResult, run_b: RunResult) -> None:
    """What really ran in A and in B; a difference stands in bold."""
    path_a, path_b = run_a.provenance.path, run_b.provenance.path
    rows = []
    for name in dict.fromkeys([*path_a, *path_b]):
        a, b = path_a.get(name, "–"), path_b.get(name, "–")
        mark = "**" if a != b else ""
        label = plain(name.replace("_", " "))
        rows.append({"": label, "A": f"{mark}{plain(a)}{mark}", "B": f"{mark}{plain(b)}{mark}"})
    with st.expander("What really ran", icon=":material/route:"):
        st.table(pd.DataFrame(rows).set_index(""), border="horizontal")


def _links(runs: Sequence[RunResult]) -> None:
    document = json.dumps([to_json(run) for run in runs], indent=1)
    with st.container(horizontal=True, vertical_alignment="center"):
        link_to(HISTORY, comparison=runs[0].comparison_id or "")
        st.download_button(
            "Download JSON",
            document,
            file_name=f"comparison-{(runs[0].comparison_id or runs[0].run_id)[:8]}.json",
            mime="application/json",
            icon=":material/download:",
            on_click="ignore",
        )
