"""Changes of knobs on their way to the running engine, and what the controls show meanwhile."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import time
from typing import Any

import streamlit as st

from engine.config import Knob, Tier
from pages.background.feed import Snapshot
from pages.live.toasts import add_toast
from pages.services import Services
from pages.shared.messages import error_text, value_text
from pages.shared.text import plain

_LIVE_WAIT_S = 0.4


@dataclasses.dataclass
class PendingChange:
    """A change on its way to the engine."""

    changes: dict[str, Any]
    future: concurrent.futures.Future[Any]
    started: float = dataclasses.field(default_factory=time.monotonic)


def is_run_in_progress(error: BaseException) -> bool:
    """True for a refusal that says: a run is being recorded, and this would disturb it."""
    return getattr(error, "status_code", None) == 409 and getattr(error, "field", None) == "run"


@dataclasses.dataclass
class DrawnValue:
    """What the control of a knob shows.

    The value of a control that is on the page is never overwritten: the browser may be sending the old one at that
    moment, which would look like a person's change and go back and forth for ever. Where the engine's value moves by
    itself (a refusal, another tab, a program), the control is replaced by one with the next version in its key.
    """

    value: Any
    version: int = 0


def drawn_values() -> dict[str, DrawnValue]:
    """What the controls of this browser session show, by knob."""
    drawn: dict[str, DrawnValue] = st.session_state.setdefault("knobs_drawn", {})
    return drawn


def follow_engine(name: str, current: Any) -> None:
    """Let the control of a knob show the current value."""
    drawn = drawn_values().get(name)
    if drawn is None:
        drawn_values()[name] = DrawnValue(current)
    elif drawn.value != current:
        drawn_values()[name] = DrawnValue(current, drawn.version + 1)


def control_key(name: str, drawn: DrawnValue) -> str:
    """The session-state key of the control that shows this value."""
    return f"knob-{name}-{drawn.version}"


def current_config(snapshot: Snapshot) -> dict[str, Any]:
    """The current knobs: those of the reading, and what was changed from here since it was begun."""
    config = dict(snapshot.engine.config) if snapshot.engine is not None else {}
    changed_at, changes = st.session_state.get("knobs_changed", (0.0, {}))
    return config | changes if snapshot.begun_unix_s < changed_at else config


def apply_control(services: Services, knob: Knob, key: str) -> None:
    """Callback of a control: send the new value; a swap goes on in the background."""
    value, drawn = st.session_state[key], drawn_values()[knob.name]
    if key != control_key(knob.name, drawn) or value == drawn.value:
        return  # a control that was replaced meanwhile may still report: the browser sends what it has
    drawn.value = value
    # The control is drawn disabled next, and of a disabled control Streamlit drops what came from the browser in the
    # same pass: it would show the old value while the engine takes the new one. A value that is set stays.
    st.session_state[key] = value
    send_change(services, knob, {knob.name: value})


def send_change(services: Services, knob: Knob, changes: dict[str, Any], force: bool = False) -> None:
    """Send a change of a knob to the engine; with ``force`` also at the cost of a run in progress (a callback too)."""
    st.session_state["knob_errors"] = {}
    st.session_state["disturbing_change"] = {}
    pending = PendingChange(changes, services.change(changes, force=force))
    st.session_state["pending_change"] = pending
    if knob.tier is Tier.LIVE:
        concurrent.futures.wait([pending.future], timeout=_LIVE_WAIT_S)
    settle_change(services)


def settle_change(services: Services) -> bool:
    """Take the outcome of a finished change, if there is one; True while one is on its way."""
    pending: PendingChange | None = st.session_state.get("pending_change")
    if pending is None:
        return False
    if not pending.future.done():
        return True
    st.session_state["pending_change"] = None
    error = pending.future.exception()
    if error is not None:
        name = getattr(error, "field", None)
        name = name if name in pending.changes else next(iter(pending.changes))
        disturbs = is_run_in_progress(error)
        st.session_state["knob_errors"] = {name: plain(error) if disturbs else error_text(error)}
        st.session_state["disturbing_change"] = pending.changes if disturbs else {}
    else:
        result = pending.future.result()
        add_toast(change_text(result))
        st.session_state["knobs_changed"] = (time.time(), {name: new for name, (_, new) in result.changed.items()})
    services.feed.read(max_age_s=0.0)
    return False


def change_text(result: Any) -> str:
    """The outcome of a reconfiguration in a sentence or two."""
    changed = ", ".join(
        f"{plain(name)}: {plain(value_text(old))} → **{plain(value_text(new))}**"
        for name, (old, new) in dict(result.changed).items()
    )
    if not changed:
        return "Nothing changed: the engine already has that setting."
    prepared = f", prepared in {result.prepare_ms:.0f} ms in the background" if result.prepare_ms >= 1 else ""
    flight = f" {result.requests_in_flight} requests in flight continued." if result.requests_in_flight else ""
    notes = "".join(f"\n\n{plain(note)}" for note in result.notes)
    return f"{changed}. The engine paused {result.pause_ms:.1f} ms{prepared}.{flight}{notes}"
