"""Live: tune the loaded model while it serves, chat with it, load it with traffic, watch what happens."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import streamlit as st

from engine.outputs import EngineStatus
from pages.background.feed import Snapshot
from pages.live.block_map import block_map
from pages.live.charts import live_charts
from pages.live.chat import chat, streams
from pages.live.event_log import clock_text, event_log
from pages.live.memory import memory_bar
from pages.live.telemetry_charts import telemetry_charts
from pages.services import Services, get_services
from pages.shared.knobs import config_in_force, knob_panel, load_form, settle_change, show_toasts
from pages.shared.messages import bytes_text, seconds_text
from pages.shared.quality_reference import reference_note
from pages.shared.series import bin_steps, event_marks
from pages.shared.text import plain
from pages.shared.workloads import workload_launcher

_BUSY_S = 1.0
# While nothing happens only ages and the hardware's curves move; the strip at the top wakes the page at once.
_IDLE_S = 30.0
_CHANGES_S = 5.0
_HARDWARE_S = {True: 4.0, False: 15.0}  # busy or not: each drawing takes processor time from an engine on the CPU
_CHANGE_S = 0.4
_BINS = 60
_STEPS_OF_A_WINDOW = 300
_WINDOWS = {"1 min": 60.0, "5 min": 300.0, "15 min": 900.0}


def main() -> None:
    """Draw the page: knobs at the left, charts in the middle, chat and workloads at the right."""
    services = get_services()
    phase = services.view().phase
    ready = phase == "ready"
    snapshot = services.feed.read() if ready else services.feed.latest()
    left, middle, right = st.columns([1.05, 2.1, 1.35], gap="medium")
    st.session_state["drawn_version"] = snapshot.version if ready else None
    with left:
        _controls(services, snapshot, phase)
    with middle:
        _monitor(services, snapshot, ready)
    with right:
        tab_chat, tab_workload = st.tabs([":material/chat: Chat", ":material/science: Workload"])
        with tab_chat:
            chat(services, ready=ready)
        with tab_workload:
            workload_launcher(services, ready=ready)
        moving = _is_busy(services, snapshot)
        st.fragment(_changes, run_every=(_CHANGES_S if moving else _IDLE_S) if ready else None)(services)
    show_toasts()  # last: a rerun that a part above asks for throws away what this run has shown


def _changes(services: Services) -> None:
    snapshot = services.feed.latest()
    event_log(snapshot.events, time.time())


def _controls(services: Services, snapshot: Snapshot, phase: str) -> None:
    if phase == "ready" and snapshot.engine is not None:
        pending = st.session_state.get("pending_change") is not None
        st.fragment(_knobs, run_every=_CHANGE_S if pending else None)(services, pending)
    else:
        st.caption("The controls appear when the model is ready.")
    if phase in ("ready", "failed"):
        with st.expander("Load model", icon=":material/deployed_code_update:", expanded=phase == "failed"):
            load_form(services, services.knobs(), snapshot.engine.config if snapshot.engine else {})


def _knobs(services: Services, was_pending: bool) -> None:
    pending = settle_change(services)
    if pending != was_pending:
        st.rerun()
    snapshot = services.feed.read()
    if snapshot.engine is not None:
        config = config_in_force(snapshot)
        st.session_state["config_shown"] = config
        knob_panel(services, services.knobs(), config)
    show_toasts()


def _monitor(services: Services, snapshot: Snapshot, ready: bool) -> None:
    window = st.session_state.get("live-window") or "1 min"
    busy = ready and _is_busy(services, snapshot)
    pace = max(_BUSY_S, _WINDOWS[window] / _STEPS_OF_A_WINDOW)  # a long window moves too slowly to be drawn each second
    interval = (pace if busy else _IDLE_S) if ready else None
    st.fragment(_charts, run_every=interval)(services, ready, busy, window)
    st.fragment(_hardware, run_every=_HARDWARE_S[busy] if ready else None)(services)


def _is_busy(services: Services, snapshot: Snapshot) -> bool:
    return snapshot.busy or services.recorder.active() is not None or any(stream.active for stream in streams())


def _charts(services: Services, ready: bool, was_busy: bool, window: str) -> None:
    snapshot = services.feed.read() if ready else services.feed.latest()
    engine = snapshot.engine
    if ready and (_is_busy(services, snapshot) != was_busy or _config_moved(snapshot)):
        st.rerun()  # another pace, or another client changed a knob
    if engine is not None:
        _facts(engine, snapshot)
    steps = snapshot.steps
    if not steps:
        words = "with the first request: send a prompt or run a workload." if ready else "once the model is ready."
        st.info(f"Charts appear {words}", icon=":material/monitoring:")
    else:
        _history_charts(snapshot, was_busy)
    if engine is not None:
        _memory(services, engine)


def _hardware(services: Services) -> None:
    snapshot = services.feed.latest()
    span, end = _WINDOWS[st.session_state.get("live-window") or "1 min"], snapshot.taken_unix_s
    with st.container(border=True):
        telemetry_charts(snapshot.samples, event_marks(snapshot.events, end_unix_s=end, window_s=span), end, span)


def _config_moved(snapshot: Snapshot) -> bool:
    shown = st.session_state.get("config_shown")
    if snapshot.engine is None or shown is None or st.session_state.get("pending_change") is not None:
        return False
    return bool(shown != config_in_force(snapshot))


def _facts(engine: EngineStatus, snapshot: Snapshot) -> None:
    model, totals = engine.model, engine.totals
    since = snapshot.taken_unix_s - 3.0
    recent = [step for step in snapshot.steps[-400:] if step.time_unix_s > since] if snapshot.busy else []
    speed = sum(step.output_tokens for step in recent) / 3.0
    columns = st.columns(5)
    columns[0].metric(
        "Tokens/s", f"{speed:,.1f}" if recent else "idle", help="Output tokens, mean of the last 3 seconds."
    )
    columns[1].metric("Running / waiting", f"{engine.running} / {engine.waiting}")
    used = sum(letter in "us" for letter in engine.blocks)
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
        words = plain(f"{failure['tokens']} tokens stay eager: {failure['error']}")
        st.warning(f"**{plain(execution['asked'])}**: {words}", icon=":material/warning:")


def _execution_text(execution: Mapping[str, Any]) -> str:
    prepared = ", ".join(execution.get("prepared", ())) or "nothing"
    asked, last = execution.get("asked", "eager"), execution.get("last", "eager")
    if asked == last == "eager":
        return "eager"
    if last == "eager" and not execution.get("prepared"):
        return f"{asked}: eager ({execution.get('reason', '')})"
    return f"{asked}, prepared for {prepared} tokens; the last step ran {last} ({execution.get('reason', '')})"


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
        "Stored as": reference_note(str(model.get("stored_as", ""))),
        "Attention heads": f"{heads}, {model.get('head_dim')} wide",
        "Context": f"{engine.max_model_len:,} tokens (the model's own: {int(model.get('context_length') or 0):,})",
        "KV cache": f"{_capacity_text(engine)} {bytes_text(engine.memory.kv_cache)}.",
        "Execution": _execution_text(engine.execution),
        "Fingerprint": str(model.get("fingerprint", ""))[:16],
    }
    facts |= {f"Path: {name.replace('_', ' ')}": str(value) for name, value in engine.path.items()}
    return {plain(name): plain(fact) for name, fact in facts.items()}


def _history_charts(snapshot: Snapshot, busy: bool) -> None:
    end = snapshot.taken_unix_s if busy else max(snapshot.steps[-1].time_unix_s, _last_event(snapshot))
    now = time.time()
    with st.container(horizontal=True, horizontal_alignment="distribute", vertical_alignment="center"):
        st.caption("Live" if busy else f"Idle. The last step was {clock_text(end, now)}.", width="content")
        window = st.segmented_control(
            "Window", list(_WINDOWS), default="1 min", key="live-window", label_visibility="collapsed", required=True
        )
    span = _WINDOWS[window or "1 min"]
    table = bin_steps(snapshot.steps, end_unix_s=end, window_s=span, bins=_BINS)
    live_charts(table, event_marks(snapshot.events, end_unix_s=end, window_s=span), span)


def _prefix_hits(engine: EngineStatus) -> str:
    asked, hits = (engine.totals.get(f"prefix_{name}_tokens", 0) for name in ("query", "hit"))
    share = f"{100 * hits / asked:.0f} % of {asked:,} prompt tokens" if asked else "no prompt looked up yet"
    return f"prefix hits: {share}"


def _reset_prefix_cache(services: Services) -> None:
    try:
        text = f"Prefix cache reset: {services.client.reset_prefix_cache():,} blocks forgotten."
    except Exception as error:  # the worker may be gone
        text = f"The prefix cache could not be reset: {plain(error)}"
    st.session_state.setdefault("toasts", []).append(text)


def _resize(services: Services) -> None:
    try:
        before, after = services.client.resize().changed.get("num_blocks", (0, 0))
        text = (
            f"The KV cache holds {after:,} blocks now (before: {before:,})." if after else "Nothing to take any more."
        )
    except Exception as error:  # memory that is not there after all, or the worker may be gone
        text = f"The KV cache stays as it is: {error}"
    st.session_state.setdefault("toasts", []).append(text)


def _last_event(snapshot: Snapshot) -> float:
    return snapshot.events[-1].time_unix_s if snapshot.events else 0.0


def _memory(services: Services, engine: EngineStatus) -> None:
    with st.container(border=True):
        with st.container(horizontal=True, horizontal_alignment="distribute", vertical_alignment="center"):
            st.markdown(f"**KV cache blocks** · {_prefix_hits(engine)}", width="content")
            st.button(
                "Reset",
                key="reset-prefix-cache",
                icon=":material/mop:",
                help="Forget every reusable prefix. Requests in flight keep their blocks.",
                on_click=_reset_prefix_cache,
                args=(services,),
            )
        block_map(engine.blocks, engine.block_size)
    with st.container(border=True):
        st.markdown("**Memory**")
        memory_bar(engine.memory)
        if engine.resize:
            tokens = engine.resize["num_blocks"] * engine.block_size
            gained = bytes_text(engine.resize["gained_bytes"])
            st.button(
                f"Give the KV cache {gained} more",
                key="resize-cache",
                icon=":material/expand:",
                help=f"Lighter weights have left this memory: {tokens:,} tokens would fit. Running requests are "
                "computed again with the tokens they have; heavier weights take the memory back.",
                on_click=_resize,
                args=(services,),
            )


main()
