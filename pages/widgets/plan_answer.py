"""The answer of a plan: one sentence, the figures an operator asks for, and what to do where it does not fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import streamlit as st

from engine.capacity import Plan, Remedy
from engine.capacity.words import gib
from pages.widgets.plan_inputs import apply_changes, key, size_text


def fleet(plan: Plan) -> str:
    """The hardware in words: ``"4 × H100 SXM 80GB"``."""
    count = plan.request.tp * plan.request.pp
    name = plan.request.gpu.name
    return f"{count} × {name}" if count > 1 or not name.startswith("this") else name


def requests_text(count: int) -> str:
    """``"1 request"``, ``"32 concurrent requests"``."""
    return "1 request" if count == 1 else f"{count:,} concurrent requests"


def sentence(plan: Plan) -> str:
    """The answer in one sentence.

    For example "4 × H100 SXM 80GB hold Llama-3.1-70B with 32 concurrent requests of 8,192 tokens; there is room for
    57."
    """
    asked = plan.request
    goal = f"{asked.spec.name} with {requests_text(asked.concurrency)} of {asked.context:,} tokens"
    several = asked.tp * asked.pp > 1
    each = " on each" if several else ""
    if not plan.fits:
        verb = "cannot hold"
        return f"{fleet(plan)} {verb} {goal}: {gib(plan.shortfall)} are missing{each}."
    room = f"; there is room for {plan.max_concurrency:,}" if plan.max_concurrency > asked.concurrency else ""
    return f"{fleet(plan)} {'hold' if several else 'holds'} {goal}{room}."


def answer(plan: Plan) -> None:
    """Draw the sentence and the figures."""
    icon = ":green[:material/check_circle:]" if plan.fits else ":red[:material/cancel:]"
    st.subheader(f"{icon} {sentence(plan)}", anchor=False)
    each = " per GPU" if plan.request.tp * plan.request.pp > 1 else ""
    columns = st.columns(4)
    columns[0].metric(
        "Largest concurrency",
        f"{plan.max_concurrency:,}",
        **_below(f"requests of {plan.request.context:,} tokens"),
        help="How many requests of the planned context the KV cache holds at the same time.",
        border=True,
    )
    columns[1].metric(
        "Longest context",
        f"{plan.max_context:,}",
        **_below(f"tokens for {requests_text(plan.request.concurrency).replace(' concurrent', '')}"),
        help=f"At the planned concurrency; the model itself goes up to {plan.request.spec.max_position:,} tokens.",
        border=True,
    )
    columns[2].metric(
        f"KV cache{each}",
        gib(plan.memory.kv),
        **_below(f"{plan.kv_tokens:,} tokens"),
        help=f"{plan.kv_tokens:,} tokens in {plan.kv_blocks:,} blocks of {plan.request.block_size}; "
        f"{plan.kv_bytes_per_token:,} bytes a token{each}.",
        border=True,
    )
    columns[3].metric(
        f"Weights{each}",
        gib(plan.memory.weights),
        **_below(f"{size_text(plan.parameters.total)} parameters"),
        help=f"{plan.parameters.total:,} parameters in {plan.request.weights}, as the engine holds them.",
        border=True,
    )
    for warning in plan.warnings:
        st.caption(f":orange[:material/warning:] {warning}")


def _below(text: str) -> dict[str, Any]:
    """Arguments of a metric that put a line of plain text under its value."""
    return {"delta": text, "delta_color": "off", "delta_arrow": "off"}


def remedies(plan: Plan, found: Sequence[Remedy]) -> None:
    """What would make it fit, best first, each with a button that puts it into the inputs."""
    with st.container(border=True, gap="small"):
        st.markdown("**What would make it fit**")
        if not found:
            st.markdown("No single change does. Start from fewer or shorter requests, or from larger GPUs.")
            return
        st.caption("Each was planned again and fits. From what costs least to what costs most:")
        for index, remedy in enumerate(found):
            _remedy(index, remedy)


def _remedy(index: int, remedy: Remedy) -> None:
    text, spare, button = st.columns([5, 2, 1], vertical_alignment="center")
    text.markdown(f"{index + 1}. **{remedy.title}** :gray[– {remedy.cost}]")
    spare.markdown(f":gray[leaves {gib(remedy.spare_bytes)}]")
    button.button(
        "Apply",
        key=key(f"remedy-{remedy.kind}"),
        on_click=apply_changes,
        args=(remedy.changes,),
        help="Put this into the inputs.",
        width="stretch",
    )
