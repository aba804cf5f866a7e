"""The pages of the dashboard: their files as Streamlit names them, their addresses, and links from one to another."""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import streamlit as st
from streamlit.errors import StreamlitAPIException


class PageEntry(NamedTuple):
    """A page in the navigation.

    Attributes:
        file: relative to the folder of the main script, ``pages/frame.py``.
        title: in the navigation; url_path: its address below the dashboard's; icon: a Material icon.
    """

    file: str
    title: str
    url_path: str
    icon: str


PLAN = PageEntry("plan/page.py", "Plan", "plan", ":material/architecture:")
LIVE = PageEntry("live/page.py", "Live", "live", ":material/monitoring:")
COMPARE = PageEntry("compare/page.py", "Compare", "compare", ":material/balance:")
HISTORY = PageEntry("history/page.py", "History", "history", ":material/history:")
#: In the order of the navigation; the first one opens at the bare address.
PAGES = (PLAN, LIVE, COMPARE, HISTORY)


def link_to(page: PageEntry, **query: str) -> None:
    """A link "Open in …" to another page, with ``run=…`` or ``comparison=…`` for what to open there.

    Nothing where a page is shown without the frame that knows the others (a test of one page).
    """
    label = f"Open in {page.title}" if query else f"Open {page.title}"
    with contextlib.suppress(StreamlitAPIException):
        st.page_link(page.file, label=label, icon=page.icon, query_params=query)
