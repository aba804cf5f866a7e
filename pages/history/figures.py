"""The figures of several runs in a table, with their differences from the first column."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import pandas as pd
import streamlit as st

from engine.measure.comparison import MetricComparison, compare
from engine.measure.metrics import METRICS
from pages.history.groups import Group
from pages.shared.run_values import HEADLINES, QUALITY, metric_info, reference_text
from pages.shared.text import plain

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


def figures_table(groups: Sequence[Group], everything: bool) -> None:
    """Draw a row a metric and a column a group; ``everything``: more than the main metrics."""
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
