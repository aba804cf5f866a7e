"""The published numbers in the docstrings hold."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import engine.capacity

MODULES = [f"engine.capacity.{module.name}" for module in pkgutil.iter_modules(engine.capacity.__path__)]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_hold(name: str):
    results = doctest.testmod(importlib.import_module(name))
    assert results.failed == 0


def test_every_room_of_arithmetic_has_examples():
    attempted = {name: doctest.testmod(importlib.import_module(name)).attempted for name in MODULES}
    assert all(attempted[f"engine.capacity.{name}"] for name in ("weights", "kv", "activation", "budget", "parallel"))
