"""Between a :class:`~engine.measure.results.RunResult` and the rows it is kept in: exact both ways."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, Row, Table, delete, insert, inspect, select

from engine.measure.results import EventRecord, Provenance, RequestRecord, RunResult, SampleRecord, from_json
from storage.owner import Owner
from storage.tables import Base, StoredEvent, StoredMetric, StoredRequest, StoredRun, StoredSample
from storage.types import Unreadable
from storage.validation import UnfitError, check

_CHUNK = 500  # run ids in one IN (...): SQLite and drivers limit the number of parameters


def table(model: type[Base]) -> Table:
    """The table behind a mapped class (rows are written and read in bulk, without ORM objects)."""
    found = inspect(model).local_table
    assert isinstance(found, Table)
    return found


RUNS = table(StoredRun)
METRICS = table(StoredMetric)
# (table, field of RunResult, type of its items); columns are named as the record's fields
_DETAILS = (
    (table(StoredRequest), "requests", RequestRecord),
    (table(StoredSample), "samples", SampleRecord),
    (table(StoredEvent), "events", EventRecord),
)
_PROVENANCE_FIELDS = tuple(field.name for field in dataclasses.fields(Provenance))
_RUN_FIELDS = ("run_id", "kind", "status", "label", "started_unix_s", "duration_s", "comparison_id", "arm", "repeat")
_LAST_FIELDS = ("error", "disturbed", "quality_reference")


def run_values(result: RunResult, owner: Owner | None) -> dict[str, Any]:
    """Column values of the run's own row."""
    provenance = result.provenance
    values = {name: getattr(result, name) for name in (*_RUN_FIELDS, *_LAST_FIELDS)}
    values.update({name: getattr(provenance, name) for name in _PROVENANCE_FIELDS})
    values["workload_name"] = str(provenance.workload.get("name", ""))
    values["metric_names"] = list(result.metrics)
    values["owner_host"] = owner.host if owner else None
    values["owner_pid"] = owner.pid if owner else None
    values["owner_started_unix_s"] = owner.started_unix_s if owner else None
    return values


def write_details(connection: Connection, result: RunResult) -> None:
    """Replace the metrics, requests, samples and events of a run whose row is there."""
    metrics = [{"run_id": result.run_id, "name": name, "value": value} for name, value in result.metrics.items()]
    _replace(connection, METRICS, result.run_id, metrics)
    for target, field, record_type in _DETAILS:
        names = [item.name for item in dataclasses.fields(record_type)]
        rows = [
            {"run_id": result.run_id, "position": position, **{name: getattr(record, name) for name in names}}
            for position, record in enumerate(getattr(result, field))
        ]
        _replace(connection, target, result.run_id, rows)


def _replace(connection: Connection, target: Table, run_id: str, rows: list[dict[str, Any]]) -> None:
    connection.execute(delete(target).where(target.c.run_id == run_id))
    if rows:
        connection.execute(insert(target), rows)


@dataclasses.dataclass(frozen=True, slots=True)
class UnshowableRun:
    """A run in the database that cannot be read: ``reason`` names the field. It can be listed and deleted."""

    run_id: str
    label: str
    reason: str


def read_runs(connection: Connection, run_ids: Sequence[str]) -> list[RunResult | UnshowableRun]:
    """The complete runs of these ids, in their order; ids that are not there are left out."""
    wanted = list(dict.fromkeys(run_ids))
    rows = {row.run_id: row for row in _select_in(connection, RUNS, wanted)}
    metrics = read_metrics(connection, wanted)
    details = {field: _read_details(connection, target, kind, wanted) for target, field, kind in _DETAILS}
    found: list[RunResult | UnshowableRun] = []
    for run_id in wanted:
        if run_id in rows:
            document = run_document(rows[run_id], metrics.get(run_id, {}))
            document |= {field: rows_of.get(run_id, []) for field, rows_of in details.items()}
            reason = why_unshowable(document)
            label = printable(document["label"])
            found.append(from_json(document) if reason is None else UnshowableRun(run_id, label, reason))
    return found


def run_document(row: Row[Any], metrics: dict[str, float | None]) -> dict[str, Any]:
    """The run in a row of ``runs``, without requests, samples and events, as :func:`to_json` would give it."""
    document = {name: getattr(row, name) for name in (*_RUN_FIELDS, *_LAST_FIELDS)}
    document["provenance"] = {name: getattr(row, name) for name in _PROVENANCE_FIELDS}
    names = row.metric_names  # in the order in which the run had them
    in_order = isinstance(names, list) and all(isinstance(name, str) for name in names)
    document["metrics"] = {name: metrics.get(name) for name in names} if in_order else Unreadable(str(names))
    return document


def why_unshowable(document: Mapping[str, Any]) -> str | None:
    """None if the run in these columns can be shown, else the field at fault and what is wrong with it."""
    try:
        check(document, RunResult, strict=False)
    except UnfitError as error:
        return str(error)
    return None


def printable(value: Any) -> str:
    """A text from a row that may hold anything."""
    return value.encode(errors="replace").decode() if isinstance(value, str) else ""


def read_metrics(connection: Connection, run_ids: Sequence[str]) -> dict[str, dict[str, float | None]]:
    """``{run_id: {metric: value}}``."""
    found: dict[str, dict[str, float | None]] = {}
    for row in _select_in(connection, METRICS, run_ids):
        found.setdefault(row.run_id, {})[row.name] = row.value
    return found


def _read_details(
    connection: Connection, source: Table, record_type: Any, run_ids: Sequence[str]
) -> dict[str, list[dict[str, Any]]]:
    """``{run_id: [columns of a record]}``."""
    names = [field.name for field in dataclasses.fields(record_type)]
    found: dict[str, list[dict[str, Any]]] = {}
    for row in _select_in(connection, source, run_ids):
        found.setdefault(row.run_id, []).append({name: getattr(row, name) for name in names})
    return found


def _select_in(connection: Connection, source: Table, run_ids: Sequence[str]) -> Iterable[Row[Any]]:
    order = [source.c.run_id, source.c.position] if "position" in source.c else [source.c.run_id]
    for start in range(0, len(run_ids), _CHUNK):
        chunk = run_ids[start : start + _CHUNK]
        yield from connection.execute(select(source).where(source.c.run_id.in_(chunk)).order_by(*order))
