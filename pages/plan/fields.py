"""The fields of the Plan page: each has a default, a place in the URL and a place in the session."""

from __future__ import annotations

from typing import Any

import streamlit as st

MOST_REQUESTS = 100_000
NGRAM = "n-gram look-up"
DEFAULTS: dict[str, Any] = {
    "model": "Llama-3.1-70B",
    "gpu": "H100 SXM 80GB",
    "tp": 4,
    "dp": 1,
    "pp": 1,
    "weights": "auto",
    "kv": "auto",
    "context": 8192,
    "concurrency": 32,
    "load": "users",
    "rate": 1.0,
    "ttft": 1000.0,
    "tpot": 50.0,
    "engine": "vllm-0.19",
    "utilization": 0.9,
    "lengths": "varied",
    "burst": 1.0,
    "hit": 0,
    "draft": 0,
    "drafter": NGRAM,
    "acceptance": 70,
    "experts": "split",
    "lora": 0,
}


def key(name: str) -> str:
    """Session-state key, and URL parameter, of an input."""
    return f"plan-{name}"


def state(name: str) -> Any:
    """What an input holds now."""
    return st.session_state[key(name)]


def widget(name: str) -> dict[str, Any]:
    """Arguments that every input shares."""
    return {"key": key(name), "bind": "query-params", "persist_state": "session"}


def choice(label: str, name: str, options: dict[str, str], help_text: str) -> str:
    """A select box of named options, shown by their labels."""
    names = list(options)
    return str(
        st.selectbox(
            label,
            names,
            index=names.index(DEFAULTS[name]),
            format_func=lambda option: options[option],
            help=help_text,
            **widget(name),
        )
    )


def number(label: str, name: str, least: int, most: int, help_text: str, step: int = 1) -> int:
    """A whole number with its default."""
    value = st.number_input(
        label, min_value=least, max_value=most, value=DEFAULTS[name], step=step, help=help_text, **widget(name)
    )
    return int(least if value is None else value)


def optional_number(label: str, name: str, most: int, automatic: int, help_text: str) -> int:
    """A whole number that has an automatic value until one is given."""
    value = st.number_input(
        label,
        min_value=1,
        max_value=most,
        value=None,
        step=50,
        placeholder=f"auto {automatic}",
        help=help_text,
        **widget(name),
    )
    return automatic if value is None else int(value)


def nearest(sizes: tuple[int, ...], wanted: int) -> int:
    """Index of the largest size that is not above ``wanted``."""
    return max(index for index, size in enumerate(sizes) if size <= wanted)


def clamp(name: str, sizes: tuple[int, ...]) -> None:
    """Correct a number that was chosen for another model, whose list of sizes may differ."""
    value = st.session_state.get(key(name))
    if isinstance(value, int) and value not in sizes:
        st.session_state[key(name)] = sizes[nearest(sizes, value)]


def milliseconds(label: str, name: str, help_text: str) -> float | None:
    """A limit of latency; seconds, None where it is left empty."""
    value = st.number_input(
        label,
        min_value=0.1,
        max_value=1e7,
        value=DEFAULTS[name],
        step=10.0,
        help=help_text,
        format="%g",
        **widget(name),
    )
    return None if value is None else float(value) / 1e3
