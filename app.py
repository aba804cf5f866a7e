"""Headroom: the dashboard. ``make run`` (``streamlit run app.py``) starts here.

The frame of the pages is `pages/frame.py`. This file owns the process: the engine worker starts with the server, before
the first page is opened, and ends with it.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import AsyncIterator
from typing import Any

from starlette.middleware import Middleware
from streamlit.starlette import App

from engine.errors import ConfigError
from engine.worker.logs import configure_logging
from pages.door import Door, check_environment
from pages.services import close_services, get_services


@contextlib.asynccontextmanager
async def lifespan(_: App) -> AsyncIterator[dict[str, Any]]:
    """Start the worker, so that the default model is loading when the page opens; stop it at the end."""
    get_services()
    try:
        yield {}
    finally:
        close_services()


try:
    configure_logging()
    check_environment()
except ConfigError as error:
    sys.exit(str(error))
app = App("pages/frame.py", lifespan=lifespan, middleware=[Middleware(Door)])
