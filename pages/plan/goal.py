"""What is wanted: the load, the lengths of requests, and the objectives of latency."""

from __future__ import annotations

import dataclasses

import streamlit as st

from engine.capacity import ModelSpec, Objectives
from pages.plan.fields import DEFAULTS, MOST_REQUESTS, key, milliseconds, number, optional_number, widget

LOADS = {"users": "users at once", "rate": "requests a second"}
_USUAL_PROMPT, _USUAL_ANSWER = 2000, 300


@dataclasses.dataclass(frozen=True, slots=True)
class PlannedLoad:
    """The load that is planned for.

    Attributes:
        concurrency: requests in flight at once; 1 where ``rate`` is given.
        rate: requests a second, None where the load is a number of users.
        context: longest request, tokens; prompt, answer: tokens of a request on average.
        objectives: limits of latency.
    """

    concurrency: int
    rate: float | None
    context: int
    prompt: int
    answer: int
    objectives: Objectives


def planned_load(spec: ModelSpec) -> PlannedLoad:
    """Draw the fields of the load, of the lengths and of the objectives."""
    load = st.segmented_control(
        "The load is a number of",
        list(LOADS),
        default=DEFAULTS["load"],
        format_func=lambda option: LOADS[option],
        help="Users at once: each has one request in flight and sends the next when it is answered. Requests a second: "
        "they arrive at random, however many are still in flight.",
        required=True,
        **widget("load"),
    )
    left, right = st.columns(2)
    concurrency, rate = 1, None
    with left:
        if load == "rate":
            value = st.number_input(
                "Requests a second",
                min_value=0.01,
                max_value=100_000.0,
                value=DEFAULTS["rate"],
                step=0.5,
                help="Arrivals a second, on average, at the busiest time.",
                **widget("rate"),
            )
            rate = float(value or 0.01)
        else:
            concurrency = number(
                "Concurrent requests",
                "concurrency",
                1,
                MOST_REQUESTS,
                "How many requests of the planned context are to be held at the same time.",
            )
    with right:
        context = _context(spec)
    left, right = st.columns(2)
    answer_auto = min(_USUAL_ANSWER, max(1, context // 4))
    with right:
        answer = optional_number(
            "Answer (tokens)", "answer", 2**31, answer_auto, "Output tokens of a request, on average."
        )
    with left:
        prompt_auto = max(1, min(_USUAL_PROMPT, context - answer))
        prompt = optional_number(
            "Prompt (tokens)", "prompt", 2**31, prompt_auto, "Input tokens of a request, on average."
        )
    return PlannedLoad(concurrency, rate, context, prompt, answer, _objectives())


def _context(spec: ModelSpec) -> int:
    longest = spec.max_position
    value = st.session_state.get(key("context"))
    if isinstance(value, int) and value > longest:
        st.session_state[key("context")] = longest
    context = st.number_input(
        "Context (tokens)",
        min_value=1,
        max_value=longest,
        value=min(DEFAULTS["context"], longest),
        step=1024 if longest > 4096 else 128,
        help="Longest that one request may be, prompt and answer together: memory is planned for it. This model goes "
        f"up to {longest:,} tokens.",
        **widget("context"),
    )
    return int(context or 1)


def _objectives() -> Objectives:
    left, right = st.columns(2)
    with left:
        ttft = milliseconds("First token (ms, p95)", "ttft", "Time to first token, 95th percentile. Empty: any.")
    with right:
        tpot = milliseconds("Each token (ms, p95)", "tpot", "Time per output token, 95th percentile. Empty: any.")
    return Objectives(ttft, tpot)
