"""Runs as files: CSV for spreadsheets and notebooks, JSON for another Headroom."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from engine.measure.results import RequestRecord, RunResult, to_json


def documents_json(results: Sequence[RunResult]) -> str:
    """A JSON list of the complete documents."""
    return json.dumps([to_json(result) for result in results], indent=1)


def runs_csv(results: Sequence[RunResult]) -> str:
    """One line a run. Nested provenance becomes dotted columns: ``config.batching``, ``path.weights`` …"""
    return _csv([_run_line(result) for result in results], list(_run_line_start_names()))


def requests_csv(results: Sequence[RunResult]) -> str:
    """One line a request; ``itl_ms`` holds its gaps separated by spaces."""
    names = ["run_id", "label", *(field.name for field in dataclasses.fields(RequestRecord))]
    lines = [_request_line(result, request) for result in results for request in result.requests]
    return _csv(lines, names)


def _run_line_start_names() -> tuple[str, ...]:
    return (
        *("run_id", "started", "label", "kind", "status", "error", "comparison_id", "arm", "repeat", "duration_s"),
        *("model", "model_fingerprint", "config_hash", "workload_hash", "seed", "code_revision", "code_dirty"),
    )


def _run_line(result: RunResult) -> dict[str, Any]:
    provenance = result.provenance
    started = datetime.fromtimestamp(result.started_unix_s, UTC).isoformat(timespec="seconds")
    line: dict[str, Any] = {"started": started}
    for name in _run_line_start_names():
        if name != "started":
            line[name] = getattr(result if hasattr(result, name) else provenance, name)
    line.update({f"metric.{name}": value for name, value in result.metrics.items()})
    for section in ("config", "path", "workload", "versions", "hardware"):
        line.update(_flattened(getattr(provenance, section), section))
    return line


def _flattened(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat.update(_flattened(value, f"{prefix}.{name}"))
        else:
            flat[f"{prefix}.{name}"] = value
    return flat


def _request_line(result: RunResult, request: RequestRecord) -> dict[str, Any]:
    line = {field.name: getattr(request, field.name) for field in dataclasses.fields(request)}
    line["itl_ms"] = " ".join(str(gap) for gap in request.itl_ms)
    return {"run_id": result.run_id, "label": result.label, **line}


def _csv(lines: Iterable[Mapping[str, Any]], first: list[str]) -> str:
    """CSV with the columns ``first`` and then every other one that occurs, grouped by what is before the dot."""
    lines = list(lines)
    others = dict.fromkeys(name for line in lines for name in line if name not in first)
    groups = list(dict.fromkeys(name.split(".")[0] for name in others))
    columns = first + sorted(others, key=lambda name: groups.index(name.split(".")[0]))
    target = io.StringIO()
    writer = csv.DictWriter(target, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _cell(value) for name, value in line.items()} for line in lines)
    return target.getvalue()


def _cell(value: Any) -> Any:
    if isinstance(value, bool):
        return "true" if value else "false"
    return json.dumps(value) if isinstance(value, (list, dict)) else value
