"""The inputs of the Plan page. Every one is kept in the URL, so that a plan can be shared as a link."""

from __future__ import annotations

import dataclasses
from typing import Any

import streamlit as st

from engine.capacity import Gpu, Objectives, PlannedWorkload, PlanRequest
from pages.plan.details import details
from pages.plan.engine import engine_options
from pages.plan.fields import key, state
from pages.plan.goal import planned_load
from pages.plan.hardware import hardware, precisions
from pages.plan.model import chosen_model


@dataclasses.dataclass(frozen=True, slots=True)
class PlanInputs:
    """What the inputs ask for; ``rate`` is None where the goal is a number of users."""

    request: PlanRequest
    workload: PlannedWorkload
    objectives: Objectives
    rate: float | None
    price: float | None


def plan_inputs() -> PlanInputs | None:
    """Draw the inputs.

    Returns:
        What they ask for; None (with the error shown) where the model cannot be read.
    """
    with st.container(border=True):
        st.markdown("**I want to serve**")
        spec = chosen_model()
        if spec is None:
            return None
    with st.container(border=True):
        st.markdown("**to**")
        load = planned_load(spec)
    with st.container(border=True):
        st.markdown("**on**")
        gpu, parallel = hardware(spec)
        precisions(spec)
    with st.container(border=True):
        st.markdown("**with**")
        options = engine_options(load.concurrency)
    with st.expander("Traffic, speculation, adapters, price", icon=":material/tune:"):
        work, extra, price = details(spec, load.prompt, load.answer, gpu)
    request = PlanRequest(
        spec,
        gpu,
        weights=state("weights"),
        kv_dtype=state("kv"),
        context=load.context,
        concurrency=load.concurrency,
        **parallel,
        **options,
        **extra,
    )
    return PlanInputs(request, work, load.objectives, load.rate, price)


def apply_changes(changes: dict[str, Any]) -> None:
    """Put the fields of a remedy into the inputs (a button's callback, before the page is drawn again)."""
    names = {"kv_dtype": "kv", "max_num_seqs": "max-seqs", "profile": "engine"}
    for field, value in changes.items():
        st.session_state[key(names.get(field, field))] = value.name if isinstance(value, Gpu) else value
