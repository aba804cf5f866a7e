"""What the loaded model is, how busy it is, and what really runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import streamlit as st

from engine.outputs import EngineStatus
from pages.background.feed import Snapshot
from pages.shared.messages import bytes_text, seconds_text
from pages.shared.quality_reference import reference_note
from pages.shared.text import plain


def engine_facts(engine: EngineStatus, snapshot: Snapshot) -> None:
    """Draw the figures of now, how far a preparation is, and the details to unfold."""
    model, totals = engine.model, engine.totals
    since = snapshot.taken_unix_s - 3.0
    recent = [step for step in snapshot.steps[-400:] if step.time_unix_s > since] if snapshot.busy else []
    speed = sum(step.output_tokens for step in recent) / 3.0
    columns = st.columns(5)
    columns[0].metric(
        "Tokens/s", f"{speed:,.1f}" if recent else "idle", help="Output tokens, mean of the last 3 seconds."
    )
    columns[1].metric("Running / waiting", f"{engine.running} / {engine.waiting}")
    used = sum(state in "us" for state in engine.blocks)
    columns[2].metric("KV in use", f"{100 * used / max(engine.num_blocks, 1):.1f} %", help=_capacity_text(engine))
    columns[3].metric(
        "Tokens out", f"{totals.get('output_tokens', 0):,}", help="Output tokens since the model was loaded."
    )
    columns[4].metric("Preempted", f"{totals.get('preemptions', 0):,}", help="Preemptions since the model was loaded.")
    _preparation(engine.execution)
    with st.expander(plain(_model_line(model, engine.path.get("execution", "eager"))), icon=":material/info:"):
        st.table(_details(engine), border="horizontal")


def _preparation(execution: Mapping[str, Any]) -> None:
    """How far the preparation of an execution mode is, and what could not be prepared."""
    running = execution.get("preparing")
    if running:
        current = f", now {plain(running['current'])}" if running["current"] else ""
        text = f"Preparing **{plain(execution['asked'])}**: {running['done']} of {running['total']} shapes{current}"
        share = running["done"] / max(running["total"], 1)
        st.progress(share, text=f"{text} ({seconds_text(running['seconds'])}). Requests are served meanwhile.")
    for failure in execution.get("failed", ()):
        text = plain(f"{failure['tokens']} tokens stay eager: {failure['error']}")
        st.warning(f"**{plain(execution['asked'])}**: {text}", icon=":material/warning:")


def _execution_text(execution: Mapping[str, Any], *, stepped: bool) -> str:
    """What was asked for, what is prepared, and what the last step ran, if there was one."""
    prepared = ", ".join(execution.get("prepared", ())) or "nothing"
    asked, last = execution.get("asked", "eager"), execution.get("last", "eager")
    if asked == last == "eager":
        return "eager"
    if last == "eager" and not execution.get("prepared"):
        return f"{asked}: eager ({execution.get('reason', '')})"
    ran = f"the last step ran {last} ({execution.get('reason', '')})" if stepped else "no step has run yet"
    return f"{asked}, prepared for {prepared} tokens; {ran}"


def _capacity_text(engine: EngineStatus) -> str:
    tokens = engine.num_blocks * engine.block_size
    return f"{engine.num_blocks:,} blocks of {engine.block_size} tokens hold {tokens:,} tokens."


def _model_line(model: Mapping[str, Any], execution: str) -> str:
    parameters = float(model.get("parameters") or 0) / 1e6
    size = f"{parameters / 1000:.2f} B" if parameters >= 1000 else f"{parameters:.0f} M"
    facts = f"{model.get('name')}: {size} parameters, {model.get('layers')} layers, {execution} execution"
    return f"{facts} · what really runs"


def _details(engine: EngineStatus) -> dict[str, str]:
    model = engine.model
    heads = f"{model.get('heads')} query, {model.get('kv_heads')} key/value"
    facts = {
        "Family": f"{model.get('family')}, from {model.get('source')}",
        "Stored as": str(model.get("stored_as") or "unknown"),
        "Quality": reference_note(str(model.get("stored_as", ""))),
        "Attention heads": f"{heads}, {model.get('head_dim')} wide",
        "Context": f"{engine.max_model_len:,} tokens (the model's own: {int(model.get('context_length') or 0):,})",
        "KV cache": f"{_capacity_text(engine)} {bytes_text(engine.memory.kv_cache)}.",
        "Execution": _execution_text(engine.execution, stepped=engine.totals.get("requests", 1) > 0),
        "Fingerprint": str(model.get("fingerprint", ""))[:16],
    }
    facts |= {f"Path: {name.replace('_', ' ')}": str(value) for name, value in engine.path.items()}
    return {plain(name): plain(fact) for name, fact in facts.items()}
