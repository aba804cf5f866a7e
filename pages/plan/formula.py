"""The KV-cache formula with its numbers: as commonly published, and as it is."""

from __future__ import annotations

import streamlit as st

from engine.capacity import CacheLayout, Plan, compare_kv_formulas
from engine.capacity.memory.kv_formula import Factor, KVFormula
from engine.capacity.text import gib
from pages.shared.text import plain


def formulas(plan: Plan) -> None:
    """Both forms side by side for one request of the planned context, and what the published one gets wrong here."""
    asked = plan.request
    frees_windows = asked.profile.frees_windows_of(asked.spec)
    layout = CacheLayout(asked.kv_dtype, asked.block_size, frees_windows)
    both = compare_kv_formulas(asked.spec, layout, asked.context, asked.tp)
    st.markdown(f"**KV cache of one request of {asked.context:,} tokens**")
    left, right = st.columns(2, gap="small")
    with left, st.container(border=True, height="stretch"):
        agrees = not both.errors
        badge = ":green-badge[agrees here]" if agrees else f":red-badge[{_ratio(both.ratio)}]"
        st.markdown(f"As commonly published {badge}")
        _formula(both.published)
        for error in both.errors:
            st.markdown(f":red[:material/close:] {plain(error)}")
    with right, st.container(border=True, height="stretch"):
        each = f" on each of {asked.tp} GPUs" if asked.tp > 1 else ""
        st.markdown(f"As it is{each} :green-badge[used for this plan]")
        _formula(both.corrected)
        st.caption(" · ".join(_legend(factor) for factor in both.corrected.factors[1:]))


def _ratio(ratio: float) -> str:
    times = ratio if ratio >= 1 else 1 / ratio
    if times < 1.05:
        return "slightly off"
    digits = 0 if times >= 10 or abs(times - round(times)) < 0.05 else 1
    return f"{times:,.{digits}f} × too {'much' if ratio >= 1 else 'little'}"


def _formula(formula: KVFormula) -> None:
    symbols = " + ".join(r" \cdot ".join(factor.symbol for factor in product) for product in formula.products)
    numbers = " + ".join(r" \cdot ".join(_number(factor) for factor in product) for product in formula.products)
    st.latex(symbols)
    st.latex(numbers)
    st.latex(rf"= \mathbf{{{_text(gib(formula.bytes))}}}")


def _number(factor: Factor) -> str:
    value = f"{factor.value:,.0f}" if float(factor.value).is_integer() else f"{factor.value:,.4g}"
    unit = r"\,\mathrm{B}" if factor.unit == "B" else ""
    return value.replace(",", "{,}") + unit


def _text(text: str) -> str:
    return text.replace(",", "{,}").replace(" ", r"\ ")


def _legend(factor: Factor) -> str:
    value = f"{factor.value:,.0f}" if float(factor.value).is_integer() else f"{factor.value:,.4g}"
    return f"${factor.symbol}$ = {value} {factor.meaning}"
