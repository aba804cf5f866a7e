"""Controls drawn from the engine's own description of its knobs, and their application to the running engine."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import streamlit as st

from engine.config import EngineConfig, Knob, Tier
from pages.background.feed import Snapshot
from pages.services import Services
from pages.shared.actions import act, show_problem
from pages.shared.messages import error_text, value_text
from pages.shared.quality_reference import reference_note
from pages.shared.text import plain

_TIER_COLORS = {Tier.LIVE: "green", Tier.SWAP: "violet", Tier.RELOAD: "gray"}
_TIER_WORDS = {
    Tier.LIVE: "takes effect at the next step",
    Tier.SWAP: "pauses the engine between two steps to swap weights or cache",
    Tier.RELOAD: "loads the model again",
}
#: A live knob is set within one step; the page waits for that long before it shows "applying".
_SHORT = 5  # letters
_LIVE_WAIT_S = 0.4


@dataclasses.dataclass
class PendingChange:
    """A change on its way to the engine."""

    changes: dict[str, Any]
    future: concurrent.futures.Future[Any]
    started: float = dataclasses.field(default_factory=time.monotonic)


def relevant(knob: Knob, values: Mapping[str, Any]) -> bool:
    """False while the knob that this one depends on has another value."""
    return knob.depends_on is None or value_text(values.get(knob.depends_on[0])) == knob.depends_on[1]


def knob_label(knob: Knob, *, tier: bool = True) -> str:
    """Label with its unit and, unless ``tier`` is off, badges for its tier and for what can change the output."""
    told = knob.label.endswith(")") or knob.unit in knob.label.lower()
    unit = f" ({knob.unit})" if knob.unit and not told else ""
    badge = f" :{_TIER_COLORS[knob.tier]}-badge[{knob.tier.value}]" if tier else ""
    return f"{knob.label}{unit}{badge}{' :orange-badge[lossy]' if tier and not knob.lossless else ''}"


def knob_help(knob: Knob) -> str:
    """The knob's help, its name in the API, and what changing it means."""
    exact = "Lossless: the output stays the same." if knob.lossless else "Lossy: the output may change."
    return f"{knob.help}\n\n{exact} Tier **{knob.tier.value}**: {_TIER_WORDS[knob.tier]}. API name `{knob.name}`."


def control(
    knob: Knob,
    key: str,
    *,
    label: str | None = None,
    disabled: bool = False,
    on_change: Callable[..., None] | None = None,
    args: tuple[Any, ...] = (),
) -> Any:
    """The control for a knob; its value is ``st.session_state[key]``, which must be set before."""
    common: dict[str, Any] = {"key": key, "help": knob_help(knob), "disabled": disabled}
    if on_change is not None:
        common |= {"on_change": on_change, "args": args}
    text = label or knob_label(knob)
    if knob.kind == "bool":
        return st.toggle(text, **common)
    if knob.kind == "choice":
        if len(knob.choices) <= 3:
            return st.segmented_control(text, knob.choices, required=True, width="stretch", **common)
        if all(len(choice) <= _SHORT for choice in knob.choices):  # they wrap, where segments would lie in two bars
            return st.pills(text, knob.choices, required=True, **common)
        return st.selectbox(text, knob.choices, **common)
    if knob.kind == "str":
        return st.text_input(text, **common)
    return st.number_input(text, **common, **_number_bounds(knob))


def _number_bounds(knob: Knob) -> dict[str, Any]:
    cast: type = int if knob.kind == "int" else float
    return {
        "min_value": None if knob.minimum is None else cast(knob.minimum),
        "max_value": None if knob.maximum is None else cast(knob.maximum),
        "step": 1 if knob.kind == "int" else 0.25,
        "placeholder": "auto",
    }


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
        _follow(knob.name, config.get(knob.name))
    drawn = _drawn()[knob.name]
    key = _key(knob.name, drawn)
    if pending is None and st.session_state.get(key, drawn.value) != drawn.value:
        drawn.version += 1  # what it shows never came to the engine
        key = _key(knob.name, drawn)
    if key not in st.session_state:
        st.session_state[key] = drawn.value
    control(knob, key, disabled=pending is not None, on_change=_apply, args=(services, knob, key))
    if knob.name == "weights" and drawn.value != knob.default:
        st.caption(plain(stored_note(services)))
    refusal = st.session_state.get("knob_errors", {}).get(knob.name)
    if refusal:
        st.error(refusal)
        _offer_force(services, knob)


def stored_note(services: Services) -> str:
    """What a loss of the loaded model's quality is counted from, see :func:`reference_note`."""
    engine = services.feed.latest().engine
    return reference_note(str(engine.model.get("stored_as", ""))) if engine is not None else ""


def _offer_force(services: Services, knob: Knob) -> None:
    """A button that makes the refused change all the same, where only a run in progress stands against it."""
    changes = st.session_state.get("disturbing_change", {})
    if knob.name in changes:
        words = f"Change to {plain(value_text(changes[knob.name]))} anyway (marks the run)"
        st.button(
            words,
            key=f"force-{knob.name}",
            icon=":material/flag:",
            on_click=_send,
            args=(services, knob, changes, True),
        )


def _is_run_in_progress(problem: BaseException) -> bool:
    """True for a refusal that says: a run is being recorded, and this would disturb it."""
    return getattr(problem, "status_code", None) == 409 and getattr(problem, "field", None) == "run"


@dataclasses.dataclass
class DrawnValue:
    """What the control of a knob shows.

    The value of a control that is on the page is never overwritten: the browser may be sending the old one at that
    moment, which would look like a person's change and go back and forth for ever. Where the engine's value moves by
    itself (a refusal, another tab, a program), the control is replaced by one with the next version in its key.
    """

    value: Any
    version: int = 0


def _drawn() -> dict[str, DrawnValue]:
    return st.session_state.setdefault("knobs_drawn", {})


def _follow(name: str, in_force: Any) -> None:
    """Let the control of a knob show what is in force."""
    drawn = _drawn().get(name)
    if drawn is None:
        _drawn()[name] = DrawnValue(in_force)
    elif drawn.value != in_force:
        _drawn()[name] = DrawnValue(in_force, drawn.version + 1)


def _key(name: str, drawn: DrawnValue) -> str:
    return f"knob-{name}-{drawn.version}"


def config_in_force(snapshot: Snapshot) -> dict[str, Any]:
    """The knobs in force: those of the reading, and what was changed from here since it was begun."""
    config = dict(snapshot.engine.config) if snapshot.engine is not None else {}
    changed_at, changes = st.session_state.get("knobs_changed", (0.0, {}))
    return config | changes if snapshot.begun_unix_s < changed_at else config


def _apply(services: Services, knob: Knob, key: str) -> None:
    """Callback of a control: send the new value; a swap goes on beside the page."""
    value, drawn = st.session_state[key], _drawn()[knob.name]
    if key != _key(knob.name, drawn) or value == drawn.value:
        return  # a control that was replaced meanwhile may still report: the browser sends what it has
    drawn.value = value
    # The control is drawn disabled next, and of a disabled control Streamlit drops what came from the browser in the
    # same pass: it would show the old value while the engine takes the new one. A value that is set stays.
    st.session_state[key] = value
    _send(services, knob, {knob.name: value})


def _send(services: Services, knob: Knob, changes: dict[str, Any], force: bool = False) -> None:
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
        disturbs = _is_run_in_progress(error)
        st.session_state["knob_errors"] = {name: plain(error) if disturbs else error_text(error)}
        st.session_state["disturbing_change"] = pending.changes if disturbs else {}
    else:
        result = pending.future.result()
        st.session_state.setdefault("toasts", []).append(change_text(result))
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
        return "Nothing changed: that setting was already in force."
    prepared = f", prepared in {result.prepare_ms:.0f} ms beside it" if result.prepare_ms >= 1 else ""
    flight = f" {result.requests_in_flight} requests in flight went on." if result.requests_in_flight else ""
    notes = "".join(f"\n\n{plain(note)}" for note in result.notes)
    return f"{changed}. The engine paused {result.pause_ms:.1f} ms{prepared}.{flight}{notes}"


def show_toasts() -> None:
    """Show what callbacks had to say."""
    for text in st.session_state.pop("toasts", []):
        st.toast(text, icon=":material/tune:")


def load_form(services: Services, knobs: Iterable[Knob], config: Mapping[str, Any]) -> None:
    """The knobs that need the model to be loaded again, in a form of their own."""
    fixed = [knob for knob in knobs if knob.tier is Tier.RELOAD]
    with st.form("load-model", border=False):
        for knob in fixed:
            key = f"reload-{knob.name}"
            if key not in st.session_state:
                st.session_state[key] = config.get(knob.name, knob.default)
            control(knob, key, label=knob_label(knob, tier=False))
        st.caption("Loading ends running requests. Recorded runs and the other knobs stay as they are.")
        submitted = st.form_submit_button("Load model", type="primary", icon=":material/upload:", width="stretch")
    if submitted:
        wanted = {**config, **{knob.name: st.session_state[f"reload-{knob.name}"] for knob in fixed}}
        if wanted.get("max_running", 0) > wanted.get("max_num_seqs", 0):
            wanted["max_running"] = wanted["max_num_seqs"]
        st.session_state.pop("disturbing_load", None)
        try:
            config = EngineConfig().with_changes(wanted).to_dict()
            services.load(config)
        except Exception as error:
            st.error(error_text(error), icon=":material/error:")
            if _is_run_in_progress(error):
                st.session_state["disturbing_load"] = config
        else:
            st.rerun()
    refused = st.session_state.get("disturbing_load")
    if refused is not None:
        words = "Load anyway (marks the run)"
        st.button(words, key="force-load", icon=":material/flag:", on_click=act, args=("force-load", _load, services))
    show_problem("force-load")


def _load(services: Services) -> None:
    """Callback: the refused load once more, now at the cost of the run."""
    services.load(st.session_state.pop("disturbing_load"), force=True)
