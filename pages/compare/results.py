"""What a comparison found: verdict, intervals, single runs, the literature's claim beside it, and what really ran."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import streamlit as st

from engine.measure.claims import claims_for, judge_claim
from engine.measure.comparison import MetricComparison, compare, compare_all, disturbed_words
from engine.measure.metrics import METRICS
from engine.measure.results import RunResult, to_json
from pages.shared.energy import compared_energy
from pages.shared.links import HISTORY, link_to
from pages.shared.messages import bytes_text, value_text
from pages.shared.run_values import disturbance_lines, reference_text
from pages.shared.text import plain

#: The metrics of the interval chart, in its order; all others are in the table.
_HEADLINES = (
    "output_tokens_s",
    "goodput_requests_s",
    "ttft_ms_p50",
    "ttft_ms_p99",
    "tpot_ms_mean",
    "itl_ms_p99",
    "e2e_ms_p50",
    "step_ms_mean",
    "energy_per_output_token_j",
    "net_energy_per_output_token_j",
    "weights_bytes",
    "resident_bytes_peak",
)
_POINTS = ("output_tokens_s", "ttft_ms_p50", "tpot_ms_mean", "e2e_ms_p50")
_QUALITY = (
    ("perplexity", "Perplexity (lower is better)"),
    ("kl_mean_nats", "KL divergence, mean"),
    ("kl_p99_nats", "KL divergence, 99th percentile"),
    ("same_top_percent", "Same most likely token"),
)
_DISTURBANCES_SHOWN = 5
_COLORS = {"B is better": "#0d9488", "A is better": "#db2777", "no difference shown": "#94a3b8", "neither": "#6366f1"}
_LADDERS = (
    (0.001, 0.01, 0.1, 1, 10, 100, 1000),
    (0.1, 0.25, 0.5, 1, 2, 4, 10),
    (0.25, 0.5, 0.7, 1, 1.4, 2, 3),
    (0.7, 0.8, 0.9, 1, 1.1, 1.25, 1.5),
    (0.9, 0.95, 0.98, 1, 1.02, 1.05, 1.1),
)
_CLAIM_BADGES = {
    "confirmed": ("agrees", "green"),
    "above": ("more than claimed", "green"),
    "below": ("less than claimed", "orange"),
    "none": ("not shown here", "gray"),
    "opposite": ("the opposite here", "red"),
    "unmeasured": ("not measured", "gray"),
}


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
        _intervals([item for item in compared if item.metric in _HEADLINES and item.ratio is not None])
    with right:
        _single_runs(runs_a, runs_b)
    if not final:
        return
    _quality(runs_a, runs_b)
    _claims(runs_a, runs_b, change)
    _table(compared)
    compared_energy(runs_a, runs_b)
    _paths(runs_a[0], runs_b[0])
    _links(runs)


def _disturbed(runs: Sequence[RunResult]) -> None:
    """Which runs no figure here counts, and why."""
    found = [run for run in runs if run.disturbed]
    if not found:
        return
    words = disturbed_words(len(found))
    lines = [
        f"{run.arm or 'run'}, repeat {(run.repeat or 0) + 1}, {line}"
        for run in found
        for line in disturbance_lines(run)
    ]
    listed = "".join(f"\n- {line}" for line in lines[:_DISTURBANCES_SHOWN])
    st.warning(f"{words[0].upper()}{words[1:]}.{listed}", icon=":material/tsunami:")


def _headline(
    compared: Sequence[MetricComparison],
    runs_a: Sequence[RunResult],
    runs_b: Sequence[RunResult],
    change: Mapping[str, tuple[Any, Any]],
) -> None:
    main = next((item for item in compared if item.metric == "output_tokens_s"), compared[0])
    for column, letter, runs, mean, spread in zip(
        st.columns(2), "AB", (runs_a, runs_b), (main.mean_a, main.mean_b), (main.spread_a, main.spread_b), strict=True
    ):
        setting = ", ".join(f"{name} = {value_text(pair['AB'.index(letter)])}" for name, pair in change.items())
        noise = f"± {100 * spread:.1f} % between runs" if spread is not None else "one run"
        counted = sum(not run.disturbed for run in runs)
        column.metric(
            f"{letter}: {plain(setting) or 'the same setting'}",
            f"{mean or 0:,.1f} {main.unit}",
            delta=f"{noise}, {counted} run{'s' if counted != 1 else ''}",
            delta_color="off",
            delta_arrow="off",
            border=True,
        )
    st.info(f"**{plain(main.label)}**: {plain(main.verdict)}", icon=":material/balance:")
    for warning in dict.fromkeys(main.warnings):
        st.caption(f":material/warning: {plain(warning)}")


def _intervals(compared: Sequence[MetricComparison]) -> None:
    """Ratio B/A of each headline metric with its 95 % interval, on a logarithmic axis around 1."""
    st.markdown("**B compared with A** :small[:gray[ratio with 95 % interval; left of 1 is less, right is more]]")
    rows = [
        {
            "metric": item.label,
            "ratio": item.ratio,
            "low": item.ci_low if item.ci_low is not None else item.ratio,
            "high": item.ci_high if item.ci_high is not None else item.ratio,
            "result": result_word(item),
            "text": f"{item.ratio:.2f}×",
            "verdict": item.verdict,
        }
        for item in sorted(compared, key=lambda item: _HEADLINES.index(item.metric))
        if item.ratio is not None
    ]
    if rows:
        st.vega_lite_chart(_interval_spec(rows), width="stretch", key="compare-intervals")


def _interval_spec(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A dot and a bar a metric around the line of "no difference"."""
    shown = [word for word in _COLORS if any(row["result"] == word for row in rows)]
    scale = {"domain": list(_COLORS), "range": list(_COLORS.values())}
    legend = {"title": None, "orient": "bottom", "values": shown, "symbolOpacity": 1}
    color = {"field": "result", "type": "nominal", "scale": scale, "legend": legend}
    log = {"type": "log", "nice": False, "padding": 28}
    x = {"field": "ratio", "type": "quantitative", "scale": log, "axis": _ratio_axis(rows)}
    names = [row["metric"] for row in rows]
    y = {"field": "metric", "type": "nominal", "sort": names, "axis": {"title": None, "labelLimit": 220, "grid": False}}
    tooltip = [{"field": name} for name in ("metric", "text", "verdict")]
    low, high = {"field": "low", "type": "quantitative", "title": None}, {"field": "high"}
    one = {"type": "rule", "strokeDash": [4, 3], "color": "#94a3b8"}
    bar, dot = {"type": "rule", "strokeWidth": 4, "opacity": 0.45}, {"type": "circle", "size": 90, "opacity": 1}
    return {
        "data": {"values": rows},
        "height": {"step": 36},
        "config": {"view": {"strokeWidth": 0}},
        "layer": [
            {"data": {"values": [{"ratio": 1.0}]}, "mark": one, "encoding": {"x": x}},
            {"mark": bar, "encoding": {"x": low, "x2": high, "y": y, "color": color, "tooltip": tooltip}},
            {"mark": dot, "encoding": {"x": x, "y": y, "color": color, "tooltip": tooltip}},
            {
                "mark": {"type": "text", "dy": -11, "fontSize": 11},
                "encoding": {"x": x, "y": y, "text": {"field": "text"}, "color": color},
            },
        ],
    }


def _ratio_axis(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Round ratios inside the range, from the coarsest ladder that has three of them."""
    low, high = min(1.0, *(row["low"] for row in rows)), max(1.0, *(row["high"] for row in rows))
    for ladder in _LADDERS:
        inside = [step for step in ladder if low * 0.99 <= step <= high * 1.01]
        if len(inside) >= 3:
            break
    return {"title": None, "values": inside, "labelExpr": "datum.value + '×'", "grid": False, "labelOverlap": False}


def result_word(item: MetricComparison) -> str:
    """The colour class of a metric: who is better, or that no difference was shown."""
    if item.better is not None:
        return f"{item.better} is better"
    shown = item.ci_low is not None and item.ci_high is not None and not item.ci_low <= 1.0 <= item.ci_high
    return "neither" if shown and item.higher_is_better is None else "no difference shown"


def _single_runs(runs_a: Sequence[RunResult], runs_b: Sequence[RunResult]) -> None:
    """Every run as a point; the two runs of a repeat are joined, since they had the same requests."""
    st.markdown("**Single runs** :small[:gray[a line joins the two runs of a repeat]]")
    measured = [compare(runs_a, runs_b, metric) for metric in _POINTS]
    measured = [item for item in measured if item.values_a and item.values_b]
    for row in range(0, len(measured), 2):
        for column, item in zip(st.columns(2), measured[row : row + 2], strict=False):
            column.markdown(f":small[{item.label}, {item.unit}]")
            column.vega_lite_chart(_pairs(item), width="stretch", key=f"pairs-{item.metric}")


def _pairs(item: MetricComparison) -> dict[str, Any]:
    rows = [
        {"setting": letter, "value": value, "repeat": index + 1}
        for letter, values in (("A", item.values_a), ("B", item.values_b))
        for index, value in enumerate(values)
    ]
    x = {"field": "setting", "type": "nominal", "axis": {"title": None, "labelAngle": 0}, "scale": {"padding": 0.5}}
    y = {"field": "value", "type": "quantitative", "axis": {"title": None, "tickCount": 4}, "scale": {"zero": False}}
    color = {"field": "setting", "type": "nominal", "scale": {"domain": ["A", "B"]}, "legend": None}
    tooltip = [{"field": "setting"}, {"field": "repeat"}, {"field": "value", "type": "quantitative", "format": ",.2f"}]
    line = {"type": "line", "strokeWidth": 1, "opacity": 0.35, "color": "#94a3b8"}
    lines = {"mark": line, "encoding": {"x": x, "y": y, "detail": {"field": "repeat", "type": "nominal"}}}
    point = {"type": "circle", "size": 55, "opacity": 0.9}
    points = {"mark": point, "encoding": {"x": x, "y": y, "color": color, "tooltip": tooltip}}
    return {"data": {"values": rows}, "height": 130, "layer": [lines, points] if item.paired else [points]}


def _quality(runs_a: Sequence[RunResult], runs_b: Sequence[RunResult]) -> None:
    """What a lossy setting costs, beside its speed; nothing where neither setting can change the output."""
    measured = [(letter, runs[0]) for letter, runs in (("A", runs_a), ("B", runs_b)) if runs]
    if not any(run.metrics.get("perplexity") is not None for _, run in measured):
        return
    st.markdown("**Quality cost** :small[:gray[on the bundled text, against the weights as the file stores them]]")
    rows = [
        {
            "": letter,
            **{label: _quality_value(run, name) for name, label in _QUALITY},
            "Measured against": plain(reference_text(run)) or "–",
        }
        for letter, run in measured
    ]
    st.table(pd.DataFrame(rows).set_index(""), border="horizontal")
    notes = [event.summary for _, run in measured for event in run.events if event.summary.startswith("quality:")]
    if notes:
        st.caption(plain(notes[-1].rpartition("(")[2].rstrip(")").capitalize()) + ".")


def _quality_value(run: RunResult, name: str) -> str:
    value = run.metrics.get(name)
    if value is None:
        return "–"
    error = run.metrics.get(f"{name}_se")
    unit = METRICS[name].unit
    text = f"{value:.4g}{'' if error is None else f' ± {error:.2g}'}"
    return f"{text} {unit}".rstrip()


def _claims(runs_a: Sequence[RunResult], runs_b: Sequence[RunResult], change: Mapping[str, tuple[Any, Any]]) -> None:
    """What the literature claims of this change, beside what was measured here."""
    claims = claims_for(change)
    if not claims:
        return
    st.markdown("**The literature's claim beside the measurement**")
    for claim in claims:
        verdict = judge_claim(claim, compare(runs_a, runs_b, claim.metric))
        word, color = _CLAIM_BADGES[verdict.status]
        with st.container(border=True, gap="small"):
            st.markdown(f"**{claim.title}** · claimed: {claim.text} :{color}-badge[{word}]")
            st.caption(f"{plain(verdict.text)} {claim.caveat}")


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
        words = plain(name.replace("_", " "))
        rows.append({"": words, "A": f"{mark}{plain(a)}{mark}", "B": f"{mark}{plain(b)}{mark}"})
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
