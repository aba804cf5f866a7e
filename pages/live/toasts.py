"""What callbacks have to say: collected while they run, shown when the page is drawn."""

from __future__ import annotations

import streamlit as st


def add_toast(text: str) -> None:
    """Show this Markdown with the next drawing of the page."""
    st.session_state.setdefault("toasts", []).append(text)


def show_toasts() -> None:
    """Show what callbacks had to say."""
    for text in st.session_state.pop("toasts", []):
        st.toast(text, icon=":material/tune:")
