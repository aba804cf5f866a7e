"""Runs gathered into the columns of a table: each run alone, or all runs of one setting."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence

from engine.measure.results import RunResult
from pages.shared.run_values import DISTURBED, metric_text, run_name, setting_labels


@dataclasses.dataclass(frozen=True, slots=True)
class Group:
    """Runs that stand in one column: a single run, or all runs of one setting on one workload and model."""

    name: str
    runs: tuple[RunResult, ...]

    @property
    def counted(self) -> tuple[RunResult, ...]:
        """The runs that say something about the setting: those that nothing disturbed."""
        return tuple(run for run in self.runs if not run.disturbed)

    def values(self, metric: str) -> list[float]:
        """What the runs that count measured of it."""
        found = (run.metrics.get(metric) for run in self.counted)
        return [value for value in found if value is not None]

    def text(self, metric: str) -> str:
        """The mean (± standard deviation); of a single disturbed run what it measured, without any statistics."""
        if len(self.runs) == 1 and not self.counted:
            return metric_text(metric, self.runs[0].metrics.get(metric))
        return _mean_text(metric, self.values(metric))


def groups_by_run(runs: Sequence[RunResult]) -> list[Group]:
    """A group for each run, with names that tell them apart."""
    names = [_full_name(run) + (f" · {DISTURBED}" if run.disturbed else "") for run in runs]
    numbered = [
        f"{name} ({names[: place + 1].count(name)})" if names.count(name) > 1 else name
        for place, name in enumerate(names)
    ]
    return [Group(name, (run,)) for name, run in zip(numbered, runs, strict=True)]


def groups_by_setting(runs: Sequence[RunResult]) -> list[Group]:
    """A group for each model, workload and configuration, in the order of their first runs."""
    found: dict[tuple[str, str, str], list[RunResult]] = {}
    for run in runs:
        provenance = run.provenance
        key = (provenance.model_fingerprint, str(provenance.workload.get("name")), provenance.config_hash)
        found.setdefault(key, []).append(run)
    models = len({key[0] for key in found})
    workloads = len({key[1] for key in found})
    groups = []
    for members in found.values():
        first = members[0].provenance
        parts = [first.model] if models > 1 else []
        parts += [str(first.workload.get("name"))] if workloads > 1 else []
        parts.append(", ".join(setting_labels(first.config)) or "defaults")
        groups.append(Group(" · ".join(parts), tuple(members)))
    names = [group.name for group in groups]
    return [
        Group(f"{group.name} ({place + 1})", group.runs) if names.count(group.name) > 1 else group
        for place, group in enumerate(groups)
    ]


def _full_name(run: RunResult) -> str:
    setting = ", ".join(setting_labels(run.provenance.config))
    return f"{run_name(run)} · {setting}" if setting else run_name(run)


def _mean_text(name: str, values: Sequence[float]) -> str:
    if not values:
        return "–"
    text = metric_text(name, statistics.fmean(values))
    if len(values) < 2:
        return text
    mean, deviation = statistics.fmean(values), statistics.stdev(values)
    return f"{text} ± {100 * deviation / abs(mean):.1f} %" if mean else text
