"""Plan: what fits on which GPUs, before anything is bought, rented or loaded."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from engine.capacity import Plan, PlanRequest, concurrency_curve, plan, what_would_fit
from engine.capacity.words import gib
from engine.errors import HeadroomError
from pages.widgets.messages import show_error
from pages.widgets.plan_answer import answer, remedies
from pages.widgets.plan_curve import concurrency_chart
from pages.widgets.plan_formula import formulas
from pages.widgets.plan_inputs import plan_inputs
from pages.widgets.plan_memory import memory_bar


def main() -> None:
    """Draw the page: the question at the left, the answer at the right."""
    left, right = st.columns([1, 2.6], gap="medium")
    with left:
        request = plan_inputs()
    with right:
        if request is None:
            _no_model()
            return
        try:
            _result(request)
        except HeadroomError as problem:
            show_error(problem)


def _result(request: PlanRequest) -> None:
    result = plan(request)
    answer(result)
    with st.container(border=True):
        memory_bar(result)
    if not result.fits:
        remedies(result, what_would_fit(request))
    formulas(result)
    left, right = st.columns([1.6, 1], gap="small")
    curve = concurrency_curve(request)
    drawn = curve[0].max_concurrency > 0  # the shortest context: where it does not fit, nothing does
    with left, st.container(border=True, height="stretch"):
        if drawn:
            concurrency_chart(result, curve)
        else:
            st.markdown("**What these numbers rest on**")
            _assumptions(result)
    with right, st.container(border=True, height="stretch"):
        _parameters(result)
    if drawn:
        with st.expander("What these numbers rest on", icon=":material/info:"):
            _assumptions(result)


def _assumptions(result: Plan) -> None:
    st.markdown("\n".join(f"- {line}" for line in result.assumptions))


def _parameters(result: Plan) -> None:
    st.markdown(f"**Parameters: {result.parameters.total:,}**")
    total = result.parameters.total
    rows = [
        {"part": part if part != "mlp" else "MLP", "parameters": f"{count:,}", "share": f"{100 * count / total:.1f} %"}
        for part, count in result.parameters.by_part().items()
        if count
    ]
    st.table(pd.DataFrame(rows).set_index("part"))
    tied = "The head is the embedding, stored once. " if result.request.spec.tie_word_embeddings else ""
    st.caption(f"{tied}{gib(result.kv_bytes_per_sequence)} of KV cache a request on each GPU.")


def _no_model() -> None:
    st.info("Choose a model at the left, or upload its config.json, to see what it needs.", icon=":material/upload:")


main()
