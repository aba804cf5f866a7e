"""The published numbers in the docstrings hold."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import engine.capacity

MODULES = [module.name for module in pkgutil.walk_packages(engine.capacity.__path__, "engine.capacity.")]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_hold(name: str):
    results = doctest.testmod(importlib.import_module(name))
    assert results.failed == 0


def test_every_room_of_arithmetic_has_examples():
    attempted = {name: doctest.testmod(importlib.import_module(name)).attempted for name in MODULES}
    memory = ("weights", "kv", "activation", "budget", "parallel")
    assert all(attempted[f"engine.capacity.memory.{name}"] for name in memory)
