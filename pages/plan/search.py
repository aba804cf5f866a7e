"""The cheapest hardware for the goal, over all GPUs of the catalog."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from engine.capacity import Goal, Solution, gpus, solve_cached
from engine.capacity.speed.workload import Objectives
from pages.plan.fields import key
from pages.plan.inputs import PlanInputs, apply_changes

_SHOWN = 8


def hardware_search(inputs: PlanInputs, rate: float) -> None:
    """A table of the cheapest deployments that reach the goal, each of which can be put into the inputs.

    Args:
        rate: requests a second to plan for; of a number of users, what they send.
    """
    with st.expander("Find the cheapest hardware for this goal", icon=":material/travel_explore:"):
        if not st.toggle("Search every GPU of the catalog", key=key("search"), help="About a second."):
            st.caption("Over GPU types, numbers, tensor parallelism, copies, and BF16 or FP8 for weights and KV cache.")
            return
        found = solve_cached(goal_of(inputs, rate))
        if not found:
            st.markdown("Nothing reaches it: relax an objective, or shorten the requests.")
            return
        shown = found[:_SHOWN]
        st.dataframe(solutions_table(shown), hide_index=True, width="stretch")
        names = [f"{item.gpus} × {item.request.gpu.name}" for item in shown]
        left, right = st.columns([3, 1], vertical_alignment="bottom")
        chosen = left.selectbox("Deployment", names, key=key("found"), help="To look at it in full.")
        item = shown[names.index(chosen)] if chosen in names else shown[0]
        right.button("Apply", on_click=apply_changes, args=(changes_of(item),), width="stretch", key=key("use-found"))


def goal_of(inputs: PlanInputs, rate: float) -> Goal:
    """What is searched for: everything but hardware and precision is as planned."""
    objectives = inputs.objectives if any((inputs.objectives.ttft_s, inputs.objectives.tpot_s)) else Objectives()
    return Goal(inputs.request, inputs.workload, objectives, rate, gpus())


def changes_of(item: Solution) -> dict[str, object]:
    """Fields of a request that make it the solution's."""
    full = item.request
    own = full.spec.checkpoint_format or full.spec.torch_dtype
    weights = "auto" if full.weights.name == own else full.weights.name
    kv_dtype = "auto" if full.kv_dtype == full.dtype.as_kv else full.kv_dtype.name
    return {"gpu": full.gpu, "tp": full.tp, "dp": full.dp, "pp": 1, "weights": weights, "kv_dtype": kv_dtype}


def solutions_table(found: tuple[Solution, ...]) -> pd.DataFrame:
    """One row a solution, for display."""
    rows = [
        {
            "hardware": f"{item.gpus} × {item.request.gpu.name}",
            "copies × GPUs": f"{item.request.dp} × {item.request.tp}",
            "weights": item.request.weights.name,
            "KV": item.request.kv_dtype.name,
            "$ an hour": None if item.cost.per_hour is None else round(item.cost.per_hour, 2),
            "$ / M output": _rounded(item.cost.per_million_output_tokens),
            "TTFT p95, ms": round(1e3 * item.point.ttft_p95_s),
            "TPOT p95, ms": round(1e3 * item.point.tpot_p95_s, 1),
            "headroom": f"{100 * (1 - item.point.rate / item.largest_rate):.0f} %",
            "power, kW": None if item.cost.power_w is None else round(item.cost.power_w / 1e3, 2),
        }
        for item in found
    ]
    return pd.DataFrame(rows)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)
