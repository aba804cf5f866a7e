"""Every knob has bounds, and no configuration is outside of them, however it was made."""

from __future__ import annotations

import math
from typing import Any

import pytest

from engine.config import EngineConfig, Knob, knobs
from engine.errors import ConfigError

NUMBERS = [knob for knob in knobs() if knob.kind in ("int", "float")]
NONSENSE: list[Any] = [
    math.nan,
    math.inf,
    -math.inf,
    10**5000,
    -(10**400),
    "9" * 5000,
    "nan",
    "1e999",
    True,
    [],
    {},
    "",
]


@pytest.mark.parametrize("knob", NUMBERS, ids=lambda knob: knob.name)
def test_every_number_has_finite_bounds_and_neither_nonsense_nor_what_is_outside_of_them_is_taken(knob: Knob):
    assert knob.minimum is not None
    assert knob.maximum is not None
    for value in (*NONSENSE, knob.minimum - 1, knob.maximum + 1, 5e-324, 1.5 if knob.kind == "int" else 0):
        refused(knob.name, value)


@pytest.mark.parametrize("knob", [knob for knob in knobs() if knob.kind not in ("int", "float")], ids=lambda k: k.name)
def test_choices_switches_and_names_take_no_nonsense(knob: Knob):
    for value in (math.nan, 10**5000, [], {}, "", "x" * 5000, "a\0b", None):
        if value is not None or not knob.optional:
            refused(knob.name, value)


def refused(name: str, value: Any) -> None:
    """By the constructor, by a change and by a mapping, in words that name the knob and do not repeat all of it."""
    makers = (
        lambda: EngineConfig(**{name: value}),
        lambda: EngineConfig().with_changes({name: value}),
        lambda: EngineConfig.from_mapping({name: value}),
    )
    for make in makers:
        with pytest.raises(ConfigError) as problem:
            make()
        assert problem.value.field == name
        assert problem.value.remedy
        assert len(str(problem.value)) < 400


def test_values_are_taken_over_in_the_knobs_own_type():
    config = EngineConfig(memory_limit_gib=2, group_size=64, max_running=8.0)  # type: ignore[arg-type]
    assert (config.memory_limit_gib, config.group_size, config.max_running) == (2.0, "64", 8)
    assert type(config.memory_limit_gib) is float
    assert type(config.max_running) is int
