"""One run, opened: its figures, its course, its requests, and everything needed to repeat it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

import pandas as pd
import streamlit as st

from engine.measure.metrics import PERCENTILES as METRIC_PERCENTILES
from engine.measure.metrics import percentile
from engine.measure.results import RequestRecord, RunResult
from engine.measure.workloads import WORKLOADS
from pages.history.charts import (
    PERCENTILES,
    histogram,
    latencies,
    marks_table,
    request_timeline,
    samples_table,
    time_chart,
)
from pages.shared.actions import act, show_problem
from pages.shared.energy import ENERGY_METRICS, PER_TOKEN, energy_words, has_energy
from pages.shared.messages import bytes_text, value_text
from pages.shared.run_values import (
    HEADLINES,
    QUALITY,
    STATUS_COLORS,
    changed_knobs,
    code_text,
    disturbance_lines,
    known_knobs,
    metric_info,
    metric_text,
    moment_text,
    number_text,
    reference_text,
    run_name,
    setting_words,
    status_words,
)
from pages.shared.text import badge_label, code, plain
from storage import RunRow, Store

_TABS = ("Over time", "Latencies", "Requests", "All metrics", "Provenance")
_TIMELINE_MOST = 400
_DISTURBANCES_SHOWN = 5


def run_detail(store: Store, row: RunRow, run: RunResult) -> None:
    """Draw everything that is recorded of a run."""
    _heading(store, row, run)
    _outcome(store, row, run)
    if run.metrics:
        _headlines(run)
    tabs = st.tabs(list(_TABS), key="history-tab", on_change="rerun")
    for tab, draw in zip(tabs, (_over_time, _latencies, _requests, _all_metrics, _provenance), strict=True):
        if tab.open is not False:  # only the tab that is seen is drawn
            with tab:
                draw(run)


def _heading(store: Store, row: RunRow, run: RunResult) -> None:
    with st.container(horizontal=True, vertical_alignment="center", gap="small"):
        st.subheader(plain(run_name(run)), anchor=False, width="content")
        for words in status_words(row):
            st.badge(badge_label(words), color=STATUS_COLORS.get(words, "gray"))  # type: ignore[arg-type]
        for words in setting_words(run.provenance.config):
            st.badge(badge_label(words), color="gray")
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
            show_problem(key)
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
        show_problem("mark-failed")


def _headlines(run: RunResult) -> None:
    names = (*HEADLINES, PER_TOKEN) if has_energy(run) else HEADLINES
    columns = st.columns(len(names) + 1)
    for column, name in zip(columns, names, strict=False):
        info = metric_info(name)
        column.metric(info.label, metric_text(name, run.metrics.get(name)), help=info.definition, border=True)
    done = sum(request.finish_reason in ("stop", "length") for request in run.requests)
    columns[-1].metric("Requests done", f"{done:,} / {len(run.requests):,}", border=True)


def _over_time(run: RunResult) -> None:
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
                chart = time_chart(table, columns, marks, stacked=stacked, labels=start == 0)
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


def _latencies(run: RunResult) -> None:
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
                words = f"{name}, ms; {len(found[name]):,} values, {percentiles} (dashed)"
                st.markdown(f"**{titles[name]}** :small[:gray[{words}]]")
                st.altair_chart(histogram(found[name]), width="stretch", key=f"history-{name}")


def _requests(run: RunResult) -> None:
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


def _all_metrics(run: RunResult) -> None:
    if not run.metrics:
        st.caption("Nothing was measured.")
        return
    st.markdown("**Latencies** :small[:gray[ms]]")
    st.table(_latency_table(run.metrics), border="horizontal")
    st.markdown("**Energy and GPU**")
    st.caption(energy_words(run))
    measured = {name: run.metrics[name] for name in ENERGY_METRICS if run.metrics.get(name) is not None}
    if measured:
        _metric_table(measured)
    st.markdown("**Everything else**")
    rest = (name for name in run.metrics if name not in ENERGY_METRICS and not name.startswith(tuple(_LATENCIES)))
    _metric_table({name: run.metrics[name] for name in rest}, reference_text(run))


def _metric_table(metrics: Mapping[str, float | None], reference: str = "") -> None:
    """A line a metric; ``reference`` stands beside every figure of quality."""
    rows = []
    for name, value in metrics.items():
        info = metric_info(name)
        aside = f" **{plain(reference)}**" if reference and name in QUALITY else ""
        rows.append(
            {
                "Metric": plain(info.label),
                "Value": plain(metric_text(name, value)),
                "What it is": f"{info.definition}{aside}",
            }
        )
    st.table(pd.DataFrame(rows).set_index("Metric"), border="horizontal")


_LATENCIES = {"ttft_ms": "TTFT", "tpot_ms": "TPOT", "itl_ms": "ITL", "e2e_ms": "E2E latency"}
_STATISTICS = ("mean", *(f"p{n}" for n in METRIC_PERCENTILES))


def _latency_table(metrics: Mapping[str, float | None]) -> pd.DataFrame:
    """A line a latency, a column a statistic."""
    rows = []
    for start, label in _LATENCIES.items():
        values = {name: metrics.get(f"{start}_{name}") for name in _STATISTICS}
        texts = {name: "–" if value is None else number_text(value) for name, value in values.items()}
        definition = metric_info(f"{start}_mean").definition.removeprefix("Mean of: ")
        rows.append({"Latency": label, **texts, "What it is": definition})
    return pd.DataFrame(rows).set_index("Latency")


def _provenance(run: RunResult) -> None:
    provenance = run.provenance
    left, right = st.columns(2, gap="large")
    with left:
        _facts("Identity", _identity(run), is_markdown=True)
        _facts("Path that ran", provenance.path)
        _facts("Workload", _flat(provenance.workload))
    with right:
        _knob_table(provenance.config)
        _facts("Versions", provenance.versions)
        _facts("Hardware", _hardware(provenance.hardware))
    _repeat(run)


def _identity(run: RunResult) -> dict[str, str]:
    """Which run this is, as Markdown."""
    provenance = run.provenance
    dirty = {True: "yes: the tree had changes", False: "no", None: "unknown"}[provenance.code_dirty]
    facts = {
        "Run": code(run.run_id),
        "Model": plain(provenance.model),
        "Model fingerprint": code(provenance.model_fingerprint) or "–",
        "Config hash": code(provenance.config_hash) or "–",
        "Workload hash": code(provenance.workload_hash) or "–",
        "Seed": str(provenance.seed),
        "Code revision": code(provenance.code_revision) or "–",
        "Code changed": dirty,
    }
    if run.comparison_id:
        facts["Comparison"] = f"{code(run.comparison_id)}, arm {plain(str(run.arm))}"
    return facts


def _hardware(hardware: Mapping[str, Any]) -> dict[str, Any]:
    """Byte counts become readable; lists of GPUs become a line each."""
    readable: dict[str, Any] = {}
    for name, value in _flat(hardware).items():
        is_bytes = name.endswith("memory_bytes") and isinstance(value, (int, float))
        readable[name.removesuffix("_bytes")] = bytes_text(value) if is_bytes else value
    return readable


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, list):
            value = {str(number + 1): item for number, item in enumerate(value)} if _nested(value) else value
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{name} "))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _nested(items: list[Any]) -> bool:
    return any(isinstance(item, Mapping) for item in items)


def _facts(title: str, facts: Mapping[str, Any], *, is_markdown: bool = False) -> None:
    st.markdown(f"**{title}**")
    if not facts:
        st.caption("Not recorded.")
        return
    shown = str if is_markdown else plain
    words = {shown(name.replace("_", " ")): shown(_fact_text(value)) for name, value in facts.items()}
    st.table(words, border="horizontal", hide_header=True)


def _fact_text(value: Any) -> str:
    if value is None or value == "" or value == []:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(str(item) for item in value) if isinstance(value, list) else str(value)


def _knob_table(config: Mapping[str, Any]) -> None:
    changed = changed_knobs(config)
    st.markdown(f"**Knobs** :small[:gray[bold: not at its default, {len(changed)} of {len(config)}]]")
    if not config:
        st.caption("Not recorded.")
        return
    labels = known_knobs().labels
    rows = {
        _marked(labels.get(name, name), name in changed): _marked(value_text(value), name in changed)
        for name, value in config.items()
    }
    st.table(rows, border="horizontal", hide_header=True)


def _marked(text: str, bold: bool) -> str:
    return f"**{plain(text)}**" if bold else plain(text)


def _repeat(run: RunResult) -> None:
    """The command that repeats the run, and the workload as a file where it is not one of the named ones."""
    provenance = run.provenance
    if not provenance.workload or not provenance.config:
        return
    st.markdown("**Repeat this run** :small[:gray[on the same code revision and hardware]]")
    named = WORKLOADS.get(str(provenance.workload.get("name")))
    is_named = named is not None and json.loads(json.dumps(named.to_dict())) == provenance.workload
    st.code(repeat_command(run, named=is_named), language="bash", wrap_lines=True)
    if not is_named:
        st.download_button(
            "workload.json",
            json.dumps(provenance.workload, indent=1),
            file_name="workload.json",
            mime="application/json",
            icon=":material/download:",
            on_click="ignore",
            key="history-workload-file",
        )


def repeat_command(run: RunResult, *, named: bool) -> str:
    """The shell command line that measures the same again and puts it on record."""
    provenance = run.provenance
    workload = str(provenance.workload["name"]) if named else "workload.json"
    words = ["python", "-m", "engine", "bench", "--model", provenance.model, "--workload", workload]
    words += ["--seed", str(provenance.seed)]
    for name, value in changed_knobs(provenance.config).items():
        words += ["--set", f"{name}={value_text(value)}"]
    return f"{shlex.join([*words, '--json'])} | python -m storage record"
