"""Start a named workload on the loaded model and follow it."""

from __future__ import annotations

import streamlit as st

from pages.background.recorder import Job
from pages.services import Services
from pages.shared.callbacks import act, show_action_error
from pages.shared.links import HISTORY, link_to
from pages.shared.text import plain
from pages.shared.workloads import progress, workload_choice

_POLL_S = 1.0
_HEADLINES = (
    ("output_tokens_s", "Output tokens/s", "{:,.1f}"),
    ("ttft_ms_p50", "TTFT p50", "{:,.0f} ms"),
    ("tpot_ms_mean", "TPOT mean", "{:,.1f} ms"),
    ("e2e_ms_p99", "End to end p99", "{:,.0f} ms"),
)


def workload_launcher(services: Services, *, ready: bool) -> None:
    """The launcher with its progress; polls only while a job runs."""
    active = services.recorder.active() is not None
    st.fragment(_launcher, run_every=_POLL_S if active else None)(services, ready, active)


def _launcher(services: Services, ready: bool, was_active: bool) -> None:
    job = services.recorder.active()
    if (job is not None) != was_active:
        st.rerun()
    if not ready:
        st.caption("Workloads can be run once the model is ready.")
    else:
        _start_form(services, busy=job is not None)
    for past in services.recorder.jobs()[:3]:
        if past.kind == "bench":
            job_card(services, past)


def _start_form(services: Services, *, busy: bool) -> None:
    workload = workload_choice(services, "live-workload")
    if workload is None:
        return
    left, right = st.columns([1, 1.4], vertical_alignment="bottom")
    left.number_input("Seed", 0, 2**31 - 1, 0, key="live-seed", persist_state="session")
    label = "A run is in progress" if busy else "Run and record"
    right.button(
        label,
        type="primary",
        icon=":material/play_arrow:",
        disabled=busy,
        width="stretch",
        key="live-run",
        on_click=act,
        args=("live-run", _launch, services),
    )
    show_action_error("live-run")


def _launch(services: Services) -> None:
    name, seed = str(st.session_state["live-workload"]), int(st.session_state["live-seed"])
    services.recorder.launch({"workload": name, "seed": seed, "label": name}, title=name)


def job_card(services: Services, job: Job) -> None:
    """Progress of a job while it runs, its headline numbers or its error afterwards."""
    title = plain(job.title)
    with st.container(border=True, gap="small"):
        if job.active:
            progress(services, job)
        elif job.state == "completed" and job.results:
            st.markdown(f"**{title}** :green-badge[recorded]" if not job.unrecorded else f"**{title}**")
            _headlines(job)
            link_to(HISTORY, run=job.results[-1].run_id)
        else:
            color = "red" if job.state == "failed" else "gray"
            st.markdown(f"**{title}** :{color}-badge[{job.state}]")
            if job.error:
                st.caption(plain(job.error))


def _headlines(job: Job) -> None:
    metrics = job.results[-1].metrics
    shown = [(label, form.format(metrics[name])) for name, label, form in _HEADLINES if metrics.get(name) is not None]
    for row in range(0, len(shown), 2):
        for column, (label, text) in zip(st.columns(2), shown[row : row + 2], strict=False):
            column.metric(label, text)
