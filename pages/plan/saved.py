"""A plan to take along: launch commands, files, a name to keep it under, and two plans side by side."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import streamlit as st

from engine.capacity import Deployment, as_json, as_markdown, as_yaml, compare_documents, launch_commands, plan_document
from engine.paths import headroom_home, private_dir
from kernels.trust import private_file
from pages.plan.fields import DEFAULTS, key
from pages.shared.text import plain

_LONGEST_NAME = 60


def launch(found: Deployment) -> None:
    """Commands that start one copy of the plan."""
    with st.expander("Start it: vLLM, SGLang, Headroom", icon=":material/terminal:"):
        for item in launch_commands(found.plan.request, found.workload):
            st.markdown(f"**{plain(item.engine)}**")
            st.code(item.command, language="bash", wrap_lines=True)
            for remark in item.remarks:
                st.caption(f":orange[:material/warning:] {plain(remark)}")


def save_and_compare(found: Deployment) -> None:
    """Name, keep, download, open again, compare."""
    with st.expander("Save, share, compare", icon=":material/bookmark:"):
        left, right = st.columns([3, 1], vertical_alignment="bottom")
        default = f"{found.plan.request.spec.name} on {found.plan.request.gpus} × {found.plan.request.gpu.name}"
        typed = left.text_input(
            "Name of this plan", placeholder=default, max_chars=_LONGEST_NAME, key=key("name"), help="To find it again."
        )
        document = plan_document(found, typed or default) | {"inputs": current_inputs()}
        right.button("Save", on_click=save_plan, args=(document,), width="stretch", key=key("save"))
        _downloads(document)
        st.caption("The address of this page is a link to this plan: every input is in it.")
        _compare(document)


def current_inputs() -> dict[str, Any]:
    """The inputs as they are, to open the plan again."""
    names = [*DEFAULTS, "max-seqs", "prompt", "answer", "price"]
    return {name: st.session_state.get(key(name)) for name in names if key(name) in st.session_state}


def _downloads(document: dict[str, Any]) -> None:
    slug = _slug(document["name"])
    kinds = (("JSON", as_json, "json"), ("Markdown", as_markdown, "md"), ("YAML", as_yaml, "yaml"))
    for column, (label, render, ending) in zip(st.columns(3), kinds, strict=True):
        column.download_button(
            label,
            render(document),
            file_name=f"{slug}.{ending}",
            icon=":material/download:",
            key=key(f"download-{ending}"),
            width="stretch",
        )


def save_plan(document: dict[str, Any]) -> None:
    """Keep a plan under its name; a plan of the same name is replaced."""
    file = private_file(private_dir(_folder()) / f"{_slug(document['name'])}.json")
    file.write_text(as_json(document), encoding="utf-8")


def saved_plans() -> dict[str, dict[str, Any]]:
    """``{name: document}`` of the plans that were kept; files that cannot be read are passed over."""
    plans = {}
    for file in sorted(_folder().glob("*.json")):
        try:
            document = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(document, dict) and isinstance(document.get("name"), str):
            plans[document["name"]] = document
    return plans


def _folder() -> Path:
    return headroom_home() / "plans"


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.")[:_LONGEST_NAME] or "plan"


def open_plan(document: dict[str, Any]) -> None:
    """Put a kept plan's inputs back (a button's callback)."""
    inputs = document.get("inputs")
    if isinstance(inputs, dict):
        for name, value in inputs.items():
            st.session_state[key(str(name))] = value


def delete_plan(name: str) -> None:
    """Forget a kept plan."""
    (_folder() / f"{_slug(name)}.json").unlink(missing_ok=True)


def _compare(document: dict[str, Any]) -> None:
    plans = saved_plans()
    if not plans:
        return
    columns = st.columns([3, 1, 1], vertical_alignment="bottom")
    name = columns[0].selectbox("Compare with", list(plans), key=key("compare"), help="A plan that was saved here.")
    if name not in plans:
        return
    columns[1].button("Open", on_click=open_plan, args=(plans[name],), width="stretch", key=key("open"))
    columns[2].button("Delete", on_click=delete_plan, args=(name,), width="stretch", key=key("delete"))
    rows = compare_documents(plans[name], document)
    table = pd.DataFrame(
        [
            {
                "figure": row["figure"],
                name: row["first"],
                "this plan": row["second"],
                "change": "" if row["change"] is None else f"{100 * row['change']:+.0f} %",
                "": {True: "better", False: "worse", None: ""}[row["better"]],
            }
            for row in rows
        ]
    )
    st.dataframe(table, hide_index=True, width="stretch")
