"""The control of a knob, drawn from the engine's own description of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import streamlit as st

from engine.config import Knob, Tier

_TIER_COLORS = {Tier.LIVE: "green", Tier.SWAP: "violet", Tier.RELOAD: "gray"}
_TIER_MEANINGS = {
    Tier.LIVE: "takes effect at the next step",
    Tier.SWAP: "pauses the engine between two steps to swap weights or cache",
    Tier.RELOAD: "loads the model again",
}
#: A live knob is set within one step; the page waits for that long before it shows "applying".
_SHORT = 5  # characters


def knob_label(knob: Knob, *, tier: bool = True) -> str:
    """Label with its unit and, unless ``tier`` is off, badges for its tier and for what can change the output."""
    told = knob.label.endswith(")") or knob.unit in knob.label.lower()
    unit = f" ({knob.unit})" if knob.unit and not told else ""
    badge = f" :{_TIER_COLORS[knob.tier]}-badge[{knob.tier.value}]" if tier else ""
    return f"{knob.label}{unit}{badge}{' :orange-badge[lossy]' if tier and not knob.lossless else ''}"


def knob_help(knob: Knob) -> str:
    """The knob's help, its name in the API, and what changing it means."""
    exact = "Lossless: the output stays the same." if knob.lossless else "Lossy: the output may change."
    return f"{knob.help}\n\n{exact} Tier **{knob.tier.value}**: {_TIER_MEANINGS[knob.tier]}. API name `{knob.name}`."


def control(
    knob: Knob,
    key: str,
    *,
    label: str | None = None,
    disabled: bool = False,
    on_change: Callable[..., None] | None = None,
    args: tuple[Any, ...] = (),
) -> Any:
    """The control for a knob; its value is ``st.session_state[key]``, which must be set before."""
    common: dict[str, Any] = {"key": key, "help": knob_help(knob), "disabled": disabled}
    if on_change is not None:
        common |= {"on_change": on_change, "args": args}
    text = label or knob_label(knob)
    if knob.kind == "bool":
        return st.toggle(text, **common)
    if knob.kind == "choice":
        if len(knob.choices) <= 3:
            return st.segmented_control(text, knob.choices, required=True, width="stretch", **common)
        if all(len(choice) <= _SHORT for choice in knob.choices):  # they wrap, where segments would lie in two bars
            return st.pills(text, knob.choices, required=True, **common)
        return st.selectbox(text, knob.choices, **common)
    if knob.kind == "str":
        return st.text_input(text, **common)
    return st.number_input(text, **common, **_number_bounds(knob))


def _number_bounds(knob: Knob) -> dict[str, Any]:
    cast: type = int if knob.kind == "int" else float
    return {
        "min_value": None if knob.minimum is None else cast(knob.minimum),
        "max_value": None if knob.maximum is None else cast(knob.maximum),
        "step": 1 if knob.kind == "int" else 0.25,
        "placeholder": "auto",
    }
