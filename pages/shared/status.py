"""The strip under the navigation: is the worker loading, ready or dead, and is a run in progress?"""

from __future__ import annotations

import json

import streamlit as st

from engine.measure.results import to_json
from engine.outputs import EngineStatus
from pages.background.recorder import Job
from pages.services import Services, WorkerView
from pages.shared.callbacks import act, show_action_error
from pages.shared.messages import seconds_text
from pages.shared.text import badge_label, plain

_INTERVAL_S = {"loading": 0.5, "ready": 2.0, "failed": 5.0, "dead": None}


def status_strip(services: Services) -> None:
    """Draw the strip; it polls fast while something changes and not at all once the worker is dead.

    It is also what wakes a page that stands still: one that sets ``drawn_version`` is drawn again when the feed has
    another one (see :attr:`pages.background.feed.Snapshot.version`), so that it needs no poll of its own.
    """
    st.session_state["drawn_version"] = None
    phase = services.view().phase
    st.session_state["worker_phase"] = phase
    st.fragment(_strip, run_every=_INTERVAL_S[phase])(services)


def _strip(services: Services) -> None:
    view = services.view()
    if view.phase != st.session_state.get("worker_phase"):
        st.rerun()  # the whole page depends on the phase, and so does the pace of this strip
    if view.phase == "loading":
        _loading(view)
    elif view.phase == "ready":
        _ready(services)
        _previous_model(view)
    elif view.phase == "failed":
        _failed(view)
    else:
        _dead(services, view)
    for job in services.recorder.unrecorded():
        _unrecorded(services, job)


def _loading(view: WorkerView) -> None:
    text = f"Loading **{plain(view.model)}**: {plain(view.stage)}"
    if view.progress is None:
        st.progress(0.0, text=text)
    else:
        st.progress(min(max(float(view.progress), 0.0), 1.0), text=f"{text} ({100 * float(view.progress):.0f} %)")


def _ready(services: Services) -> None:
    snapshot = services.feed.read(max_age_s=1.5, samples=False)
    drawn = st.session_state.get("drawn_version")
    if drawn is not None and drawn != snapshot.version and not snapshot.error:
        st.rerun()  # a page that stands still while nothing happens has something new to draw
    engine = snapshot.engine
    with st.container(horizontal=True, vertical_alignment="center", gap="small"):
        if engine is None:
            st.badge("Not answering", icon=":material/hourglass_empty:", color="orange")
            st.caption(plain(snapshot.error or "waiting for the engine"))
            return
        st.badge("Ready", icon=":material/check_circle:", color="green")
        st.caption(_ready_line(engine), width="content")
        job = services.recorder.active()
        if job is not None:
            st.badge(badge_label(_job_line(job)), icon=":material/science:", color="blue")


def _previous_model(view: WorkerView) -> None:
    """While another model is being loaded while the previous one serves, and after that has failed."""
    if view.progress is not None and view.progress < 1.0:
        st.progress(min(max(float(view.progress), 0.0), 1.0), text=plain(view.stage))
    if view.error:
        told = plain(f"The last load failed: {view.error.rstrip('.')}. {view.remedy or ''}")
        st.warning(f"{told} **{plain(view.model)}** keeps serving.", icon=":material/warning:")


def _ready_line(engine: EngineStatus) -> str:
    path = engine.path
    facts = [f"**{plain(engine.model.get('name', '?'))}**"]
    facts += [plain(path[name]) for name in ("device", "dtype") if path.get(name)]
    facts.append(f"weights {plain(engine.config.get('weights'))}")
    facts.append(f"{engine.running} running, {engine.waiting} waiting")
    return " · ".join(facts)


def _job_line(job: Job) -> str:
    share = f" {100 * job.done / job.total:.0f} %" if job.total else ""
    eta = f", {seconds_text(job.eta_s)} left" if job.eta_s is not None else ""
    return f"{job.title}:{share}{eta}" if share or eta else job.title


def _failed(view: WorkerView) -> None:
    reason = (view.error or "unknown reason").rstrip(".")
    st.error(
        f"**{plain(view.model)}** could not be loaded: {plain(reason)}. {plain(view.remedy or '')} "
        "Choose another model or other limits under *Load model* on the Live page.",
        icon=":material/error:",
    )
    _log(view)


def _dead(services: Services, view: WorkerView) -> None:
    left, right = st.columns([5, 1], vertical_alignment="center")
    lost = ", ".join(f"**{plain(job.title)}**" for job in services.lost_jobs())
    told = f" The run in progress ({lost}) is recorded as failed." if lost else ""
    left.error(
        f"The engine worker has stopped: {plain(view.ending)}.{told} Everything recorded before is intact.",
        icon=":material/dangerous:",
    )
    right.button(
        "Restart worker",
        type="primary",
        icon=":material/restart_alt:",
        width="stretch",
        on_click=act,
        args=("restart", services.restart),
    )
    show_action_error("restart")
    _log(view)


def _log(view: WorkerView) -> None:
    if view.log:
        with st.expander("Last lines of the worker's log", icon=":material/terminal:"):
            st.code("\n".join(view.log[-30:]), language=None)


def _unrecorded(services: Services, job: Job) -> None:
    st.error(
        f"**{plain(job.title)}** was measured but could not be recorded: {plain(job.storage_error)} "
        "Free some space or repair the database, then try again; or keep the result as a file.",
        icon=":material/save:",
    )
    document = json.dumps([to_json(result) for result in job.unrecorded], indent=1)
    with st.container(horizontal=True):
        place = f"retry-{job.job_id}"
        st.button(
            "Try again", key=place, icon=":material/refresh:", on_click=act, args=(place, services.recorder.retry, job)
        )
        st.download_button(
            "Download JSON",
            document,
            file_name=f"headroom-{job.job_id[:8]}.json",
            mime="application/json",
            key=f"download-{job.job_id}",
            icon=":material/download:",
            on_click="ignore",
        )
        st.button(
            "Discard",
            key=f"discard-{job.job_id}",
            icon=":material/delete:",
            on_click=act,
            args=(place, services.recorder.forget, job),
        )
    show_action_error(place)
