"""In what runs differ."""

from __future__ import annotations

import dataclasses

from storage.differences import differences
from tests.storage.run_examples import make_run


def test_runs_of_the_same_setting_do_not_differ():
    assert differences([make_run(2).provenance, make_run(2).provenance]) == []
    assert differences([make_run(2).provenance]) == []
    assert differences([]) == []


def test_each_differing_field_is_named_once_with_a_value_for_each_run():
    first = make_run(2).provenance
    second = make_run(2, changes={"weights": "int4"}).provenance
    third = dataclasses.replace(first, versions=first.versions | {"torch": "2.14"}, hardware={"gpu": {"name": "H100"}})
    found = {(item.section, item.name): item.values for item in differences([first, second, third])}
    assert found[("config", "weights")] == ("model", "int4", "model")
    assert found[("path", "weights")] == ("model", "int4", "model")
    assert found[("versions", "torch")] == ("2.13.0+cpu", "2.13.0+cpu", "2.14")
    assert found[("hardware", "gpu.name")] == (None, None, "H100")
    assert ("config", "batching") not in found
    assert ("identity", "model") not in found
