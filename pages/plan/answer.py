"""The answer of a plan: one sentence, the figures an operator asks for, and what to do where it does not fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import streamlit as st

from engine.capacity import Deployment, OperatingPoint, Plan, Remedy
from engine.capacity.advice.deployment import warnings_of
from engine.capacity.text import gib
from pages.plan.fields import key
from pages.plan.inputs import apply_changes
from pages.plan.model import size_text
from pages.shared.text import plain


def fleet(plan: Plan) -> str:
    """The hardware in words: ``"4 × H100 SXM 80GB"``."""
    count = plan.request.gpus
    name = plan.request.gpu.name
    return f"{count} × {name}" if count > 1 or not name.startswith("this") else name


def requests_text(count: int) -> str:
    """``"1 request"``, ``"32 concurrent requests"``."""
    return "1 request" if count == 1 else f"{count:,} concurrent requests"


def sentence(answer: Deployment) -> str:
    """The answer in one sentence, as Markdown.

    For example "4 × H100 SXM 80GB hold Llama-3.1-70B with 32 concurrent requests of 8,192 tokens: TTFT p95 390 ms, 28
    ms a token, $1.23 per million output tokens, 41 % headroom."
    """
    plan, asked = answer.plan, answer.plan.request
    several = asked.gpus > 1
    model, hardware = plain(asked.spec.name), plain(fleet(plan))
    goal = f"{model} with {requests_text(asked.concurrency)} of {asked.context:,} tokens"
    if not plan.fits:
        each = " on each" if several else ""
        return f"{hardware} cannot hold {goal}: {gib(plan.shortfall)} are missing{each}."
    if answer.rate is not None:
        goal = model
        if answer.point is not None and not answer.point.stable:
            most = answer.serving.capacity() if answer.serving else 0.0
            return f"{hardware} cannot serve {answer.rate:,.2f} requests a second of {goal}: at most {most:,.2f}."
        goal += f" at {answer.rate:,.2f} requests a second"
    return f"{hardware} {'hold' if several else 'holds'} {goal}{_quality(answer)}."


def _quality(answer: Deployment) -> str:
    """Latency, cost and headroom; the room in memory where the speeds are not known."""
    plan, point = answer.plan, answer.point
    if point is None:
        more = plan.max_concurrency > plan.request.concurrency
        return f"; there is room for {plan.max_concurrency:,}" if more else ""
    parts = [f"TTFT p95 {_ms(point.ttft_p95_s)} ms", f"{_ms(point.tpot_s)} ms a token"]
    if answer.cost.per_million_output_tokens is not None:
        parts.append(rf"\${answer.cost.per_million_output_tokens:,.2f} per million output tokens")
    if answer.headroom is not None and answer.headroom >= 0:
        parts.append(f"{100 * answer.headroom:.0f}\u00a0% headroom")
    elif not answer.meets:
        parts.append("an objective is missed")
    return f": {', '.join(parts)}"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.0f}" if seconds >= 0.02 else f"{1e3 * seconds:,.1f}"


def answer(found: Deployment) -> None:
    """Draw the sentence and the figures."""
    if not found.fits:
        icon = ":red[:material/cancel:]"
    elif found.meets or found.point is None:
        icon = ":green[:material/check_circle:]"
    else:
        icon = ":orange[:material/error:]"
    st.subheader(f"{icon} {sentence(found)}", anchor=False)
    if found.point is not None and found.point.stable:
        _load_figures(found, found.point)
    _memory_figures(found.plan)
    lines = [*found.plan.warnings, *warnings_of(found)]
    if len(lines) > 3:
        with st.expander(f"{len(lines)} warnings", icon=":material/warning:"):
            _warnings(lines)
    else:
        _warnings(lines)


def _warnings(lines: Sequence[str]) -> None:
    for line in lines:
        st.caption(f":orange[:material/warning:] {plain(line)}")


def _load_figures(found: Deployment, point: OperatingPoint) -> None:
    wanted, cost = found.objectives, found.cost
    columns = st.columns(4)
    columns[0].metric(
        "First token, p95",
        f"{_ms(point.ttft_p95_s)} ms",
        **_against(point.ttft_p95_s, wanted.ttft_s),
        help=f"Time to first token: mean {_ms(point.ttft_s)} ms, 95 % of requests within {_ms(point.ttft_p95_s)} ms, "
        f"99 % within {_ms(point.ttft_p99_s)} ms.",
        border=True,
    )
    columns[1].metric(
        "Each token, p95",
        f"{_ms(point.tpot_p95_s)} ms",
        **_against(point.tpot_p95_s, wanted.tpot_s),
        help=f"Time per output token: mean {_ms(point.tpot_s)} ms, with prompts of other requests in between; a step "
        f"that only decodes takes {_ms(point.decode_step_s)} ms.",
        border=True,
    )
    columns[2].metric(
        "Output tokens a second",
        f"{point.output_tokens_s:,.0f}",
        **_below(f"{point.total_tokens_s:,.0f} with prompts"),
        help=f"{point.rate:,.2f} requests a second; {point.running:,.0f} decode at once on each copy. Breaks first as "
        f"the load grows: {found.first_limit}.",
        border=True,
    )
    each = cost.per_million_output_tokens
    columns[3].metric(
        "Per million output tokens",
        "–" if each is None else f"${each:,.2f}",
        **_below("no price" if cost.per_hour is None else f"${cost.per_hour:,.2f} an hour"),
        help=_cost_help(found),
        border=True,
    )


def _cost_help(found: Deployment) -> str:
    cost = found.cost
    if cost.per_month is None or cost.per_million_tokens is None:
        return "Give a price on the left."
    energy = cost.kwh_per_million_output_tokens
    power = f" {cost.power_w or 0:,.0f} W; {energy:,.2f} kWh a million output tokens." if energy is not None else ""
    return (
        rf"\${cost.per_month:,.0f} a month of 730 hours; \${cost.per_million_tokens:,.3f} a million tokens, prompts "
        f"counted.{power}"
    )


def _against(value: float, objective: float | None) -> dict[str, Any]:
    """The line below a latency: how it stands against its objective."""
    if objective is None:
        return _below("no objective")
    kept = value <= objective
    text = f"objective {_ms(objective)} ms {'kept' if kept else 'missed'}"
    return {"delta": text, "delta_color": "green" if kept else "red", "delta_arrow": "off"}


def _memory_figures(plan: Plan) -> None:
    each = " per GPU" if plan.request.gpus > 1 else ""
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
        help=f"{plan.parameters.total:,} parameters in {plan.request.weights.name}, as the engine holds them.",
        border=True,
    )


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
    text.markdown(f"{index + 1}. **{plain(remedy.title)}** :gray[– {plain(remedy.cost)}]")
    spare.markdown(f":gray[leaves {gib(remedy.spare_bytes)}]")
    button.button(
        "Apply",
        key=key(f"remedy-{remedy.kind}"),
        on_click=apply_changes,
        args=(remedy.changes,),
        help="Put this into the inputs.",
        width="stretch",
    )
