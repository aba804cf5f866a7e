"""What most plans leave at its default: traffic, speculation, adapters, price, and the serving engine."""

from __future__ import annotations

from typing import Any

import streamlit as st

from engine.capacity import Gpu, ModelSpec, PlannedWorkload, model_names, model_spec, parameter_count
from pages.plan.fields import DEFAULTS, NGRAM, choice, key, number, widget

#: Coefficients of variation of (prompts, answers).
VARIATIONS = {"equal": (0.0, 0.0), "varied": (0.5, 0.5), "wild": (1.0, 1.0)}


def details(
    spec: ModelSpec, prompt: int, answer: int, gpu: Gpu
) -> tuple[PlannedWorkload, dict[str, Any], float | None]:
    """Draw the details; the workload, further fields of the request, and the price in $ an hour if one is given."""
    variation = choice(
        "Lengths of requests",
        "lengths",
        {"equal": "all equal", "varied": "varied (cv 0.5)", "wild": "very different (cv 1)"},
        "How far prompts and answers differ: cv is the standard deviation over the mean. Equal lengths queue least.",
    )
    burst = st.number_input(
        "Burstiness of arrivals (1 = Poisson)",
        min_value=0.1,
        max_value=100.0,
        value=DEFAULTS["burst"],
        step=0.5,
        help="Squared coefficient of variation of the gaps between arrivals. 4 is a bursty day.",
        **widget("burst"),
    )
    hit = number("Prefix cache hits (% of prompt tokens)", "hit", 0, 99, "Prompt tokens that need no computing.", 5)
    drafter = _drafter(spec)
    left, right = st.columns(2)
    with left:
        draft = number("Draft length (tokens)", "draft", 0, 16, "Tokens drafted a round of speculation; 0: off.")
    with right:
        accepted = number("Accepted drafts (%)", "acceptance", 0, 100, "Probability that a drafted token is right.", 5)
    left, right = st.columns(2)
    with left:
        lora = number("LoRA adapters (rank 16)", "lora", 0, 1000, "Adapters that are loaded at the same time.")
    with right:
        price = st.number_input(
            "Price ($/h a GPU)",
            min_value=0.0,
            max_value=10_000.0,
            value=None,
            step=0.1,
            placeholder="unknown" if gpu.price_usd_hour is None else f"catalog: {gpu.price_usd_hour:,.2f}",
            help="What you pay for one GPU, US dollars an hour. The catalog's figures are round ones to begin with.",
            **widget("price"),
        )
    cvs = VARIATIONS[variation]
    work = PlannedWorkload(prompt, answer, *cvs, float(burst or 1.0), hit / 100, draft, accepted / 100, None)
    extra = {"lora_adapters": lora, "draft": drafter if draft else None}
    return work, extra, None if price is None else float(price)


def _drafter(spec: ModelSpec) -> ModelSpec | None:
    """The model that drafts; None for n-gram look-up."""
    count = parameter_count(spec).total
    smaller = [
        name
        for name in sorted(model_names(), key=str.lower)
        if model_spec(name).vocab_size == spec.vocab_size and parameter_count(model_spec(name)).total < count / 2
    ]
    if st.session_state.get(key("drafter"), NGRAM) not in (NGRAM, *smaller):  # chosen for another model
        st.session_state[key("drafter")] = NGRAM
    chosen = choice(
        "Drafts come from",
        "drafter",
        {name: name for name in (NGRAM, *smaller)},
        "What proposes tokens for speculation: a search in the text itself, which costs nothing, or a smaller model of "
        "the same vocabulary, which lives on the same GPUs. It counts where the draft length is above 0.",
    )
    return None if chosen == NGRAM else model_spec(chosen)
