"""The name at the top left."""

from __future__ import annotations

import streamlit as st

_MARK = """<svg xmlns="http://www.w3.org/2000/svg" width="132" height="28" viewBox="0 0 132 28">
<rect x="2" y="3" width="5" height="22" rx="2" fill="#14b8a6" opacity=".35"/>
<rect x="2" y="14" width="5" height="11" rx="2" fill="#14b8a6"/>
<rect x="10" y="3" width="5" height="22" rx="2" fill="#14b8a6" opacity=".35"/>
<rect x="10" y="9" width="5" height="16" rx="2" fill="#14b8a6"/>
<rect x="18" y="3" width="5" height="22" rx="2" fill="#14b8a6" opacity=".35"/>
<rect x="18" y="17" width="5" height="8" rx="2" fill="#14b8a6"/>
<text x="30" y="20" font-family="system-ui, sans-serif" font-size="17" font-weight="700" fill="#14a394">Headroom</text>
</svg>"""
#: The mark alone, for the browser's tab (a Material icon would be fetched from the internet).
ICON = """<svg xmlns="http://www.w3.org/2000/svg" width="32" height="32" viewBox="0 0 28 28">
<rect x="3" y="3" width="6" height="22" rx="2" fill="#14b8a6" opacity=".35"/>
<rect x="3" y="14" width="6" height="11" rx="2" fill="#14b8a6"/>
<rect x="11" y="3" width="6" height="22" rx="2" fill="#14b8a6" opacity=".35"/>
<rect x="11" y="9" width="6" height="16" rx="2" fill="#14b8a6"/>
<rect x="19" y="3" width="6" height="22" rx="2" fill="#14b8a6" opacity=".35"/>
<rect x="19" y="17" width="6" height="8" rx="2" fill="#14b8a6"/>
</svg>"""


def brand() -> None:
    """Show the mark in the header, and keep what is being polled from fading while it is drawn again."""
    st.html("<style>[data-stale='true'] { opacity: 1 !important; transition: none !important; }</style>")
    st.logo(_MARK, size="medium")
