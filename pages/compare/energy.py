"""How the energy of the two settings of a comparison was measured."""

from __future__ import annotations

from collections.abc import Sequence

import streamlit as st

from engine.measure.results import RunResult
from pages.shared.energy import energy_text, has_energy


def compared_energy(runs_a: Sequence[RunResult], runs_b: Sequence[RunResult]) -> None:
    """How the energy of two settings was measured, with a first run's figures of each; or why it was not."""
    first = [(arm, runs[0]) for arm, runs in (("A", runs_a), ("B", runs_b)) if runs]
    if not any(has_energy(run) for _, run in first):
        st.caption(energy_text(first[0][1]))
        return
    st.markdown(
        "**Energy** :small[:gray[of the GPU's board; first run of each setting, means and ratios in the table]]"
    )
    for arm, run in first:
        st.caption(f"**{arm}** · {energy_text(run)}")
