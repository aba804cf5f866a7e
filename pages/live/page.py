"""Live: tune the loaded model while it serves, chat with it, load it with traffic, watch what happens."""

from __future__ import annotations

import time

import streamlit as st

from pages.background.feed import Snapshot
from pages.live.cache import cache_and_memory
from pages.live.changes import current_config, settle_change
from pages.live.charts import live_charts
from pages.live.chat import chat, streams
from pages.live.event_log import clock_text, event_log
from pages.live.facts import engine_facts
from pages.live.knob_panel import knob_panel
from pages.live.load_model import load_form
from pages.live.series import bin_steps, event_marks
from pages.live.telemetry_charts import telemetry_charts
from pages.live.toasts import show_toasts
from pages.live.workload_launcher import workload_launcher
from pages.services import Services, get_services

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
    """Draw the page: knobs on the left, charts in the middle, chat and workloads on the right."""
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
        config = current_config(snapshot)
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
        engine_facts(engine, snapshot)
    steps = snapshot.steps
    if not steps:
        when = "with the first request: send a prompt or run a workload." if ready else "once the model is ready."
        st.info(f"Charts appear {when}", icon=":material/monitoring:")
    else:
        _history_charts(snapshot, was_busy)
    if engine is not None:
        cache_and_memory(services, engine)


def _hardware(services: Services) -> None:
    snapshot = services.feed.latest()
    span, end = _WINDOWS[st.session_state.get("live-window") or "1 min"], snapshot.taken_unix_s
    with st.container(border=True):
        telemetry_charts(snapshot.samples, event_marks(snapshot.events, end_unix_s=end, window_s=span), end, span)


def _config_moved(snapshot: Snapshot) -> bool:
    shown = st.session_state.get("config_shown")
    if snapshot.engine is None or shown is None or st.session_state.get("pending_change") is not None:
        return False
    return bool(shown != current_config(snapshot))


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


def _last_event(snapshot: Snapshot) -> float:
    return snapshot.events[-1].time_unix_s if snapshot.events else 0.0


main()
