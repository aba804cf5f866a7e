"""Plan: what fits on which GPUs, how fast it is and what it costs, before anything is bought, rented or loaded."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from engine.capacity import Deployment, Plan, concurrency_curve, deploy, what_would_fit
from engine.capacity.advice.deployment import assumptions_of
from engine.capacity.text import gib
from engine.errors import HeadroomError
from pages.plan.answer import answer, remedies
from pages.plan.curve import concurrency_chart
from pages.plan.formula import formulas
from pages.plan.inputs import PlanInputs, plan_inputs
from pages.plan.latency import load_chart
from pages.plan.memory import memory_bar
from pages.plan.roofline import roofline_chart
from pages.plan.saved import launch, save_and_compare
from pages.plan.search import hardware_search
from pages.plan.tradeoffs import pareto_chart, tornado_chart
from pages.shared.messages import show_error
from pages.shared.text import plain


def main() -> None:
    """Draw the page: the question on the left, the answer on the right."""
    left, right = st.columns([1, 2.6], gap="medium")
    with left:
        inputs = plan_inputs()
    with right:
        if inputs is None:
            _no_model()
            return
        try:
            _result(inputs)
        except HeadroomError as error:
            show_error(error)


def _result(inputs: PlanInputs) -> None:
    found = deploy(inputs.request, inputs.workload, inputs.objectives, inputs.rate, inputs.price)
    answer(found)
    with st.container(border=True):
        memory_bar(found.plan)
    if not found.plan.fits:
        remedies(found.plan, what_would_fit(inputs.request))
    elif found.point is not None:
        _load(found)
    if found.point is not None:
        hardware_search(inputs, inputs.rate or max(found.point.rate, 1e-3))
    with st.expander("KV cache of a request: the formula with its numbers", icon=":material/function:"):
        formulas(found.plan)
    _memory_details(inputs, found)
    if found.plan.fits:
        launch(found)
    save_and_compare(found)
    with st.expander("What these numbers rest on", icon=":material/info:"):
        st.markdown("\n".join(f"- {plain(line)}" for line in (*found.plan.assumptions, *assumptions_of(found))))


def _load(found: Deployment) -> None:
    """Charts of latency, roofline, sensitivity and alternatives."""
    left, right = st.columns(2, gap="small")
    with left, st.container(border=True, height="stretch"):
        load_chart(found)
    with right, st.container(border=True, height="stretch"):
        roofline_chart(found)
    left, right = st.columns(2, gap="small")
    with left, st.container(border=True, height="stretch"):
        tornado_chart(found)
    with right, st.container(border=True, height="stretch"):
        pareto_chart(found)


def _memory_details(inputs: PlanInputs, found: Deployment) -> None:
    left, right = st.columns([1.6, 1], gap="small")
    curve = concurrency_curve(found.plan.request.as_request())
    with left, st.container(border=True, height="stretch"):
        if curve[0].max_concurrency > 0:  # the shortest context: where it does not fit, nothing does
            concurrency_chart(found.plan, curve)
        else:
            st.markdown("**Not even the shortest request fits**")
            st.caption("The weights and what the engine needs besides them leave no room for a KV cache.")
    with right, st.container(border=True, height="stretch"):
        _parameters(found.plan)


_PART_NAMES = {"mlp": "MLP", "recurrent": "recurrent layers"}


def _parameters(result: Plan) -> None:
    count = result.parameters
    st.markdown(f"**Parameters: {count.total:,}**")
    rows = [
        {"part": _PART_NAMES.get(part, part), "parameters": f"{size:,}", "share": f"{100 * size / count.total:.1f} %"}
        for part, size in count.by_part().items()
        if size
    ]
    st.table(pd.DataFrame(rows).set_index("part"))
    tied = "The head is the embedding, stored once. " if result.request.spec.tie_word_embeddings else ""
    active = f"A token passes through {count.active:,} of them. " if count.active < count.total else ""
    st.caption(f"{active}{tied}{gib(result.kv_bytes_per_sequence)} of KV cache a request on each GPU.")


def _no_model() -> None:
    st.info("Choose a model on the left, or upload its config.json, to see what it needs.", icon=":material/upload:")


main()
