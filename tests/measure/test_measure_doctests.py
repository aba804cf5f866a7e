"""Examples in the docstrings of measurement, telemetry and speculation hold."""

from __future__ import annotations

import doctest
import importlib

import pytest


@pytest.mark.parametrize(
    "name",
    ["engine.measure.comparison", "engine.measure.metrics", "engine.telemetry.gpu", "engine.speculation.verification"],
)
def test_examples_in_docstrings_hold(name: str):
    results = doctest.testmod(importlib.import_module(name))
    assert results.attempted > 0
    assert results.failed == 0
