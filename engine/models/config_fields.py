"""Reading the fields of a ``config.json``: each value checked, each error named after its field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.errors import ModelLoadError


def positive(config: Mapping[str, Any], field: str, default: int | None = None) -> int:
    """A whole number of at least 1; ``default`` where the field is absent or null.

    Raises:
        ModelLoadError: if it is missing or something else.
    """
    value = config.get(field)
    value = default if value is None else value
    if value is None:
        raise bad_field(field, "is missing")
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise bad_field(field, f"{value!r} is not a positive whole number")
    return value


def number(config: Mapping[str, Any], field: str, default: float | None = None) -> float:
    """A number above 0; ``default`` where the field is absent or null.

    Raises:
        ModelLoadError: if it is missing or something else.
    """
    value = config.get(field)
    value = default if value is None else value
    if value is None:
        raise bad_field(field, "is missing")
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise bad_field(field, f"{value!r} is not a positive number")
    return float(value)


def optional_number(config: Mapping[str, Any], field: str) -> float | None:
    """A number above 0, or None where the field is absent or null."""
    return None if config.get(field) is None else number(config, field)


def bad_field(field: str, what: str) -> ModelLoadError:
    """The error for a field that cannot be used."""
    remedy = "Use a model that the engine supports, or mend this field of config.json."
    return ModelLoadError(f"{what}.", field=field, remedy=remedy)
