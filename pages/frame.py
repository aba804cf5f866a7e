"""The frame around every page: name, navigation, state of the worker."""

from __future__ import annotations

import streamlit as st

from pages.login import require_login
from pages.services import get_services
from pages.shared.brand import ICON, brand
from pages.shared.status import status_strip

st.set_page_config(page_title="Headroom", page_icon=ICON, layout="wide")
brand()
require_login()
page = st.navigation(
    [
        st.Page("plan/page.py", title="Plan", url_path="plan", icon=":material/architecture:", default=True),
        st.Page("live/page.py", title="Live", url_path="live", icon=":material/monitoring:"),
        st.Page("compare/page.py", title="Compare", url_path="compare", icon=":material/balance:"),
        st.Page("history/page.py", title="History", url_path="history", icon=":material/history:"),
    ],
    position="top",
)
status_strip(get_services())
page.run()
