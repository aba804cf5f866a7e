"""Knobs that extensions give more values."""

from __future__ import annotations

import pytest

from engine.config import EngineConfig, add_choice, schema
from engine.errors import ConfigError


def test_choice_added_by_an_extension_is_offered_everywhere_and_can_be_taken_away():
    remove = add_choice("batching", "toy")
    try:
        assert EngineConfig.from_mapping({"batching": "toy"}).batching == "toy"
        assert "toy" in next(entry for entry in schema() if entry["name"] == "batching")["choices"]
        with pytest.raises(ConfigError, match="already has"):
            add_choice("batching", "toy")
    finally:
        remove()
    with pytest.raises(ConfigError, match="not available"):
        EngineConfig.from_mapping({"batching": "toy"})


def test_only_a_choice_takes_another_value():
    with pytest.raises(ConfigError, match="not a choice"):
        add_choice("max_running", "many")
    with pytest.raises(ConfigError, match="no knob named"):
        add_choice("nonsense", "toy")
