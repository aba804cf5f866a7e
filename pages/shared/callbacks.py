"""What a button does is a callback.

Parts of a page refresh themselves and may ask for a rerun of the whole page. A press that is only read in the body
(``if st.button(…)``) is lost when such a part runs first in the same pass; a callback runs before any part. It also
must read other controls from ``st.session_state`` when it is called: values bound when the button was drawn are old if
the press comes together with an edit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import streamlit as st

from pages.shared.messages import show_error


def act(place: str, work: Callable[..., Any], *args: Any) -> None:
    """Callback of a button: do the work; :func:`show_action_error` with the same ``place`` tells what it raised."""
    st.session_state.pop(_key(place), None)
    try:
        work(*args)
    except Exception as error:  # whatever it is, the person who pressed the button must learn of it
        st.session_state[_key(place)] = error


def show_action_error(place: str) -> None:
    """An error box with what the last action of that place has raised, until the next one."""
    error = st.session_state.get(_key(place))
    if error is not None:
        show_error(error)


def _key(place: str) -> str:
    return f"error-{place}"
