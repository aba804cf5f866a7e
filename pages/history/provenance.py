"""Where a run comes from: identity, path, workload, knobs, versions, hardware, and how to repeat it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

import streamlit as st

from engine.measure.results import RunResult
from engine.measure.workloads import WORKLOADS
from pages.shared.messages import bytes_text, value_text
from pages.shared.run_values import changed_knobs, known_knobs
from pages.shared.text import code, plain


def provenance_tab(run: RunResult) -> None:
    """Draw everything that is needed to repeat the run, and the command that does."""
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
    shown_facts = {shown(name.replace("_", " ")): shown(_fact_text(value)) for name, value in facts.items()}
    st.table(shown_facts, border="horizontal", hide_header=True)


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
    arguments = ["headroom", "bench", "--model", provenance.model, "--workload", workload]
    arguments += ["--seed", str(provenance.seed)]
    for name, value in changed_knobs(provenance.config).items():
        arguments += ["--set", f"{name}={value_text(value)}"]
    return f"{shlex.join([*arguments, '--json'])} | headroom history record"
