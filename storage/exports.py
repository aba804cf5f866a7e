"""Runs as files: CSV for spreadsheets and notebooks, JSON for another Headroom.

A spreadsheet takes a cell that begins with ``= + - @`` for a formula, whoever wrote it. Texts that do (labels, model
names, errors come from outside) get an apostrophe in front, as OWASP recommends against CSV injection; numbers stay
numbers, negative ones too. No cell exceeds the 32,767 characters that a cell of Excel holds.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from engine.measure.results import RequestRecord, RunResult, to_json
from storage.documents import CANNOT_BE_SHOWN
from storage.records import UnshowableRun

BYTE_ORDER_MARK = "\ufeff"
MOST_CHARACTERS = 32_767  # of a cell, https://support.microsoft.com/office/excel-specifications-and-limits
# A formula may hide behind white space and quotes; full-width signs are read as the plain ones.
_FORMULA = re.compile(r"[\s\"'\u2018\u2019\u201c\u201d]*[=+\-@\uff1d\uff0b\uff0d\uff20]|[ \"']*[\t\r\n]")
Exported = RunResult | UnshowableRun


def documents_json(results: Sequence[Exported]) -> str:
    """A JSON list of the complete documents; a run that cannot be shown is there with its id and the reason."""
    return json.dumps([_document(result) for result in results], indent=1)


def runs_csv(results: Sequence[Exported]) -> str:
    """One line a run. Nested provenance becomes dotted columns: ``config.batching``, ``path.weights`` …"""
    return _csv([_run_line(result) for result in results], list(_run_line_start_names()))


def requests_csv(results: Sequence[Exported]) -> str:
    """One line a request; ``itl_ms`` holds its gaps in ms, rounded to µs, separated by spaces.

    Gaps that do not fit a cell go on in columns ``itl_ms.2``, ``itl_ms.3`` …
    """
    names = ["run_id", "label", "disturbed", *(field.name for field in dataclasses.fields(RequestRecord))]
    lines: list[dict[str, Any]] = []
    for result in results:
        if isinstance(result, UnshowableRun):
            lines.append(_unshowable_line(result))
        else:
            lines += [_request_line(result, request) for request in result.requests]
    return _csv(lines, names)


def _document(result: Exported) -> dict[str, Any]:
    if isinstance(result, UnshowableRun):
        return {"run_id": result.run_id, "label": result.label, CANNOT_BE_SHOWN: result.reason}
    return to_json(result)


def _unshowable_line(result: UnshowableRun) -> dict[str, Any]:
    return {"run_id": result.run_id, "label": result.label, "error": f"cannot be shown: {result.reason}"}


def _run_line_start_names() -> tuple[str, ...]:
    return (
        *("run_id", "started", "label", "kind", "status", "error", "disturbed", "comparison_id", "arm", "repeat"),
        *("duration_s", "model", "model_fingerprint", "config_hash", "workload_hash", "seed", "code_revision"),
        *("code_dirty", "quality_reference"),
    )


def _run_line(result: Exported) -> dict[str, Any]:
    if isinstance(result, UnshowableRun):
        return _unshowable_line(result)
    provenance = result.provenance
    line: dict[str, Any] = {"started": _moment(result.started_unix_s)}
    for name in _run_line_start_names():
        if name != "started":
            line[name] = getattr(result if hasattr(result, name) else provenance, name)
    line["disturbed"] = "; ".join(f"{_moment(entry['time_unix_s'])} {entry['what']}" for entry in result.disturbed)
    line.update({f"metric.{name}": value for name, value in result.metrics.items()})
    for section in ("config", "path", "workload", "versions", "hardware"):
        line.update(_flattened(getattr(provenance, section), section))
    return line


def _moment(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s, UTC).isoformat(timespec="seconds")


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
    line |= _gaps(request.itl_ms)
    return {"run_id": result.run_id, "label": result.label, "disturbed": bool(result.disturbed), **line}


def _gaps(itl_ms: Sequence[float]) -> dict[str, str]:
    """The gaps in as many cells as they need."""
    cells: list[list[str]] = [[]]
    room = MOST_CHARACTERS
    for gap in itl_ms:
        text = f"{gap:.3f}".rstrip("0").rstrip(".")
        if len(text) + 1 > room:
            cells.append([])
            room = MOST_CHARACTERS
        cells[-1].append(text)
        room -= len(text) + 1
    return {f"itl_ms.{number}" if number > 1 else "itl_ms": " ".join(cell) for number, cell in enumerate(cells, 1)}


def _csv(lines: Iterable[Mapping[str, Any]], first: list[str]) -> str:
    """CSV with the columns ``first`` and then every other one that occurs, grouped by what is before the dot."""
    lines = list(lines)
    others = dict.fromkeys(name for line in lines for name in line if name not in first)
    groups = list(dict.fromkeys(name.split(".")[0] for name in others))
    columns = first + sorted(others, key=lambda name: groups.index(name.split(".")[0]))
    target = _Lines()
    writer = csv.writer(target, lineterminator="\r\n")
    writer.writerow([_text_cell(name) for name in columns])
    writer.writerows([_cell(line.get(name, "")) for name in columns] for line in lines)
    return "".join(target.lines)


class _Lines:
    """Takes a line at a time and ends it with a line feed. The writer itself is told CR LF, so that it puts quotes
    around a text with either of them."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def write(self, line: str) -> None:
        self.lines.append(line.removesuffix("\r\n") + "\n")


def _cell(value: Any) -> Any:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, dict)):
        return _text_cell(json.dumps(value))
    return _text_cell(value) if isinstance(value, str) else value


def _text_cell(text: str) -> str:
    """A text that no spreadsheet runs, of a length that every spreadsheet holds."""
    safe = f"'{text}" if _FORMULA.match(text) else text
    if len(safe) <= MOST_CHARACTERS:
        return safe
    note = f" … [cut: {len(text):,} characters in all, complete in the JSON export]"
    return safe[: MOST_CHARACTERS - len(note)] + note
