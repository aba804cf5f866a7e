"""History: every run on record, filtered, opened, compared, exported, deleted."""

from __future__ import annotations

import contextlib

import streamlit as st

from engine.measure.results import RunResult
from pages.history.actions import action_bar, import_popover, show_notice
from pages.history.detail import run_detail
from pages.history.filters import ChosenFilters, filter_bar
from pages.history.side_by_side import compare_runs
from pages.history.table import runs_table, select_runs
from pages.shared.links import COMPARE, LIVE, link_to
from pages.shared.messages import show_error
from pages.shared.run_values import setting_labels
from pages.shared.store import get_store
from pages.shared.text import badge_label, plain
from storage import RunFilter, RunRow, StorageError, Store, UnshowableRun

_MOST_LISTED = 1000
_POLL_S = 3.0


def main() -> None:
    """Draw the page; what the database refuses becomes a message with a remedy."""
    show_notice()
    try:
        _page(get_store())
    except StorageError as error:
        show_error(error)
        st.button("Try again", icon=":material/refresh:")


def _page(store: Store) -> None:
    facets = store.facets()
    if not facets.statuses:
        _empty(store)
        return
    _follow_link(store)
    outline = store.outline()
    everything = store.list_runs(limit=_MOST_LISTED)
    occurring = sorted({label for row in everything for label in setting_labels(row.provenance.config)})
    filters = filter_bar(facets, occurring)
    rows = everything if filters.is_empty else filters.apply(store.list_runs(filters.where, limit=_MOST_LISTED))
    st.fragment(_watch, run_every=_POLL_S)(store, outline)
    _comparison_notice(filters)
    if not rows:
        st.info("No run matches these filters.", icon=":material/filter_alt_off:")
        return
    if len(everything) == _MOST_LISTED:
        st.caption(f"The newest {_MOST_LISTED:,} runs are listed; filter to reach older ones.")
    selected = runs_table(rows)
    action_bar(store, rows, selected)
    _opened(store, rows, selected)


def _opened(store: Store, rows: list[RunRow], selected: list[str]) -> None:
    if not selected:
        return
    found = store.read_runs(selected)
    runs = [run for run in found if isinstance(run, RunResult)]
    with st.container(border=True):
        for run in found:
            if isinstance(run, UnshowableRun):
                _unshowable(run)
        if len(runs) == 1:
            run_detail(store, next(row for row in rows if row.run_id == runs[0].run_id), runs[0])
        elif runs:
            compare_runs(runs)


def _unshowable(run: UnshowableRun) -> None:
    name = plain(run.label) or f"`{plain(run.run_id)}`"
    st.error(
        f"**{name}** cannot be shown: {plain(run.reason)}. It was not recorded by this version of Headroom, or its row "
        "was changed. It can be deleted; exports name it with this reason.",
        icon=":material/broken_image:",
    )


def _follow_link(store: Store) -> None:
    """``?run=…`` (once or several times) opens these runs, ``?comparison=…`` lists and opens those of a comparison."""
    wanted = st.query_params.get_all("run")
    comparison = st.query_params.get("comparison")
    if comparison and st.session_state.get("history-followed") != comparison:
        wanted = [row.run_id for row in store.list_runs(RunFilter(comparison_id=comparison))]
    st.session_state["history-followed"] = comparison
    if wanted:
        select_runs(wanted)
        st.query_params.pop("run", None)


def _comparison_notice(filters: ChosenFilters) -> None:
    if filters.where.comparison_id is None:
        return
    with st.container(horizontal=True, vertical_alignment="center"):
        st.badge(
            badge_label(f"Runs of comparison {filters.where.comparison_id[:8]}"),
            icon=":material/balance:",
            color="primary",
        )
        st.button("Show all runs", type="tertiary", key="history-all-runs", on_click=_show_all_runs)


def _show_all_runs() -> None:
    st.query_params.pop("comparison", None)


def _watch(store: Store, shown: dict[str, tuple[str, str]]) -> None:
    """Show runs that come, end or go meanwhile, whoever records them."""
    with contextlib.suppress(StorageError):  # the next full run of the page reports it
        if store.outline() != shown:
            st.rerun()


def _empty(store: Store) -> None:
    with st.container(border=True, horizontal_alignment="center", gap="medium"):
        st.subheader(":material/history: No runs yet", anchor=False, width="content")
        st.markdown(
            "Every measured run is kept here, with all that is needed to repeat it. "
            "Run a workload on **Live**, two settings against each other on **Compare**, or from a shell:",
            width="content",
        )
        command = "headroom bench --model smollm2-135m --workload quick --json | headroom history record"
        st.code(command, language="bash", width="content")
        with st.container(horizontal=True, horizontal_alignment="center", vertical_alignment="center"):
            link_to(LIVE)
            link_to(COMPARE)
            import_popover(store, "Import runs")
    st.fragment(_watch, run_every=_POLL_S)(store, {})


main()
