"""Reading the fields of a ``config.json``: each value checked, each error named after its field."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from engine.errors import ModelLoadError

MOST = 2**31 - 1
"""Of a size that is accepted: the widest tensor that any file could hold has fewer rows."""
MOST_LAYERS = 4096
MOST_EXPERTS = 65536


def positive(config: Mapping[str, Any], field: str, default: int | None = None, *, most: int = MOST) -> int:
    """A whole number from 1 to ``most``; ``default`` where the field is absent or null.

    Raises:
        ModelLoadError: if it is missing or something else.
    """
    return whole(config, field, default, least=1, most=most)


def whole(
    config: Mapping[str, Any], field: str, default: int | None = None, *, least: int = 0, most: int = MOST
) -> int:
    """A whole number from ``least`` to ``most``; ``default`` where the field is absent or null.

    Raises:
        ModelLoadError: if it is missing or something else.
    """
    value = config.get(field)
    value = default if value is None else value
    if value is None:
        raise bad_field(field, "is missing")
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        kind = "a positive whole number" if least == 1 else f"a whole number of at least {least}"
        raise bad_field(field, f"{shown(value)} is not {kind}")
    if value > most:
        raise bad_field(field, f"{shown(value)} is more than the limit of {most:,}")
    return value


def number(config: Mapping[str, Any], field: str, default: float | None = None) -> float:
    """A finite number above 0; ``default`` where the field is absent or null.

    Raises:
        ModelLoadError: if it is missing or something else.
    """
    value = config.get(field)
    value = default if value is None else value
    if value is None:
        raise bad_field(field, "is missing")
    if not _is_number(value) or not value > 0:
        raise bad_field(field, f"{shown(value)} is not a positive number")
    return float(value)


def optional_number(config: Mapping[str, Any], field: str) -> float | None:
    """A finite number above 0, or None where the field is absent or null."""
    return None if config.get(field) is None else number(config, field)


def numbers(config: Mapping[str, Any], field: str) -> tuple[float, ...]:
    """A list of finite numbers above 0.

    Raises:
        ModelLoadError: if it is missing or something else.
    """
    values = config.get(field)
    if not isinstance(values, list) or not all(_is_number(value) and value > 0 for value in values):
        raise bad_field(field, "must be a list of positive numbers")
    return tuple(map(float, values))


def flag(config: Mapping[str, Any], field: str, default: bool = False) -> bool:
    """True or false; ``default`` where the field is absent or null.

    Raises:
        ModelLoadError: if it is something else.
    """
    value = config.get(field)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise bad_field(field, f"{shown(value)} is neither true nor false")
    return value


def shown(value: object) -> str:
    """A value as an error shows it: short, whatever it is."""
    if isinstance(value, int) and abs(value) >= 10**30:
        return f"a number of more than {int(math.log10(abs(value)))} digits"
    text = repr(value) if not isinstance(value, dict | list) or len(value) < 20 else f"a {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."


def bad_field(field: str, what: str) -> ModelLoadError:
    """The error for a field that cannot be used."""
    remedy = "Use a model that the engine supports, or mend this field of config.json."
    return ModelLoadError(f"{what}.", field=field, remedy=remedy)


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float holds
        return False
