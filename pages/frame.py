"""The frame around every page: name, navigation, state of the worker."""

from __future__ import annotations

import streamlit as st

from pages.login import require_login
from pages.services import get_services
from pages.shared.brand import ICON, brand
from pages.shared.links import PAGES
from pages.shared.status import status_strip

st.set_page_config(page_title="Headroom", page_icon=ICON, layout="wide")
brand()
require_login()
page = st.navigation(
    [
        st.Page(entry.file, title=entry.title, url_path=entry.url_path, icon=entry.icon, default=entry is PAGES[0])
        for entry in PAGES
    ],
    position="top",
)
status_strip(get_services())
page.run()
