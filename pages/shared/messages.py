"""Errors, values and durations as text, the same on every page."""

from __future__ import annotations

from typing import Any

import streamlit as st

from engine.capacity.text import GIB
from pages.shared.text import plain


def error_text(error: BaseException) -> str:
    """An error for people, as Markdown: the field in bold, what is wrong, the remedy."""
    field, message = getattr(error, "field", None), getattr(error, "message", None)
    remedy = getattr(error, "remedy", None)
    text = message or str(error) or type(error).__name__
    return f"{f'**{plain(field)}**: ' if field else ''}{plain(text)}{f' {plain(remedy)}' if remedy else ''}"


def show_error(error: BaseException) -> None:
    """An error box that names the field and the remedy."""
    st.error(error_text(error), icon=":material/error:")


def value_text(value: Any) -> str:
    """A knob's value as people read it.

    >>> value_text(True), value_text(None), value_text("int4")
    ('on', 'auto', 'int4')
    """
    if isinstance(value, bool):
        return "on" if value else "off"
    return "auto" if value is None else str(value)


def bytes_text(count: float) -> str:
    """Bytes with a binary unit.

    >>> bytes_text(269_000_000), bytes_text(5 * 2**30)
    ('257 MiB', '5.00 GiB')
    """
    return f"{count / GIB:.2f} GiB" if count >= GIB else f"{count / 2**20:.0f} MiB"


def seconds_text(seconds: float | None) -> str:
    """A duration for a progress line.

    >>> seconds_text(8.2), seconds_text(125), seconds_text(None)
    ('8 s', '2 min 5 s', '–')
    """
    if seconds is None:
        return "–"
    whole = round(seconds)
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60} s"
