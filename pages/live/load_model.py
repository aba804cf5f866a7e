"""The form of the knobs that need the model to be loaded again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import streamlit as st

from engine.config import EngineConfig, Knob, Tier
from pages.live.changes import is_run_in_progress
from pages.services import Services
from pages.shared.callbacks import act, show_action_error
from pages.shared.knob_controls import control, knob_label
from pages.shared.messages import error_text


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
            if is_run_in_progress(error):
                st.session_state["disturbing_load"] = config
        else:
            st.rerun()
    refused = st.session_state.get("disturbing_load")
    if refused is not None:
        label = "Load anyway (marks the run)"
        st.button(label, key="force-load", icon=":material/flag:", on_click=act, args=("force-load", _load, services))
    show_action_error("force-load")


def _load(services: Services) -> None:
    """Callback: the refused load once more, now at the cost of the run."""
    services.load(st.session_state.pop("disturbing_load"), force=True)
