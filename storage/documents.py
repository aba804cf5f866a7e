"""Runs that come in from outside as JSON: parsed, and checked field by field before anything is written."""

from __future__ import annotations

import dataclasses
import functools
import json
import types
import typing
from typing import Any, Literal, Union, get_args, get_origin

from engine.measure.results import RunResult, from_json
from storage.errors import StorageError

_REMEDY = "Import a file that Headroom exported as JSON, or what `python -m engine bench --json` printed."


def parse_documents(text: str | bytes) -> list[RunResult]:
    """The runs in a JSON text: one document, a list of them, or ``{"runs": [...]}``.

    Raises:
        StorageError: if it is not JSON, or a document lacks a field, has one too many or one of the wrong type.
    """
    try:
        # NaN and Infinity are no JSON, though Python writes them: not measured
        data = json.loads(text, parse_constant=lambda _name: None)
    except ValueError as problem:  # includes bytes that are not UTF-8
        raise StorageError(f"this is not JSON ({problem}).", field="import", remedy=_REMEDY) from problem
    except RecursionError as problem:
        raise StorageError("this JSON is nested too deeply.", field="import", remedy=_REMEDY) from problem
    if isinstance(data, dict) and isinstance(data.get("runs"), list):
        data = data["runs"]
    documents = data if isinstance(data, list) else [data]
    return [_parse(document, f"runs[{number}]") for number, document in enumerate(documents)]


def ended(result: RunResult) -> RunResult:
    """The run as it can be imported: nobody here is running it, so one that had not ended counts as failed."""
    if result.status != "running":
        return result
    return dataclasses.replace(result, status="failed", error=result.error or "It had not ended when it was exported.")


def _parse(document: Any, where: str) -> RunResult:
    if not isinstance(document, dict):
        raise StorageError(f"{_shown(document)} is not a run.", field=where, remedy=_REMEDY)
    try:
        result = from_json(document)
    except (ValueError, AttributeError) as problem:
        raise StorageError(f"{problem}.", field=where, remedy=_REMEDY) from problem
    _check(result, RunResult, where)
    if not result.run_id:
        raise StorageError("is empty.", field=f"{where}.run_id", remedy=_REMEDY)
    return result


def _check(value: Any, expected: Any, where: str) -> None:
    """Raise unless ``value`` is of the annotated type, through dataclasses, lists and mappings."""
    origin, arguments = get_origin(expected), get_args(expected)
    if expected is Any:
        return
    if isinstance(expected, type) and dataclasses.is_dataclass(expected):
        for name, hint in _hints(expected).items():
            _check(getattr(value, name), hint, f"{where}.{name}")
    elif origin in (Union, types.UnionType):
        if value is not None:
            _check(value, next(kind for kind in arguments if kind is not type(None)), where)
    elif origin is Literal:
        _require(value in arguments, value, f"one of {', '.join(arguments)}", where)
    elif origin is list:
        _require(isinstance(value, list), value, "a list", where)
        for number, item in enumerate(value):
            _check(item, arguments[0], f"{where}[{number}]")
    elif origin is dict:
        _require(isinstance(value, dict), value, "an object", where)
        for key, item in value.items():
            _check(item, arguments[1], f"{where}.{key}")
    elif expected is float:
        _require(isinstance(value, (int, float)) and not isinstance(value, bool), value, "a number", where)
    else:
        matches = isinstance(value, expected) and not (expected is int and isinstance(value, bool))
        names = {str: "a text", int: "a whole number", bool: "true or false"}
        _require(matches, value, names.get(expected, expected.__name__), where)


@functools.cache
def _hints(record_type: Any) -> dict[str, Any]:
    return typing.get_type_hints(record_type)


def _require(holds: bool, value: Any, wanted: str, where: str) -> None:
    if not holds:
        raise StorageError(f"{_shown(value)} is not {wanted}.", field=where, remedy=_REMEDY)


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
