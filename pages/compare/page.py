"""Compare: the same workload under setting A and setting B on the loaded model, interleaved, with its uncertainty."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import streamlit as st

from engine.measure.results import RunResult
from pages.background.recorder import Job
from pages.compare.results import results
from pages.compare.setup import setup_form
from pages.services import Services, get_services
from pages.shared.messages import show_error
from pages.shared.text import plain
from pages.shared.workloads import progress
from storage import StorageError, UnshowableRun

_POLL_S = 1.0


def main() -> None:
    """Draw the page: the question on the left, the answer on the right."""
    services = get_services()
    ready = services.view().phase == "ready"
    engine = services.feed.read().engine if ready else None
    left, right = st.columns([1, 2.6], gap="medium")
    with left:
        if engine is None:
            st.caption("A comparison can be started when the model is ready. Earlier ones can be read at any time.")
        else:
            _setup(services, engine.config)
    with right:
        _answer(services)


def _setup(services: Services, config: Mapping[str, Any]) -> None:
    job = services.recorder.active()
    with st.container(border=True):
        setup_form(services, config, busy=job is not None)
    if job is not None and job.kind == "bench":
        st.fragment(_wait_for, run_every=_POLL_S)(job)


def _wait_for(job: Job) -> None:
    """Give the form free when a workload that was started on Live has ended."""
    if not job.active:
        st.rerun()


def _answer(services: Services) -> None:
    job = _comparison_job(services)
    if job is not None and job.active:
        st.fragment(_progress, run_every=_POLL_S)(services, job)
        return
    recorded = _recorded(services)
    current = {_key(job): job.title} if job is not None and _key(job) not in recorded else {}
    options = {**current, **{key: text for key, (text, _) in recorded.items()}}
    if not options:
        _empty()
        return
    default = _key(job) if job is not None else None
    chosen = _choice(options, default)
    if job is not None and chosen == _key(job):
        _ending(job)
    runs = job.results if job is not None and chosen == _key(job) else _read(services, recorded[chosen][1])
    if runs:
        results(runs)


def _comparison_job(services: Services) -> Job | None:
    return next((job for job in services.recorder.jobs() if job.kind == "compare"), None)


def _key(job: Job) -> str:
    """The comparison's id once a run of it is known, else the job's."""
    return next((run.comparison_id for run in job.results if run.comparison_id), job.job_id)


def _progress(services: Services, job: Job) -> None:
    if not job.active:
        st.rerun()
    progress(services, job)
    if len(job.results) >= 2:
        st.caption("So far:")
        results(job.results, final=False)


def _recorded(services: Services) -> dict[str, tuple[str, list[str]]]:
    """Comparisons on record: id → (title, run ids), newest first."""
    try:
        rows = services.store().list_comparisons()
    except Exception as error:
        show_error(error)
        return {}
    return {
        row.comparison_id: (
            f"{time.strftime('%Y-%m-%d %H:%M', time.localtime(row.started_unix_s))} · "
            f"{row.label or row.workload_name} · {row.model}",
            [run_id for run_ids in row.run_ids.values() for run_id in run_ids],
        )
        for row in rows
    }


def _choice(options: Mapping[str, str], default: str | None) -> str:
    keys = list(options)
    if default is not None and st.session_state.get("compare-seen") != default:
        st.session_state["compare-seen"] = default  # a comparison that has just ended comes to the front
        st.session_state["compare-open"] = default
    if st.session_state.get("compare-open") not in options:
        st.session_state["compare-open"] = keys[0]
    return st.selectbox("Comparison", keys, format_func=lambda key: options[key], key="compare-open")


def _ending(job: Job) -> None:
    if job.state == "failed":
        st.error(f"The comparison failed. {plain(job.error or '')} Finished runs are kept.", icon=":material/error:")
    elif job.state == "cancelled":
        st.warning("The comparison was cancelled. Finished runs are kept.", icon=":material/cancel:")


def _read(services: Services, run_ids: Sequence[str]) -> list[RunResult]:
    """The runs that can be shown; a message about each other one."""
    try:
        found = services.store().read_runs(run_ids)
    except Exception as error:
        show_error(error)
        return []
    for run in found:
        if isinstance(run, UnshowableRun):
            show_error(StorageError(f"run {run.run_id} cannot be shown: {run.reason}.", remedy="Delete it in History."))
    return [run for run in found if isinstance(run, RunResult)]


def _empty() -> None:
    with st.container(border=True):
        st.markdown("**Nothing compared yet**")
        st.markdown(
            "Choose a question on the left. The loaded model then runs the workload under A and under B in turn, "
            "with the same requests in each pair, so that drift of the machine falls on both. Here you will see:\n\n"
            "- each metric of A and B with its spread, and the difference with a 95 % interval\n"
            "- every single run\n"
            "- what the literature claims of this change, next to what was measured on this machine\n"
            "- which code path really ran"
        )


main()
