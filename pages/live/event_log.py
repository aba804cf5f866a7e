"""What was changed on the engine, newest first: stays on the page after the toast has gone, for every viewer of it."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime

import streamlit as st

from engine.outputs import EngineEvent
from pages.shared.run_values import moment_text, reader_timezone
from pages.shared.text import plain

_SHOWN = 8
_WITHOUT_DATE_S = 12 * 3600
_KINDS = {"reconfigure": "tune", "load": "deployed_code_update", "error": "error", "cache": "mop", "execution": "bolt"}


def event_log(events: Iterable[EngineEvent], now_unix_s: float) -> None:
    """The latest changes, loads and failures, each with when it was (ages would grow while the page stands still).

    Args:
        events: oldest first.
        now_unix_s: wall clock.
    """
    recent = [event for event in events if event.kind in _KINDS][-_SHOWN:]
    with st.container(border=True, gap="small"):
        st.markdown("**Changes**")
        if not recent:
            st.caption("Toggles, loads and failures appear here with the pause they cost.")
        for event in reversed(recent):
            when = clock_text(event.time_unix_s, now_unix_s)
            st.markdown(f":material/{_KINDS[event.kind]}: {plain(event.summary)} :small[:gray[{when}]]")


def clock_text(unix_s: float, now_unix_s: float) -> str:
    """A moment on the reader's clock, ``at 14:03:21``; with its date where that is not plain."""
    if now_unix_s - unix_s > _WITHOUT_DATE_S:
        return moment_text(unix_s)
    return datetime.fromtimestamp(unix_s).astimezone(reader_timezone()).strftime("at %H:%M:%S")
