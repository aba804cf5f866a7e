"""The bars that the project sets itself, and the ratios that decide whether they are reached. Pure functions.

A ratio compares medians over repeats, each side at its best setting for that metric. Its 95 % interval is a percentile
bootstrap over repeats, which are resampled together for both sides because they ran in the same stretch of time.
With the few repeats of one evening such an interval is too narrow rather than too wide: it shows the order of the
noise, no more.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from tests.benchmarks.settings import OURS, PEERS

LOWER_IS_BETTER = frozenset({"ttft_ms_p50", "ttft_ms_p95", "tpot_ms_p50", "duration_s"})
RESAMPLES = 10_000


@dataclasses.dataclass(frozen=True, slots=True)
class Side:
    """Which rows one side of a bar may choose its best from.

    Attributes:
        label: for the table.
        engines: names.
        weights: formats; empty for all.
        head_as_stored: True leaves out those whose ``head_weights`` differs from the default.
        variant: of the workload.
    """

    label: str
    engines: tuple[str, ...]
    weights: tuple[str, ...] = ()
    head_as_stored: bool = False
    variant: str = ""

    def matches(self, row: dict[str, Any]) -> bool:
        """True if a row of results belongs to this side."""
        return (
            row["engine"] in self.engines
            and row["variant"] == self.variant
            and (not self.weights or row["weights"] in self.weights)
            and not (self.head_as_stored and "head_weights=" in row["setting"])
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Bar:
    """ "Ours is at least ``factor`` times as good as theirs."

    Attributes:
        workload: key.
        metric: name of the metric.
        same_setting: theirs is our own engine in the setting that our side chose.
    """

    workload: str
    metric: str
    ours: Side
    theirs: Side
    factor: float
    same_setting: bool = False


_OURS = (OURS,)
UNQUANTIZED = ("float32", "bfloat16")
BEST = Side("any setting", _OURS)
PLAIN = Side("weights as stored", _OURS, UNQUANTIZED)
HEAD_AS_STORED = Side("4-bit weights, head as stored", _OURS, ("int4", "w4a8"), head_as_stored=True)
_PEER = Side("best peer", PEERS)
_PLAIN_PEER = Side("best peer in float32 or bfloat16", PEERS, UNQUANTIZED)
_STATIC = Side("static batching", _OURS, variant="batching=static")
_NO_PREFIX_CACHE = Side("no prefix cache", _OURS, variant="prefix_cache=off")
_THROUGHPUT = "output_tokens_s"

# Against peers always the best of them all; a second row keeps to those that quantize nothing, on both sides.
BARS: tuple[Bar, ...] = (
    *(Bar("a", metric, BEST, _PEER, 1.3) for metric in (_THROUGHPUT, "decode_tokens_s")),
    *(Bar("a", metric, HEAD_AS_STORED, _PEER, 1.0) for metric in (_THROUGHPUT, "decode_tokens_s")),
    *(Bar("a", metric, PLAIN, _PLAIN_PEER, 1.3) for metric in (_THROUGHPUT, "decode_tokens_s")),
    *(Bar(burst, _THROUGHPUT, BEST, _PEER, 1.5) for burst in ("b8", "b32")),
    *(Bar(burst, _THROUGHPUT, PLAIN, _PLAIN_PEER, 1.0) for burst in ("b8", "b32")),
    Bar("c", _THROUGHPUT, BEST, _STATIC, 3.0, same_setting=True),
    Bar("c", _THROUGHPUT, BEST, _PEER, 1.3),
    Bar("d", "ttft_ms_p50", BEST, _NO_PREFIX_CACHE, 5.0, same_setting=True),
    Bar("d", "ttft_ms_p50", BEST, _PEER, 1.0),
    Bar("e", _THROUGHPUT, BEST, _PEER, 1.2),
    *(Bar(prefill, "prefill_tokens_s", BEST, _PEER, 1.2) for prefill in ("p512", "p2048")),
    *(Bar(prefill, "prefill_tokens_s", PLAIN, _PLAIN_PEER, 1.0) for prefill in ("p512", "p2048")),
)


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """A bar and what was measured.

    Attributes:
        ours_setting, theirs_setting: the settings chosen, "engine setting"; "" if nothing was measured.
        ours, theirs: medians.
        ratio: > 1 where ours is better, whatever the direction of the metric; None if a side is missing.
        low, high: 95 % interval of the ratio; None with one repeat.
        reached: None if a side is missing.
    """

    workload: str
    metric: str
    ours_label: str
    theirs_label: str
    factor: float
    ours_setting: str
    theirs_setting: str
    ours: float | None
    theirs: float | None
    ratio: float | None
    low: float | None
    high: float | None
    reached: bool | None


def judge(rows: Sequence[dict[str, Any]], bars: Sequence[Bar] = BARS) -> list[Verdict]:
    """Every bar whose workload was measured."""
    measured = {row["workload"] for row in rows}
    return [_judge(bar, rows) for bar in bars if bar.workload in measured]


def best(rows: Sequence[dict[str, Any]], metric: str) -> dict[str, Any] | None:
    """The row with the best median of a metric; None if none has it."""
    having = [row for row in rows if median(row, metric) is not None]
    if not having:
        return None
    choose = min if metric in LOWER_IS_BETTER else max
    return choose(having, key=lambda row: median(row, metric) or 0.0)


def median(row: dict[str, Any], metric: str) -> float | None:
    """Over the repeats that measured it."""
    values = [value for value in row["values"].get(metric, []) if value is not None]
    return statistics.median(values) if values else None


def ratio_interval(better: Sequence[float], worse: Sequence[float], seed: int = 0) -> tuple[float, float] | None:
    """95 % bootstrap interval of median(better) / median(worse) over paired repeats; None below two."""
    if len(better) != len(worse) or len(better) < 2:
        return None
    picks = np.random.default_rng(seed).integers(0, len(better), (RESAMPLES, len(better)))
    top, bottom = (np.median(np.asarray(values)[picks], axis=1) for values in (better, worse))
    low, high = np.percentile(top / bottom, (2.5, 97.5))
    return float(low), float(high)


def _judge(bar: Bar, rows: Sequence[dict[str, Any]]) -> Verdict:
    here = [row for row in rows if row["workload"] == bar.workload]
    ours = best([row for row in here if bar.ours.matches(row)], bar.metric)
    candidates = [row for row in here if bar.theirs.matches(row)]
    if bar.same_setting:
        candidates = [row for row in candidates if ours is not None and row["setting"] == ours["setting"]]
    theirs = best(candidates, bar.metric)
    ratio, interval = _ratio(ours, theirs, bar.metric)
    return Verdict(
        workload=bar.workload,
        metric=bar.metric,
        ours_label=bar.ours.label,
        theirs_label=bar.theirs.label,
        factor=bar.factor,
        ours_setting=ours["setting"] if ours else "",
        theirs_setting=f"{theirs['engine']} {theirs['setting']}" if theirs else "",
        ours=median(ours, bar.metric) if ours else None,
        theirs=median(theirs, bar.metric) if theirs else None,
        ratio=ratio,
        low=interval[0] if interval else None,
        high=interval[1] if interval else None,
        reached=None if ratio is None else ratio >= bar.factor,
    )


def _ratio(
    ours: dict[str, Any] | None, theirs: dict[str, Any] | None, metric: str
) -> tuple[float | None, tuple[float, float] | None]:
    if ours is None or theirs is None:
        return None, None
    top, bottom = (theirs, ours) if metric in LOWER_IS_BETTER else (ours, theirs)
    high, low = median(top, metric), median(bottom, metric)
    if high is None or not low:
        return None, None
    pairs = [
        (a, b)
        for a, b in zip(top["values"][metric], bottom["values"][metric], strict=True)
        if a is not None and b is not None
    ]
    return high / low, ratio_interval([a for a, _ in pairs], [b for _, b in pairs])
