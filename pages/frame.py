"""The frame around every page: name, navigation, state of the worker."""

from __future__ import annotations

import streamlit as st

from pages.login import require_login
from pages.services import get_services
from pages.widgets.brand import ICON, brand
from pages.widgets.status import status_strip

st.set_page_config(page_title="Headroom", page_icon=ICON, layout="wide")
brand()
require_login()
page = st.navigation(
    [
        st.Page("plan.py", title="Plan", icon=":material/architecture:", default=True),
        st.Page("live.py", title="Live", icon=":material/monitoring:"),
        st.Page("compare.py", title="Compare", icon=":material/balance:"),
        st.Page("history.py", title="History", icon=":material/history:"),
    ],
    position="top",
)
status_strip(get_services())
page.run()
