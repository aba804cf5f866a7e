"""What was changed on the engine, newest first: stays on the page after the toast has gone, for every viewer of it."""

from __future__ import annotations

from collections.abc import Iterable

import streamlit as st

from engine.outputs import EngineEvent
from pages.widgets.messages import seconds_text
from pages.widgets.text import plain

_SHOWN = 8
_KINDS = {"reconfigure": "tune", "load": "deployed_code_update", "error": "error", "cache": "mop", "execution": "bolt"}


def event_log(events: Iterable[EngineEvent], now_unix_s: float) -> None:
    """The latest changes, loads and failures with their age.

    Args:
        events: oldest first.
        now_unix_s: wall clock that ages are counted from.
    """
    recent = [event for event in events if event.kind in _KINDS][-_SHOWN:]
    with st.container(border=True, gap="small"):
        st.markdown("**Changes**")
        if not recent:
            st.caption("Toggles, loads and failures appear here with the pause they cost.")
        for event in reversed(recent):
            age = seconds_text(max(now_unix_s - event.time_unix_s, 0.0))
            st.markdown(f":material/{_KINDS[event.kind]}: {plain(event.summary)} :small[:gray[{age} ago]]")
