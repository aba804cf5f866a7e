"""With which serving engine, and what it may use."""

from __future__ import annotations

from typing import Any

import streamlit as st

from engine.capacity import PROFILES, find_profile
from pages.plan.fields import DEFAULTS, MOST_REQUESTS, choice, widget


def engine_options(concurrency: int) -> dict[str, Any]:
    """Draw the engine and its limits; these fields of the request."""
    profile = find_profile(
        choice(
            "Serving engine",
            "engine",
            {profile.name: profile.label for profile in PROFILES},
            "How the engine spends memory besides weights and KV cache; fitted on what it reported on real GPUs.",
        )
    )
    utilization = st.slider(
        "Memory utilization (share of each GPU)",
        min_value=0.5,
        max_value=1.0,
        value=DEFAULTS["utilization"],
        step=0.01,
        help="The engine uses at most this share; the rest stays free for the driver, CUDA graphs and other processes.",
        **widget("utilization"),
    )
    if profile.batch_is_concurrency:
        return {"profile": profile.name, "utilization": utilization}
    most = st.number_input(
        "Largest batch (requests)",
        min_value=1,
        max_value=MOST_REQUESTS,
        value=None,
        step=1,
        placeholder=f"auto {max(profile.max_num_seqs, concurrency)}",
        help="max_num_seqs: the engine reserves memory for logits of that many requests, whether they come or not.",
        **widget("max-seqs"),
    )
    return {
        "profile": profile.name,
        "utilization": utilization,
        "max_num_seqs": None if most is None else int(most),
    }
