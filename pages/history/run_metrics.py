"""Every metric of one run, with what it is and, where it is of quality, its reference."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
import streamlit as st

from engine.measure.metrics import PERCENTILES as METRIC_PERCENTILES
from engine.measure.results import RunResult
from pages.shared.energy import ENERGY_METRICS, energy_text
from pages.shared.run_values import QUALITY, metric_info, metric_text, number_text, reference_text
from pages.shared.text import plain


def all_metrics(run: RunResult) -> None:
    """Draw the latencies, the energy, and every other metric with its definition."""
    if not run.metrics:
        st.caption("Nothing was measured.")
        return
    st.markdown("**Latencies** :small[:gray[ms]]")
    st.table(_latency_table(run.metrics), border="horizontal")
    st.markdown("**Energy and GPU**")
    st.caption(energy_text(run))
    measured = {name: run.metrics[name] for name in ENERGY_METRICS if run.metrics.get(name) is not None}
    if measured:
        _metric_table(measured)
    st.markdown("**Everything else**")
    rest = (name for name in run.metrics if name not in ENERGY_METRICS and not name.startswith(tuple(_LATENCIES)))
    _metric_table({name: run.metrics[name] for name in rest}, reference_text(run))


def _metric_table(metrics: Mapping[str, float | None], reference: str = "") -> None:
    """A line a metric; ``reference`` stands next to every figure of quality."""
    rows = []
    for name, value in metrics.items():
        info = metric_info(name)
        aside = f" **Measured against: {plain(reference)}.**" if reference and name in QUALITY else ""
        rows.append(
            {
                "Metric": plain(info.label),
                "Value": plain(metric_text(name, value)),
                "What it is": f"{info.definition}{aside}",
            }
        )
    st.table(pd.DataFrame(rows).set_index("Metric"), border="horizontal")


_LATENCIES = {"ttft_ms": "TTFT", "tpot_ms": "TPOT", "itl_ms": "ITL", "e2e_ms": "E2E latency"}
_STATISTICS = ("mean", *(f"p{n}" for n in METRIC_PERCENTILES))


def _latency_table(metrics: Mapping[str, float | None]) -> pd.DataFrame:
    """A line a latency, a column a statistic."""
    rows = []
    for start, label in _LATENCIES.items():
        values = {name: metrics.get(f"{start}_{name}") for name in _STATISTICS}
        texts = {name: "–" if value is None else number_text(value) for name, value in values.items()}
        definition = metric_info(f"{start}_mean").definition.removeprefix("Mean of: ")
        rows.append({"Latency": label, **texts, "What it is": definition})
    return pd.DataFrame(rows).set_index("Latency")
