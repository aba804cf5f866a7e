"""The choice of a named workload, and the progress of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import streamlit as st

from pages.background.recorder import Job
from pages.services import Services
from pages.shared.callbacks import act, show_action_error
from pages.shared.messages import seconds_text, show_error
from pages.shared.text import plain


def workload_choice(services: Services, key: str) -> Mapping[str, Any] | None:
    """A select box over the worker's named workloads, with what the chosen one asks of the engine below it."""
    try:
        workloads = services.workloads()
    except Exception as error:
        show_error(error)
        return None
    by_name = {item["name"]: item for item in workloads}
    name = st.selectbox("Workload", list(by_name), key=key, persist_state="session")
    if name is None:
        return None
    chosen = by_name[name]
    st.caption(plain(chosen.get("description", "")))
    return chosen


def progress(services: Services, job: Job) -> None:
    """Progress bar, time left and the cancel button of a running job."""
    share = min(job.done / job.total, 1.0) if job.total else 0.0
    left = f", about {seconds_text(job.eta_s)} left" if job.eta_s is not None else ""
    st.progress(share, text=f"**{plain(job.title)}**: {plain(job.detail or 'starting')}{left}")
    place = f"cancel-{job.job_id}"
    st.button("Cancel", icon=":material/cancel:", key=place, on_click=act, args=(place, services.recorder.cancel, job))
    show_action_error(place)
