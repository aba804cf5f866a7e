"""What to compare: presets, the knobs that differ, their values in A and B, repeats and seed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import streamlit as st

from engine.config import Knob, Tier
from pages.services import Services
from pages.shared.callbacks import act, show_action_error
from pages.shared.knob_controls import control, knob_label
from pages.shared.messages import value_text
from pages.shared.quality_reference import stored_note
from pages.shared.text import plain
from pages.shared.workloads import workload_choice


@dataclasses.dataclass(frozen=True, slots=True)
class Preset:
    """A question that is often asked: the two settings, and a workload on which the answer shows."""

    title: str
    arm_a: Mapping[str, Any]
    arm_b: Mapping[str, Any]
    workload: str


PRESETS = (
    Preset("Static or continuous batching", {"batching": "static"}, {"batching": "continuous"}, "mixed-24"),
    Preset("Model weights or INT4", {"weights": "model"}, {"weights": "int4"}, "single"),
    Preset("Model weights or INT8", {"weights": "model"}, {"weights": "int8"}, "single"),
    Preset("INT4 or INT4 with 8-bit activations", {"weights": "int4"}, {"weights": "w4a8"}, "burst-8"),
    Preset("KV cache in the model's precision or FP8", {"kv_dtype": "model"}, {"kv_dtype": "fp8"}, "mixed-24"),
    Preset("Speculation off or n-gram", {"speculation": "off"}, {"speculation": "ngram"}, "repetitive"),
    Preset("Prefix cache off or on", {"prefix_cache": False}, {"prefix_cache": True}, "shared-prefix"),
    Preset("Chunked prefill off or on", {"chunked_prefill": False}, {"chunked_prefill": True}, "mixed"),
    Preset("Reference or fused attention", {"attention": "reference"}, {"attention": "sdpa"}, "quick"),
)
_OWN = "My own choice"
_REFERENCED = {"weights", "head_weights", "group_size"}  # their losses are counted from what the file stores


@dataclasses.dataclass(frozen=True, slots=True)
class Setup:
    """A comparison as asked for."""

    workload: str
    arm_a: dict[str, Any]
    arm_b: dict[str, Any]
    repeats: int
    seed: int

    @property
    def title(self) -> str:
        """A label such as ``batching: static or continuous, burst-32``."""
        return f"{arms_text(self.arm_a, self.arm_b)}, {self.workload}"

    def request(self) -> dict[str, Any]:
        """The body of ``POST /admin/runs``."""
        comparison = {"arm_a": self.arm_a, "arm_b": self.arm_b, "repeats": self.repeats}
        return {"workload": self.workload, "comparison": comparison, "seed": self.seed, "label": self.title}


def arms_text(arm_a: Mapping[str, Any], arm_b: Mapping[str, Any]) -> str:
    """What differs between two arms.

    >>> arms_text({"weights": "model"}, {"weights": "int4"})
    'weights: model or int4'
    """
    names = [name for name in dict.fromkeys([*arm_a, *arm_b]) if arm_a.get(name) != arm_b.get(name)]
    parts = [f"{name}: {value_text(arm_a.get(name))} or {value_text(arm_b.get(name))}" for name in names]
    return "; ".join(parts) or "the same setting twice"


def setup_form(services: Services, config: Mapping[str, Any], *, busy: bool) -> None:
    """Draw the form; its button sends the comparison to the worker, where it is recorded from then on."""
    knobs = [knob for knob in services.knobs() if knob.tier is not Tier.RELOAD and len(knob.choices) != 1]
    available = [preset for preset in PRESETS if _fits(preset, knobs)]
    st.selectbox(
        "Question",
        [*(preset.title for preset in available), _OWN],
        key="compare-preset",
        on_change=_take_preset,
        args=(available, config),
        persist_state="session",
    )
    if "compare-knobs" not in st.session_state:
        _take_preset(available, config)
    workload = workload_choice(services, "compare-workload")
    names = {knob.name: knob for knob in knobs}
    chosen = st.multiselect(
        "Knobs that differ",
        list(names),
        key="compare-knobs",
        format_func=lambda name: names[name].label,
        help="Every other knob stays as it is set on the Live page.",
        persist_state="session",
    )
    arm_a, arm_b = _arms([names[name] for name in chosen], config)
    if _REFERENCED & set(chosen):
        st.caption(plain(stored_note(services)))
    left, right = st.columns(2)
    left.number_input(
        "Repeats", 1, 100, 5, key="compare-repeats", persist_state="session",
        help="How often each setting runs, A and B in turn. The interval of the difference needs at least two; "
        "five or more are better.",
    )  # fmt: skip
    right.number_input("Seed", 0, 2**31 - 1, 0, key="compare-seed", persist_state="session")
    if arm_a == arm_b:
        st.caption("A and B are the same: that measures the noise of this machine.")
    label = "A run is in progress" if busy else "Compare"
    st.button(
        label,
        type="primary",
        icon=":material/balance:",
        disabled=busy or workload is None,
        width="stretch",
        on_click=act,
        args=("compare-start", _start, services),
    )
    show_action_error("compare-start")


def _start(services: Services) -> None:
    chosen = st.session_state
    drawn = [name for name in chosen["compare-knobs"] if f"compare-a-{name}" in chosen]
    arm_a, arm_b = ({name: chosen[f"compare-{arm}-{name}"] for name in drawn} for arm in ("a", "b"))
    repeats, seed = int(chosen["compare-repeats"]), int(chosen["compare-seed"])
    setup = Setup(str(chosen["compare-workload"]), arm_a, arm_b, repeats, seed)
    services.recorder.launch(setup.request(), title=setup.title)


def _fits(preset: Preset, knobs: Sequence[Knob]) -> bool:
    known = {knob.name for knob in knobs}
    return set(preset.arm_a) | set(preset.arm_b) <= known


def _take_preset(available: Sequence[Preset], config: Mapping[str, Any]) -> None:
    """Fill the form from the chosen preset (callback, and once at the start)."""
    title = st.session_state.get("compare-preset") or available[0].title
    preset = next((item for item in available if item.title == title), None)
    if preset is None:
        st.session_state.setdefault("compare-knobs", [])
        return
    st.session_state["compare-knobs"] = list(preset.arm_a)
    st.session_state["compare-workload"] = preset.workload
    for arm, values in (("a", preset.arm_a), ("b", preset.arm_b)):
        for name, value in values.items():
            st.session_state[f"compare-{arm}-{name}"] = value


def _arms(knobs: Sequence[Knob], config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The two settings, each knob with one control a side; both start from the current setting."""
    arms: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    for knob in knobs:
        with st.container(border=True, gap="small"):
            st.markdown(knob_label(knob))
            for arm, label, values in zip("ab", "AB", arms, strict=True):
                key = f"compare-{arm}-{knob.name}"
                if key not in st.session_state:
                    st.session_state[key] = config.get(knob.name, knob.default)
                values[knob.name] = control(knob, key, label=label)
    return arms
