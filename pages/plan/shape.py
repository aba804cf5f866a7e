"""A model that is in no catalog, entered by hand: its dimensions, each with its bounds."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import streamlit as st

from engine.capacity import SHAPE_FIELDS, ModelSpec, spec_of_shape
from engine.capacity.model.shape import ShapeField

_PREFIX = "plan-shape-"
#: What the fields begin with: Llama-3.1-8B, so that there is an answer to change.
BEGINNING: dict[str, int] = {"intermediate": 14336, "kv_heads": 8}
_NAMES = {"Layers": "Size", "Experts": "Experts (none: a dense model)", "Latent": "Latent attention (MLA)"}
_COLUMNS = 2


def shape_key(name: str) -> str:
    """Session-state key, and URL parameter, of a field."""
    return f"{_PREFIX}{name.replace('_', '-')}"


def entered_shape() -> ModelSpec:
    """Draw the fields of a shape.

    Returns:
        The model that they describe.

    Raises:
        ConfigError: naming the field that contradicts another.
    """
    values: dict[str, Any] = {}
    with st.expander("Enter a shape", expanded=True, icon=":material/edit:"):
        for group, fields in groupby(SHAPE_FIELDS, key=lambda field: field.group):
            st.caption(_NAMES.get(group, group))
            values |= _group(list(fields))
    return spec_of_shape(values)


def _group(fields: list[ShapeField]) -> dict[str, Any]:
    """Numbers in rows of two, switches below them over the whole width, where their labels fit."""
    numbers = [field for field in fields if not field.is_switch]
    values: dict[str, Any] = {}
    for start in range(0, len(numbers), _COLUMNS):
        for column, field in zip(st.columns(_COLUMNS), numbers[start : start + _COLUMNS], strict=False):
            with column:
                values[field.name] = _number(field)
    return values | {field.name: _switch(field) for field in fields if field.is_switch}


def _bound(name: str) -> dict[str, Any]:
    return {"key": shape_key(name), "bind": "query-params", "persist_state": "session"}


def _switch(field: ShapeField) -> bool:
    return bool(st.toggle(field.label, value=bool(field.default), help=field.help, **_bound(field.name)))


def _number(field: ShapeField) -> int | None:
    begin = BEGINNING.get(field.name, field.default)
    value = st.number_input(
        field.label,
        min_value=field.low,
        max_value=field.high,
        value=begin,
        step=1,
        placeholder="auto" if field.default is None else f"{field.default:,}",
        help=field.help,
        **_bound(field.name),
    )
    return None if value is None else int(value)
