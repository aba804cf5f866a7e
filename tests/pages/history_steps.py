"""What the tests of the History page share."""

from __future__ import annotations

from pathlib import Path

from streamlit.testing.v1 import AppTest

PAGE = str(Path(__file__).parents[2] / "pages" / "history" / "page.py")


def open_history(*run_ids: str, **parameters: str) -> AppTest:
    """The page as its address opens it: with these runs selected, and further parameters of the query."""
    page = AppTest.from_file(PAGE, default_timeout=30)
    if run_ids:
        page.query_params["run"] = list(run_ids)
    for name, value in parameters.items():
        page.query_params[name] = value
    page.run()
    assert not page.exception
    return page
