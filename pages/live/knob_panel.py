"""The panel of live and swap knobs: a change of a control is a change of the engine."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

import streamlit as st

from engine.config import Knob, Tier
from pages.live.changes import PendingChange, apply_control, control_key, drawn_values, follow_engine, send_change
from pages.services import Services
from pages.shared.knob_controls import control
from pages.shared.messages import value_text
from pages.shared.quality_reference import stored_note
from pages.shared.text import plain


def relevant(knob: Knob, values: Mapping[str, Any]) -> bool:
    """False while the knob that this one depends on has another value."""
    return knob.depends_on is None or value_text(values.get(knob.depends_on[0])) == knob.depends_on[1]


def knob_panel(services: Services, knobs: Iterable[Knob], config: Mapping[str, Any]) -> None:
    """Every live and swap knob, in groups; a change is applied at once and its outcome is told in a toast."""
    pending: PendingChange | None = st.session_state.get("pending_change")
    shown = [knob for knob in knobs if knob.tier is not Tier.RELOAD and not _single_choice(knob)]
    with st.container():  # always there: what stands below keeps its place, and with it its state in the browser
        if pending is not None:
            names = ", ".join(plain(f"{name} → {value_text(value)}") for name, value in pending.changes.items())
            st.info(f"Applying {names} … {time.monotonic() - pending.started:.0f} s", icon=":material/sync:")
    for group in dict.fromkeys(knob.group for knob in shown):
        with st.container(border=True, gap="small"):
            st.markdown(f"**{group}**")
            for knob in (knob for knob in shown if knob.group == group and relevant(knob, config)):
                _live_control(services, knob, config, pending)
    if fixed := [knob for knob in knobs if knob.tier is not Tier.RELOAD and _single_choice(knob)]:
        st.caption("Fixed in this build: " + ", ".join(f"{knob.label} = {knob.choices[0]}" for knob in fixed))


def _single_choice(knob: Knob) -> bool:
    return knob.kind == "choice" and len(knob.choices) == 1


def _live_control(services: Services, knob: Knob, config: Mapping[str, Any], pending: PendingChange | None) -> None:
    if pending is None or knob.name not in pending.changes:
        follow_engine(knob.name, config.get(knob.name))
    drawn = drawn_values()[knob.name]
    key = control_key(knob.name, drawn)
    if pending is None and st.session_state.get(key, drawn.value) != drawn.value:
        drawn.version += 1  # what it shows never came to the engine
        key = control_key(knob.name, drawn)
    if key not in st.session_state:
        st.session_state[key] = drawn.value
    control(knob, key, disabled=pending is not None, on_change=apply_control, args=(services, knob, key))
    if knob.name == "weights" and drawn.value != knob.default:
        st.caption(plain(stored_note(services)))
    refusal = st.session_state.get("knob_errors", {}).get(knob.name)
    if refusal:
        st.error(refusal)
        _offer_force(services, knob)


def _offer_force(services: Services, knob: Knob) -> None:
    """A button that makes the refused change all the same, where only a run in progress stands against it."""
    changes = st.session_state.get("disturbing_change", {})
    if knob.name in changes:
        label = f"Change to {plain(value_text(changes[knob.name]))} anyway (marks the run)"
        st.button(
            label,
            key=f"force-{knob.name}",
            icon=":material/flag:",
            on_click=send_change,
            args=(services, knob, changes, True),
        )
