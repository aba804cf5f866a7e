"""What a lossy setting costs in quality, and what the literature claims of a change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import streamlit as st

from engine.measure.claims import claims_for, judge_claim
from engine.measure.comparison import compare
from engine.measure.metrics import METRICS
from engine.measure.results import RunResult
from pages.shared.run_values import reference_text
from pages.shared.text import plain

_QUALITY = (
    ("perplexity", "Perplexity (lower is better)"),
    ("kl_mean_nats", "KL divergence, mean"),
    ("kl_p99_nats", "KL divergence, 99th percentile"),
    ("same_top_percent", "Same most likely token"),
)
_CLAIM_BADGES = {
    "confirmed": ("agrees", "green"),
    "above": ("more than claimed", "green"),
    "below": ("less than claimed", "orange"),
    "none": ("not shown here", "gray"),
    "opposite": ("the opposite here", "red"),
    "unmeasured": ("not measured", "gray"),
}


def quality_cost(runs_a: Sequence[RunResult], runs_b: Sequence[RunResult]) -> None:
    """What a lossy setting costs, next to its speed; nothing where neither setting can change the output."""
    measured = [(arm, runs[0]) for arm, runs in (("A", runs_a), ("B", runs_b)) if runs]
    if not any(run.metrics.get("perplexity") is not None for _, run in measured):
        return
    st.markdown("**Quality cost** :small[:gray[on the bundled text, against the weights as the file stores them]]")
    rows = [
        {
            "": arm,
            **{label: _quality_value(run, name) for name, label in _QUALITY},
            "Measured against": plain(reference_text(run)) or "–",
        }
        for arm, run in measured
    ]
    st.table(pd.DataFrame(rows).set_index(""), border="horizontal")
    notes = [event.summary for _, run in measured for event in run.events if event.summary.startswith("quality:")]
    if notes:
        st.caption(plain(notes[-1].rpartition("(")[2].rstrip(")").capitalize()) + ".")


def _quality_value(run: RunResult, name: str) -> str:
    value = run.metrics.get(name)
    if value is None:
        return "–"
    error = run.metrics.get(f"{name}_se")
    unit = METRICS[name].unit
    text = f"{value:.4g}{'' if error is None else f' ± {error:.2g}'}"
    return f"{text} {unit}".rstrip()


def claims(runs_a: Sequence[RunResult], runs_b: Sequence[RunResult], change: Mapping[str, tuple[Any, Any]]) -> None:
    """What the literature claims of this change, next to what was measured here."""
    found = claims_for(change)
    if not found:
        return
    st.markdown("**The literature's claim next to the measurement**")
    for claim in found:
        verdict = judge_claim(claim, compare(runs_a, runs_b, claim.metric))
        word, color = _CLAIM_BADGES[verdict.status]
        with st.container(border=True, gap="small"):
            st.markdown(f"**{claim.title}** · claimed: {claim.text} :{color}-badge[{word}]")
            st.caption(f"{plain(verdict.text)} {claim.caveat}")
