"""Several runs side by side: their figures, in what they differ, their distributions."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import streamlit as st

from engine.measure.comparison import MetricComparison, compare, disturbed_words
from engine.measure.metrics import METRICS
from engine.measure.results import RunResult
from pages.history.charts import distribution_curves, latencies, samples_table, throughput_curves
from pages.shared.messages import value_text
from pages.shared.run_values import (
    DISTURBED,
    HEADLINES,
    QUALITY,
    known_knobs,
    metric_info,
    metric_text,
    reference_text,
    run_name,
    setting_words,
)
from pages.shared.text import code, plain
from storage.differences import Difference, differences

MOST = 8
_MAIN = (
    *HEADLINES[:-1],
    "ttft_ms_p99",
    "requests_s",
    "acceptance_rate",
    "prefix_hit_rate",
    "preemptions",
    "energy_per_output_token_j",
    "net_energy_per_output_token_j",
)
_BY_RUN, _BY_SETTING = "Each run", "By setting"
_SECTIONS = {
    "identity": "Run",
    "config": "Knob",
    "workload": "Workload",
    "path": "Path that ran",
    "versions": "Version",
    "hardware": "Hardware",
}


_NAMES = {"code_dirty": "state of the code"}


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


def compare_runs(runs: Sequence[RunResult]) -> None:
    """Draw the comparison of two or more runs; the first column is the baseline of the differences."""
    runs = sorted(runs, key=lambda run: (run.arm or "", run.repeat or 0, run.started_unix_s))
    settings = groups_by_setting(runs)
    repeated = 1 < len(settings) < len(runs)
    with st.container(horizontal=True, vertical_alignment="bottom"):
        st.subheader(f"{len(runs)} runs side by side", anchor=False, width="stretch")
        kind = _BY_RUN
        if repeated:
            kind = st.segmented_control(
                "Columns",
                [_BY_SETTING, _BY_RUN],
                default=_BY_SETTING,
                key="history-columns",
                required=True,
                label_visibility="collapsed",
            )
        groups = settings if kind == _BY_SETTING else groups_by_run(runs)
        everything = st.toggle("All metrics", key="history-all-metrics")
        names = [group.name for group in groups]
        baseline = st.selectbox("Baseline", names, key=f"history-baseline-{len(names)}", width=280)
    groups.sort(key=lambda group: group.name != baseline)
    if len(groups) > MOST:
        st.caption(f"The first {MOST} of {len(groups)} are shown.")
        groups = groups[:MOST]
    _left_out(groups)
    _metrics(groups, everything)
    _differences(groups)
    _charts(groups)


def _left_out(groups: Sequence[Group]) -> None:
    """Say how many disturbed runs no average and no difference counts."""
    count = sum(len(group.runs) - len(group.counted) for group in groups)
    if count:
        words = disturbed_words(count)
        lone = " A column of its own shows what such a run measured." if any(not g.counted for g in groups) else ""
        st.warning(f"{words[0].upper()}{words[1:]}.{lone}", icon=":material/tsunami:")


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
        words = [first.model] if models > 1 else []
        words += [str(first.workload.get("name"))] if workloads > 1 else []
        words.append(", ".join(setting_words(first.config)) or "defaults")
        groups.append(Group(" · ".join(words), tuple(members)))
    names = [group.name for group in groups]
    return [
        Group(f"{group.name} ({place + 1})", group.runs) if names.count(group.name) > 1 else group
        for place, group in enumerate(groups)
    ]


def _full_name(run: RunResult) -> str:
    setting = ", ".join(setting_words(run.provenance.config))
    return f"{run_name(run)} · {setting}" if setting else run_name(run)


def _metrics(groups: Sequence[Group], everything: bool) -> None:
    recorded = [run for group in groups for run in (group.runs if len(group.runs) == 1 else group.counted)]
    measured = [name for name in _metric_order(groups) if any(run.metrics.get(name) is not None for run in recorded)]
    shown = measured if everything else [name for name in measured if name in _MAIN]
    if not shown:
        st.caption("None of these runs measured anything.")
        return
    rows = [metric_row(name, groups) for name in shown]
    if set(shown) & set(QUALITY):
        rows.append({"Metric": "Quality measured against"} | {plain(g.name): _reference(g) for g in groups})
    st.table(pd.DataFrame(rows).fillna("").set_index("Metric"), border="horizontal")
    if all(len(group.runs) == 1 for group in groups):
        st.caption(
            "Differences between single runs include the noise of the machine. The Compare page repeats both "
            "settings in turn and gives an interval."
        )


def _reference(group: Group) -> str:
    """What the quality of a column was measured against."""
    found = dict.fromkeys(filter(None, (reference_text(run) for run in group.runs)))
    return "; ".join(plain(text) for text in found) or "–"


def _metric_order(groups: Sequence[Group]) -> list[str]:
    recorded = dict.fromkeys(name for group in groups for run in group.runs for name in run.metrics)
    return [name for name in METRICS if name in recorded] + [name for name in recorded if name not in METRICS]


def metric_row(name: str, groups: Sequence[Group]) -> dict[str, str]:
    """One line of the table: each group's mean (± standard deviation), and its difference from the first group.

    Two groups of several runs also get the interval of the Compare page, and then the difference has a colour only
    where that interval shows one.
    """
    row = {"Metric": plain(metric_info(name).label)}
    tested = None
    if len(groups) == 2 and all(len(group.values(name)) > 1 for group in groups) and name in METRICS:
        tested = compare(groups[0].counted, groups[1].counted, name)
    base = groups[0].values(name)
    for number, group in enumerate(groups):
        values = group.values(name)
        shown = tested is None or tested.better is not None
        difference = difference_text(name, base, values, coloured=shown) if number else ""
        row[plain(group.name)] = f"{plain(group.text(name))} {difference}".rstrip()
    if tested is not None:
        row["Ratio, 95 % interval"] = _interval_text(tested)
    return row


def _mean_text(name: str, values: Sequence[float]) -> str:
    if not values:
        return "–"
    text = metric_text(name, statistics.fmean(values))
    if len(values) < 2:
        return text
    mean, deviation = statistics.fmean(values), statistics.stdev(values)
    return f"{text} ± {100 * deviation / abs(mean):.1f} %" if mean else text


def difference_text(name: str, base: Sequence[float], values: Sequence[float], *, coloured: bool = True) -> str:
    """The difference of the means in percent of the base; if ``coloured``, green where it is an improvement.

    >>> difference_text("output_tokens_s", [100.0], [150.0]), difference_text("ttft_ms_p50", [100.0], [150.0])
    (':green[+50.0 %]', ':red[+50.0 %]')
    """
    if not base or not values or statistics.fmean(base) == 0:
        return ""
    change = 100 * (statistics.fmean(values) / statistics.fmean(base) - 1)
    higher_is_better = metric_info(name).higher_is_better
    if abs(change) < 0.05:
        return ":gray[±0 %]"
    if higher_is_better is None or not coloured:
        color = "gray"
    else:
        color = "green" if (change > 0) == higher_is_better else "red"
    return f":{color}[{change:+.1f} %]"


def _interval_text(tested: MetricComparison) -> str:
    """The second group over the first; "–" where a value of 0 leaves no ratio."""
    if tested.ratio is None or tested.ci_low is None or tested.ci_high is None:
        return "–"
    return f"{tested.ratio:.3f} ({tested.ci_low:.3f} to {tested.ci_high:.3f})"


def _differences(groups: Sequence[Group]) -> None:
    several = any(len(group.runs) > 1 for group in groups)
    first = " :small[:gray[the first run of each setting]]" if several else ""
    st.markdown(f"**In what they differ**{first}")
    found = differences([group.runs[0].provenance for group in groups])
    if not found:
        st.caption("In nothing that is on record: same model, knobs, workload, path, versions, hardware and code.")
        return
    names = [plain(group.name) for group in groups]
    telling = [item for item in found if item.section not in ("versions", "hardware")]
    rest = [item for item in found if item not in telling]
    if telling:
        st.table(_difference_table(telling, names), border="horizontal")
    if rest:
        with st.expander(f"Versions and hardware ({len(rest)} differences)"):
            st.table(_difference_table(rest, names), border="horizontal")


def _difference_table(found: Sequence[Difference], names: Sequence[str]) -> pd.DataFrame:
    labels = known_knobs().labels
    rows = []
    for item in found:
        label = (
            labels.get(item.name, item.name)
            if item.section == "config"
            else _NAMES.get(item.name, item.name.replace("_", " "))
        )
        row: dict[str, Any] = {"Field": f"{_SECTIONS[item.section]}: {plain(label)}"}
        row.update({plain(name): _shown(item.name, value) for name, value in zip(names, item.values, strict=True)})
        rows.append(row)
    return pd.DataFrame(rows).set_index("Field")


def _shown(name: str, value: Any) -> str:
    if isinstance(value, str) and (name.endswith(("hash", "fingerprint", "revision"))) and value:
        return code(value[:12])
    if name == "code_dirty":
        return {True: "with changes", False: "clean"}.get(value, "unknown")
    return plain(value_text(value))


def _charts(groups: Sequence[Group]) -> None:
    left, right = st.columns(2, gap="medium")
    with left:
        pooled = {group.name: _pooled(group) for group in groups}
        kinds = [kind for kind in ("TTFT", "TPOT", "ITL", "E2E") if any(found[kind] for found in pooled.values())]
        if kinds:
            st.markdown("**Distribution** :small[:gray[share of values at or below, ms]]")
            kind = st.segmented_control(
                "Latency", kinds, default=kinds[0], key="history-latency", required=True, label_visibility="collapsed"
            )
            values: Mapping[str, Sequence[float]] = {name: found[kind or kinds[0]] for name, found in pooled.items()}
            st.altair_chart(distribution_curves(values), width="stretch", key="history-distribution")
    with right:
        first = {group.name: (group.counted or group.runs)[0] for group in groups}
        tables = {name: samples_table(run.samples) for name, run in first.items() if run.samples}
        if tables:
            several = any(len(group.runs) > 1 for group in groups)
            st.markdown(f"**Throughput** :small[:gray[tokens/s{', first run of each setting' if several else ''}]]")
            st.space("medium")
            st.altair_chart(throughput_curves(tables), width="stretch", key="history-throughput")


def _pooled(group: Group) -> dict[str, list[float]]:
    pooled: dict[str, list[float]] = {"TTFT": [], "TPOT": [], "ITL": [], "E2E": []}
    for run in group.counted or group.runs[:1]:
        for name, values in latencies(run).items():
            pooled[name] += values
    return pooled
