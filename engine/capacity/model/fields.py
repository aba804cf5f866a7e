"""Fields of a ``config.json``, read with every doubt raised as an error that names the field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.capacity.text import shown
from engine.errors import ConfigError

#: Largest value a dimension may have: far above any model, low enough that arithmetic and messages stay sane.
MAX_DIMENSION = 2**31
MAX_LAYERS = 4096
MAX_EXPERTS = 65_536

REMEDY = "Correct this field, or use the config.json of the model's own repository."


def positive(config: Mapping[str, Any], field: str, default: int | None = None, maximum: int = MAX_DIMENSION) -> int:
    """A whole number of at least 1; ``default`` where the field is absent or null.

    >>> positive({"num_hidden_layers": 32}, "num_hidden_layers")
    32

    Raises:
        ConfigError: if it is missing without a default, not a whole number, or out of bounds.
    """
    value = whole(config, field, default, maximum)
    if value == 0:
        raise ConfigError("0 is not a positive whole number.", field=field, remedy=REMEDY)
    return value


def whole(config: Mapping[str, Any], field: str, default: int | None = None, maximum: int = MAX_DIMENSION) -> int:
    """A whole number of at least 0; ``default`` where the field is absent or null."""
    value = config.get(field)
    value = default if value is None else value
    if value is None:
        raise ConfigError("is missing.", field=field, remedy=REMEDY)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ConfigError(f"{shown(value)} is not a positive whole number.", field=field, remedy=REMEDY)
    if value > maximum:
        raise ConfigError(f"{shown(value)} is above {maximum:,}, beyond any real model.", field=field, remedy=REMEDY)
    return value


def flag(config: Mapping[str, Any], field: str, default: bool) -> bool:
    """True or false; ``default`` where the field is absent or null."""
    value = config.get(field)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ConfigError(f"{shown(value)} is neither true nor false.", field=field, remedy=REMEDY)
    return value


def number(config: Mapping[str, Any], field: str, default: float, low: float, high: float) -> float:
    """A finite number from ``low`` to ``high``; ``default`` where the field is absent or null.

    >>> number({"factor": 4}, "factor", 1.0, 1.0, 1e6)
    4.0
    """
    value = config.get(field)
    if value is None:
        return default
    readable = isinstance(value, int | float) and not isinstance(value, bool)
    if not readable or not low <= value <= high:  # also of not-a-number
        raise ConfigError(f"{shown(value)} is not a number from {low:g} to {high:g}.", field=field, remedy=REMEDY)
    return float(value)


def names(config: Mapping[str, Any], field: str, known: tuple[str, ...], length: int) -> list[str] | None:
    """A list with one of ``known`` for each layer; None where the field is absent.

    >>> names({"layer_types": ["full_attention"]}, "layer_types", ("full_attention",), 1)
    ['full_attention']
    """
    value = config.get(field)
    if value is None:
        return None
    readable = isinstance(value, list | tuple) and all(isinstance(name, str) and name in known for name in value)
    if not readable or len(value) != length:
        wanted = " or ".join(known)
        raise ConfigError(f"must name {wanted} for each of {length:,} layers.", field=field, remedy=REMEDY)
    return list(value)


def indices(config: Mapping[str, Any], field: str) -> frozenset[int]:
    """A list of layer indices, empty where the field is absent."""
    value = config.get(field)
    if value is None:
        return frozenset()
    if not isinstance(value, list | tuple) or not all(type(item) is int and item >= 0 for item in value):
        raise ConfigError(f"{shown(value)} is not a list of layer numbers.", field=field, remedy=REMEDY)
    return frozenset(value)
