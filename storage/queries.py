"""Questions to the record that need no requests and samples: lists of runs, comparisons, what there is to choose."""

from __future__ import annotations

import dataclasses
from typing import Any

from sqlalchemy import ColumnElement, Connection, Select, func, or_, select

from engine.measure.results import Provenance
from storage.owner import Owner
from storage.records import METRICS, RUNS, printable, read_metrics, run_document, table, why_unshowable
from storage.tables import StoredRequest
from storage.validation import is_moment


@dataclasses.dataclass(frozen=True, slots=True)
class RunFilter:
    """Which runs are meant; None (or an empty tuple) does not restrict.

    Attributes:
        models, statuses, kinds, workloads: any of these.
        text: part of the label, the model, the workload's name or the error, in any case; or the start of the run id.
        since_unix_s, until_unix_s: started at or after, and before.
        config_hash, workload_hash, comparison_id: exactly.
        disturbed: True: only runs that were disturbed; False: only those that were not.
    """

    models: tuple[str, ...] = ()
    statuses: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    workloads: tuple[str, ...] = ()
    text: str | None = None
    since_unix_s: float | None = None
    until_unix_s: float | None = None
    config_hash: str | None = None
    workload_hash: str | None = None
    comparison_id: str | None = None
    disturbed: bool | None = None

    def conditions(self) -> list[ColumnElement[bool]]:
        """The filter as SQL conditions on ``runs``."""
        c = RUNS.c
        chosen = {"model": self.models, "status": self.statuses, "kind": self.kinds, "workload_name": self.workloads}
        found: list[ColumnElement[bool]] = [c[name].in_(values) for name, values in chosen.items() if values]
        exact = ("config_hash", "workload_hash", "comparison_id")
        found += [c[name] == getattr(self, name) for name in exact if getattr(self, name) is not None]
        if self.since_unix_s is not None:
            found.append(c.started_unix_s >= self.since_unix_s)
        if self.until_unix_s is not None:
            found.append(c.started_unix_s < self.until_unix_s)
        if self.disturbed is not None:
            found.append(c.disturbed != [] if self.disturbed else c.disturbed == [])
        if self.text:
            searched = (c.label, c.model, c.workload_name, c.error)
            texts = [column.icontains(self.text, autoescape=True) for column in searched]
            found.append(or_(*texts, c.run_id.istartswith(self.text, autoescape=True)))
        return found


@dataclasses.dataclass(frozen=True, slots=True)
class RunRow:
    """A run as a list shows it: all but its requests, samples and events.

    Attributes:
        num_requests: how many requests are recorded.
        owner: the process that is running it; None once it has ended.
        unshowable: why this row of the database cannot be shown (the field at fault), None for every other row. Its
            other fields are then empty, its start is 0.
        Others: as in :class:`engine.measure.results.RunResult`.
    """

    run_id: str
    kind: str
    status: str
    label: str
    started_unix_s: float
    duration_s: float
    provenance: Provenance
    metrics: dict[str, float | None]
    num_requests: int
    comparison_id: str | None
    arm: str | None
    repeat: int | None
    error: str | None
    owner: Owner | None
    disturbed: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    quality_reference: str | None = None
    unshowable: str | None = None

    @property
    def model(self) -> str:
        """Name of the model."""
        return self.provenance.model

    @property
    def workload_name(self) -> str:
        """Name of the workload, "" if it has none."""
        return str(self.provenance.workload.get("name", ""))


@dataclasses.dataclass(frozen=True, slots=True)
class ComparisonRow:
    """A comparison as a list shows it; ``run_ids`` maps an arm to its runs in the order of the repetitions."""

    comparison_id: str
    label: str
    model: str
    workload_name: str
    started_unix_s: float
    statuses: tuple[str, ...]
    run_ids: dict[str, list[str]]


@dataclasses.dataclass(frozen=True, slots=True)
class Facets:
    """The values that occur, for the choices of a filter."""

    models: list[str]
    kinds: list[str]
    statuses: list[str]
    workloads: list[str]


def select_rows(
    connection: Connection, where: RunFilter, order_by: str, descending: bool, limit: int | None, offset: int
) -> list[RunRow]:
    """The runs that ``where`` means. See :meth:`storage.store.Store.list_runs`."""
    query = _ordered(select(RUNS).where(*where.conditions()), order_by, descending).limit(limit).offset(offset)
    rows = connection.execute(query).all()
    run_ids = [row.run_id for row in rows]
    metrics = read_metrics(connection, run_ids)
    counts = _request_counts(connection)
    return [_run_row(row, metrics.get(row.run_id, {}), counts.get(row.run_id, 0)) for row in rows]


def _ordered(query: Select[Any], order_by: str, descending: bool) -> Select[Any]:
    """Ordered by a column of ``runs`` or else by a metric, what is not measured last; then newest first."""
    if order_by in RUNS.c:
        key: ColumnElement[Any] = RUNS.c[order_by]
    else:
        joined = (METRICS.c.run_id == RUNS.c.run_id) & (METRICS.c.name == order_by)
        query = query.outerjoin(METRICS, joined)
        key = METRICS.c.value
    direction = key.desc() if descending else key.asc()
    return query.order_by(direction.nulls_last(), RUNS.c.started_unix_s.desc(), RUNS.c.run_id)


def _request_counts(connection: Connection) -> dict[str, int]:
    requests = table(StoredRequest)
    query = select(requests.c.run_id, func.count()).group_by(requests.c.run_id)
    return {row[0]: row[1] for row in connection.execute(query)}


def _run_row(row: Any, metrics: dict[str, float | None], num_requests: int) -> RunRow:
    document = run_document(row, metrics)
    reason = why_unshowable(document)
    if reason is not None:
        document |= _EMPTY | {name: printable(document[name]) for name in ("kind", "status", "label")}
    document["provenance"] = Provenance(**document["provenance"])
    return RunRow(**document, num_requests=num_requests, owner=owner_of(row), unshowable=reason)


_EMPTY: dict[str, Any] = {
    **dict.fromkeys(("started_unix_s", "duration_s"), 0.0),
    **dict.fromkeys(("comparison_id", "arm", "repeat", "error", "quality_reference")),
    "metrics": {},
    "disturbed": [],
    "provenance": {
        **dict.fromkeys(("model", "model_fingerprint", "config_hash", "workload_hash", "code_revision"), ""),
        **{name: {} for name in ("config", "workload", "versions", "hardware", "path")},
        "seed": 0,
        "code_dirty": None,
    },
}


def owner_of(row: Any) -> Owner | None:
    """The process that announced a running run."""
    numbers = isinstance(row.owner_pid, int) and isinstance(row.owner_started_unix_s, (int, float))
    if not numbers or not isinstance(row.owner_host, str):
        return None
    return Owner(row.owner_host, row.owner_pid, row.owner_started_unix_s)


def select_comparisons(connection: Connection) -> list[ComparisonRow]:
    """All comparisons, the newest first."""
    c = RUNS.c
    columns = (c.run_id, c.label, c.model, c.workload_name, c.started_unix_s, c.status, c.arm, c.comparison_id)
    query = select(*columns).where(c.comparison_id.is_not(None)).order_by(c.repeat, c.started_unix_s)
    groups: dict[str, list[Any]] = {}
    for row in connection.execute(query):
        if not is_moment(row.started_unix_s):
            continue  # its run is listed as one that cannot be shown
        groups.setdefault(row.comparison_id, []).append(row)
    comparisons = [_comparison_row(comparison_id, rows) for comparison_id, rows in groups.items()]
    return sorted(comparisons, key=lambda comparison: comparison.started_unix_s, reverse=True)


def _comparison_row(comparison_id: str, rows: list[Any]) -> ComparisonRow:
    run_ids: dict[str, list[str]] = {}
    for row in rows:
        run_ids.setdefault(row.arm or "", []).append(row.run_id)
    first = min(rows, key=lambda row: row.started_unix_s)
    return ComparisonRow(
        comparison_id=comparison_id,
        label=printable(first.label),
        model=printable(first.model),
        workload_name=printable(first.workload_name),
        started_unix_s=first.started_unix_s,
        statuses=tuple(sorted({printable(row.status) for row in rows})),
        run_ids=dict(sorted(run_ids.items())),
    )


def select_facets(connection: Connection) -> Facets:
    """The values that occur, sorted."""
    columns = (RUNS.c.model, RUNS.c.kind, RUNS.c.status, RUNS.c.workload_name)
    occurring = ([printable(value) for value in connection.scalars(select(column).distinct())] for column in columns)
    return Facets(*(sorted(values) for values in occurring))
