"""Runs that come in from outside as JSON: parsed, and checked field by field before anything is written."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from engine.measure.results import RunResult, from_json
from storage.errors import StorageError
from storage.validation import UnfitError, check, shown

MOST_BYTES = 128 * 2**20
MOST_RUNS = 10_000
_MOST_PARTS = 3_000_000  # objects and lists: a small text of many of them would fill the memory
CANNOT_BE_SHOWN = "cannot_be_shown"
"""The field of an exported run that could not be read; on import it is passed over."""
_REMEDY = (
    "Import a file that Headroom exported as JSON, or what `headroom bench --json` printed. Nothing of this "
    "one was imported."
)
_SPLIT = "Export fewer runs at a time and import the files one after another. Nothing of this one was imported."


@dataclasses.dataclass(frozen=True, slots=True)
class Documents:
    """What a JSON text holds: the runs, and the ids of those that could not be read where they were exported."""

    runs: list[RunResult]
    passed_over: list[str]


def parse_documents(text: str | bytes, source: str = "import") -> Documents:
    """The runs in a JSON text: one document, a list of them, or ``{"runs": [...]}``.

    Args:
        source: name of the file, for errors.

    Raises:
        StorageError: if it is not JSON, is too large, or a document lacks a field, has one too many or one that no
            run can have. Its ``field`` names the file and the field, its message the run.
    """
    documents = _split(_load(text, source), source)
    found: dict[str, tuple[int, RunResult]] = {}
    passed_over = []
    for number, document in enumerate(documents):
        if isinstance(document, Mapping) and CANNOT_BE_SHOWN in document:
            passed_over.append(str(document.get("run_id", ""))[:64])
            continue
        result = _parse(document, f"{source}: runs[{number}]")
        first, other = found.setdefault(result.run_id, (number, result))
        if other != result:
            message = f"run {result.run_id} is here twice, and as runs[{first}] it says something else."
            raise StorageError(message, field=f"{source}: runs[{number}].run_id", remedy=_REMEDY)
    return Documents([result for _, result in found.values()], passed_over)


def ended(result: RunResult) -> RunResult:
    """The run as it can be imported: nobody here is running it, so one that had not ended counts as failed."""
    if result.status != "running":
        return result
    return dataclasses.replace(result, status="failed", error=result.error or "It had not ended when it was exported.")


def _load(text: str | bytes, source: str) -> Any:
    if len(text) > MOST_BYTES:
        message = f"{len(text) / 2**20:,.0f} MiB are more than the {MOST_BYTES / 2**20:,.0f} MiB that are accepted."
        raise StorageError(message, field=source, remedy=_SPLIT)
    parts = text.count("[") + text.count("{") if isinstance(text, str) else text.count(b"[") + text.count(b"{")
    if parts > _MOST_PARTS:
        message = f"more than {_MOST_PARTS:,} objects and lists cannot be taken at once."
        raise StorageError(message, field=source, remedy=_SPLIT)
    try:
        # NaN and Infinity are no JSON, though Python writes them: not measured
        return json.loads(text, parse_constant=lambda _name: None, object_pairs_hook=_object)
    except ValueError as error:  # includes bytes that are not UTF-8
        raise StorageError(f"this is not JSON ({error}).", field=source, remedy=_REMEDY) from error
    except RecursionError as error:
        raise StorageError("this JSON is nested too deeply.", field=source, remedy=_REMEDY) from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, in which no name may occur twice: of two values, which one is meant?"""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1)
        raise ValueError(f"the name {shown(twice)} occurs twice in one object")
    return found


def _split(data: Any, source: str) -> list[Any]:
    if isinstance(data, dict) and isinstance(data.get("runs"), list):
        data = data["runs"]
    documents = data if isinstance(data, list) else [data]
    if len(documents) > MOST_RUNS:
        message = f"{len(documents):,} runs are more than the {MOST_RUNS:,} that are accepted at once."
        raise StorageError(message, field=source, remedy=_SPLIT)
    return documents


def _parse(document: Any, where: str) -> RunResult:
    try:
        check(document, RunResult, strict=True)
        if not document["run_id"]:
            raise UnfitError("is empty", "run_id")
    except UnfitError as error:
        field = f"{where}.{error.where}" if error.where else where
        raise StorageError(f"{error.message}{_named(document)}.", field=field, remedy=_REMEDY) from None
    return from_json(document)


def _named(document: Any) -> str:
    run_id = document.get("run_id") if isinstance(document, Mapping) else None
    return f" (run {shown(run_id)})" if isinstance(run_id, str) and run_id else ""
