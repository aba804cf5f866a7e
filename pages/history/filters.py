"""The row of filters above the table of runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from datetime import date, datetime, time, timedelta
from typing import Any

import streamlit as st

from pages.shared.run_values import reader_timezone, setting_labels
from storage import Facets, RunFilter, RunRow

_DISTURBED_HELP = "Runs during which a knob was changed by force or other requests came: left out of every average."
_KINDS = {"bench": "single runs", "compare": "runs of a comparison"}


@dataclasses.dataclass(frozen=True, slots=True)
class ChosenFilters:
    """The filters as they are set: what the database filters by, and settings (``"weights int4"``) of a run."""

    where: RunFilter
    settings: tuple[str, ...]

    @property
    def is_empty(self) -> bool:
        """True if nothing is filtered out."""
        return self == ChosenFilters(RunFilter(), ())

    def apply(self, rows: Sequence[RunRow]) -> list[RunRow]:
        """The rows with all of the chosen settings."""
        return [row for row in rows if set(self.settings) <= set(setting_labels(row.provenance.config))]


def filter_bar(facets: Facets, settings: Sequence[str]) -> ChosenFilters:
    """Draw the filters; ``settings`` are the changed knobs that occur in the record."""
    columns = st.columns([2, 1.25, 1.25, 1.75, 2.1, 0.95], vertical_alignment="bottom")
    text = columns[0].text_input(
        "Search",
        key="history-text",
        icon=":material/search:",
        placeholder="Label, model, workload, error, run id",
    )
    statuses = columns[1].multiselect("Status", facets.statuses, key="history-status", placeholder="Any")
    workloads = columns[2].multiselect("Workload", facets.workloads, key="history-workload", placeholder="Any")
    chosen = columns[3].multiselect(
        "Changed knobs", settings, key="history-settings", placeholder="Any", help="Runs that have all of these."
    )
    no_days: Any = ()  # an empty range, which the annotations of date_input leave out
    days = columns[4].date_input("Started", value=no_days, key="history-days", help="A first and a last day.")
    with columns[5].popover("More", icon=":material/tune:", width="stretch"):
        models = st.multiselect("Model", facets.models, key="history-model", placeholder="Any")
        kinds = st.multiselect(
            "Kind", facets.kinds, key="history-kind", placeholder="Any", format_func=lambda kind: _KINDS.get(kind, kind)
        )
        disturbed = st.multiselect(
            "Disturbed", ["yes", "no"], key="history-disturbed", placeholder="Any", help=_DISTURBED_HELP
        )
        config_hash = st.text_input("Config hash", key="history-config-hash", placeholder="Exactly this one")
        st.button("Clear all filters", icon=":material/filter_alt_off:", on_click=_clear, width="stretch")
    since, until = _moments(days)
    where = RunFilter(
        models=tuple(models),
        statuses=tuple(statuses),
        kinds=tuple(kinds),
        workloads=tuple(workloads),
        text=(text or "").strip() or None,
        since_unix_s=since,
        until_unix_s=until,
        config_hash=(config_hash or "").strip() or None,
        comparison_id=st.query_params.get("comparison"),
        disturbed=disturbed == ["yes"] if len(disturbed) == 1 else None,
    )
    return ChosenFilters(where, tuple(chosen))


def _clear() -> None:
    for name in ("text", "config-hash"):
        st.session_state[f"history-{name}"] = ""
    for name in ("status", "workload", "settings", "model", "kind", "disturbed"):
        st.session_state[f"history-{name}"] = []
    st.session_state["history-days"] = ()
    st.query_params.pop("comparison", None)


def _moments(days: object) -> tuple[float | None, float | None]:
    """Start of the first and end of the last day on the reader's clock; a single day is itself both."""
    chosen = [day for day in days if isinstance(day, date)] if isinstance(days, (tuple, list)) else []
    if not chosen:
        return None, None
    first, last = chosen[0], chosen[-1] + timedelta(days=1)
    zone = reader_timezone()
    return tuple(datetime.combine(day, time(), zone).timestamp() for day in (first, last))  # type: ignore[return-value]
