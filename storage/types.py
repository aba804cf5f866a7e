"""Column types that give back exactly what was put in, on every database."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

from sqlalchemy import Dialect, Double, Text
from sqlalchemy.types import TypeDecorator


@dataclasses.dataclass(frozen=True, slots=True)
class Unreadable:
    """What stands in a column in place of JSON."""

    text: str


class JsonText(TypeDecorator[Any]):
    """A JSON-ready value as JSON text.

    Text rather than the database's own JSON type: key order, large integers and the difference between 1 and 1.0
    survive, and SQLite and PostgreSQL behave alike. A number that is not finite becomes null, since neither JSON
    nor SQL can hold it.
    """

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> str:
        try:
            return json.dumps(value, allow_nan=False, separators=(",", ":"))
        except ValueError:
            return json.dumps(_finite(value), allow_nan=False, separators=(",", ":"))

    def process_result_value(self, value: str | None, dialect: Dialect) -> Any:
        try:
            return None if value is None else json.loads(value)
        except (ValueError, TypeError, RecursionError):  # reported with the row, which alone cannot be shown
            return Unreadable(str(value))


class FiniteDouble(TypeDecorator[float]):
    """A double; NaN and the infinities become NULL (SQLite would do so with NaN anyway, PostgreSQL would not)."""

    impl = Double
    cache_ok = True

    def process_bind_param(self, value: float | None, dialect: Dialect) -> float | None:
        return float(value) if value is not None and math.isfinite(value) else None


def _finite(value: Any) -> Any:
    """A copy of a JSON-ready value in which None stands for every number that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
