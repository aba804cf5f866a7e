"""In what runs differ: model, knobs, workload, path, versions, hardware and code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
import streamlit as st

from pages.history.groups import Group
from pages.shared.messages import value_text
from pages.shared.run_values import known_knobs
from pages.shared.text import code, plain
from storage.differences import Difference, differences

_SECTIONS = {
    "identity": "Run",
    "config": "Knob",
    "workload": "Workload",
    "path": "Path that ran",
    "versions": "Version",
    "hardware": "Hardware",
}
_NAMES = {"code_dirty": "state of the code"}


def show_differences(groups: Sequence[Group]) -> None:
    """Draw what differs between the first runs of the groups; versions and hardware folded away."""
    several = any(len(group.runs) > 1 for group in groups)
    first = " :small[:gray[the first run of each setting]]" if several else ""
    st.markdown(f"**Differences**{first}")
    found = differences([group.runs[0].provenance for group in groups])
    if not found:
        st.caption("In nothing that is on record: same model, knobs, workload, path, versions, hardware and code.")
        return
    names = [plain(group.name) for group in groups]
    telling = [item for item in found if item.section not in ("versions", "hardware")]
    rest = [item for item in found if item not in telling]
    if telling:
        st.table(_difference_table(telling, names), border="horizontal")
    if rest:
        with st.expander(f"Versions and hardware ({len(rest)} differences)"):
            st.table(_difference_table(rest, names), border="horizontal")


def _difference_table(found: Sequence[Difference], names: Sequence[str]) -> pd.DataFrame:
    labels = known_knobs().labels
    rows = []
    for item in found:
        label = (
            labels.get(item.name, item.name)
            if item.section == "config"
            else _NAMES.get(item.name, item.name.replace("_", " "))
        )
        row: dict[str, Any] = {"Field": f"{_SECTIONS[item.section]}: {plain(label)}"}
        row.update({plain(name): _shown(item.name, value) for name, value in zip(names, item.values, strict=True)})
        rows.append(row)
    return pd.DataFrame(rows).set_index("Field")


def _shown(name: str, value: Any) -> str:
    if isinstance(value, str) and (name.endswith(("hash", "fingerprint", "revision"))) and value:
        return code(value[:12])
    if name == "code_dirty":
        return {True: "with changes", False: "clean"}.get(value, "unknown")
    return plain(value_text(value))
