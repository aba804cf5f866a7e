"""Where the engine's memory is, against the limit it was given."""

from __future__ import annotations

import streamlit as st

from engine.outputs import MemoryReport
from pages.shared.messages import bytes_text

_PARTS = (
    ("weights", "Weights", "#6366f1"),
    ("activations", "Activations", "#d97706"),
    ("kv_cache", "KV cache", "#0d9488"),
)


def memory_bar(memory: MemoryReport) -> None:
    """A stacked bar of weights, activations and KV cache up to the limit, and what the process really holds."""
    sizes = [(label, getattr(memory, name), color) for name, label, color in _PARTS]
    planned = sum(size for _, size, _ in sizes)
    free = max(memory.limit - planned, 0)
    scale = max(memory.limit, planned, 1)
    bars = "".join(
        f'<div title="{label}: {bytes_text(size)}" style="width:{100 * size / scale:.2f}%;background:{color}"></div>'
        for label, size, color in sizes
    )
    entries = "".join(
        f'<span style="white-space:nowrap"><i style="display:inline-block;width:.7em;height:.7em;border-radius:2px;'
        f'background:{color};margin-right:.35em"></i>{label} <b>{bytes_text(size)}</b></span>'
        for label, size, color in sizes
    )
    st.html(
        f'<div style="font-size:.85rem"><div style="display:flex;height:16px;border-radius:5px;overflow:hidden;'
        f'background:rgba(128,128,128,.2)">{bars}</div>'
        f'<div style="display:flex;flex-wrap:wrap;gap:.2rem 1rem;margin-top:.4rem">{entries}'
        f"<span>unused <b>{bytes_text(free)}</b></span><span>limit <b>{bytes_text(memory.limit)}</b></span>"
        f'<span style="opacity:.7">the whole process holds {bytes_text(memory.resident)}</span></div></div>'
    )
