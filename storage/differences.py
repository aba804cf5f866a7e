"""In what runs differ: knobs, workload, path, versions, hardware, code. The first question about two numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from engine.measure.results import Provenance

_IDENTITY = ("model", "model_fingerprint", "workload_hash", "seed", "code_revision", "code_dirty")
_SECTIONS = ("config", "workload", "path", "versions", "hardware")


@dataclasses.dataclass(frozen=True, slots=True)
class Difference:
    """One thing in which runs differ.

    Attributes:
        section: "identity", "config", "workload", "path", "versions" or "hardware".
        name: of the field, dotted where it is nested.
        values: one for each run, None where a run does not have it.
    """

    section: str
    name: str
    values: tuple[Any, ...]


def differences(provenances: Sequence[Provenance]) -> list[Difference]:
    """Every field of the provenance in which these runs are not all alike, the telling ones first."""
    found = []
    identities = [{name: getattr(provenance, name) for name in _IDENTITY} for provenance in provenances]
    found += _section("identity", identities)
    for section in _SECTIONS:
        found += _section(section, [_flat(getattr(provenance, section)) for provenance in provenances])
    return found


def _section(section: str, runs: Sequence[Mapping[str, Any]]) -> list[Difference]:
    names = dict.fromkeys(name for run in runs for name in run)
    columns = ((name, tuple(run.get(name) for run in runs)) for name in names)
    return [Difference(section, name, values) for name, values in columns if any(v != values[0] for v in values)]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            flat.update(_flat(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat
