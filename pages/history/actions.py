"""What can be done with runs: export, import, delete."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import streamlit as st

from pages.shared.callbacks import act, show_action_error
from pages.shared.messages import show_error
from pages.shared.run_values import moment_text, run_name
from pages.shared.text import plain
from storage import RunRow, StorageError, Store

_LISTED = 8
_BOM_HELP = "Begins CSV files with a byte order mark (U+FEFF), by which Excel knows that they are UTF-8."


def action_bar(store: Store, rows: Sequence[RunRow], selected: Sequence[str]) -> None:
    """Draw the line under the table. Exports take the selected runs, or all that are listed if none is."""
    chosen = [row for row in rows if row.run_id in selected] or list(rows)
    run_ids = [row.run_id for row in chosen]
    with st.container(horizontal=True, vertical_alignment="center", gap="small"):
        st.markdown(_count_text(len(rows), len(selected)), width="stretch")
        mark = st.checkbox("CSV for Excel", key="history-bom", help=_BOM_HELP)
        _download(
            "CSV",
            "One line a run, with every metric and knob.",
            "runs.csv",
            lambda: store.export_csv(run_ids, byte_order_mark=mark),
        )
        _download(
            "Requests CSV",
            "One line a request.",
            "requests.csv",
            lambda: store.export_requests_csv(run_ids, byte_order_mark=mark),
        )
        _download(
            "JSON", "Everything; another Headroom can import it.", "runs.json", lambda: store.export_json(run_ids)
        )
        import_popover(store)
        if st.button("Delete", icon=":material/delete:", disabled=not selected, key="history-delete"):
            _confirm_deletion(store, [row for row in rows if row.run_id in selected])


def import_popover(store: Store, label: str = "Import") -> None:
    """A popover that takes runs from a JSON file."""
    with st.popover(label, icon=":material/upload:"):
        uploaded = st.file_uploader("Runs exported as JSON", type="json", key="history-upload")
        st.button(
            "Import",
            type="primary",
            disabled=uploaded is None,
            key="history-import",
            on_click=act,
            args=("history-import", _import, store),
        )
        show_action_error("history-import")


def _import(store: Store) -> None:
    uploaded = st.session_state["history-upload"]
    report = store.import_json(uploaded.getvalue(), source=uploaded.name)
    there = f", {len(report.skipped)} were there already" if report.skipped else ""
    st.session_state["history-notice"] = f"{_runs(len(report.imported))} imported{there}."


def show_notice() -> None:
    """Say once what an action has done, or why it could not be done."""
    notice = st.session_state.pop("history-notice", None)
    if notice:
        st.toast(notice, icon=":material/check:")
    error = st.session_state.pop("history-error", None)
    if error is not None:
        show_error(error)


def _download(label: str, help_text: str, file_name: str, make: Any) -> None:
    st.download_button(
        label,
        make,  # called when the button is pressed, not at each rerun
        file_name=f"headroom-{file_name}",
        mime="application/json" if file_name.endswith("json") else "text/csv",
        icon=":material/download:",
        help=help_text,
        on_click="ignore",
        key=f"history-export-{file_name}",
    )


@st.dialog("Delete runs?", icon=":material/delete:")
def _confirm_deletion(store: Store, rows: Sequence[RunRow]) -> None:
    going = [row for row in rows if row.status != "running"]
    for row in going[:_LISTED]:
        moment = "cannot be shown" if row.unshowable else moment_text(row.started_unix_s)
        st.markdown(f"- **{plain(run_name(row))}** :small[:gray[{moment}]]")
    if len(going) > _LISTED:
        st.markdown(f"- and {len(going) - _LISTED} more")
    if len(going) < len(rows):
        st.info("Runs that are still running stay.", icon=":material/info:")
    st.markdown(
        "Their requests, samples and events go with them. This cannot be undone; export them first to keep them."
    )
    with st.container(horizontal=True, horizontal_alignment="right"):
        if st.button("Cancel", key="history-delete-cancel"):
            st.rerun()
        run_ids = [row.run_id for row in going]
        # The deletion is a callback, so that it is done before the page is drawn again without them.
        if st.button(
            f"Delete {_runs(len(going))}",
            type="primary",
            disabled=not going,
            key="history-delete-confirm",
            on_click=_delete,
            args=(store, run_ids),
        ):
            st.rerun()


def _delete(store: Store, run_ids: Sequence[str]) -> None:
    try:
        st.session_state["history-notice"] = f"{_runs(store.delete_runs(run_ids))} deleted."
    except StorageError as error:
        st.session_state["history-error"] = error


def _count_text(listed: int, selected: int) -> str:
    if selected:
        return f"**{selected}** of {_runs(listed)} selected"
    return f":gray[{_runs(listed)}. Select one to open it, several to compare them.]"


def _runs(count: int) -> str:
    return f"{count:,} run{'' if count == 1 else 's'}"
