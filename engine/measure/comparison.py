"""Is B different from A? Statistics of repeated runs; pure functions.

The two arms of one repeat ran the same requests one after another, so repeats are pairs. For a metric x that is
positive in every run, the pairs give log-ratios d_i = ln(b_i / a_i), and

    ratio     = exp(mean d)
    interval  = exp(mean d ± t(0.975, n − 1) · s_d / √n)        paired t on log-ratios
    p value   = of the same t statistic; the interval excludes 1 exactly where p < 0.05

Why t and not a bootstrap: with the 3 to 10 repeats that a person waits for, a percentile or BCa bootstrap cannot
reach beyond the few values seen and covers far less than 95 %; on the log scale the noise of times and rates is
close to symmetric. A sign-flip permutation test, which assumes nothing but symmetry, stands next to it
(``p_value_permutation``); its smallest possible value is 2^(1−n), 0.06 with 5 repeats, so it cannot decide alone
before 6. Where a value is 0 (counts, hit rates) the same is done with plain differences and there is no ratio. Runs
that are not paired are compared by Welch's t on logs, and Mann and Whitney's U.

One comparison looks at many metrics: with 20 independent ones, one is expected to reach p < 0.05 by chance.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Sequence

from engine.measure.metrics import METRICS, MetricInfo
from engine.measure.results import RunResult

MINIMUM_REPEATS = 5
UNSTABLE_SPREAD = 0.10
"""Relative standard deviation within an arm above which a result may be unstable (pyperf warns at the same)."""
_LEVEL = 0.95
_MOST_ENUMERATED = 14


@dataclasses.dataclass(frozen=True, slots=True)
class MetricComparison:
    """One metric of two arms.

    Attributes:
        metric, label, unit, higher_is_better: see :data:`engine.measure.metrics.METRICS`.
        values_a, values_b: one value a repeat, in order; pairs where ``paired``.
        paired: the same repeats of both arms were compared with each other.
        mean_a, mean_b, median_a, median_b: over repeats; None if nothing was measured.
        spread_a, spread_b: relative standard deviation (σ/mean) within the arm; None below two values or at mean 0.
        difference: mean of B − A, in the metric's unit.
        ratio: geometric mean of B/A; None where a value is not positive.
        ci_low, ci_high: 95 % interval of the ratio, or of the difference where there is no ratio; None for one repeat.
        p_value: two-sided, of the test that the interval belongs to.
        p_value_permutation: two-sided, sign-flip permutation (paired) or Mann-Whitney U.
        method: how interval and p value were made.
        better: "A", "B", or None where no difference was shown or no direction is better.
        verdict: one sentence for a person.
        warnings: what makes the verdict uncertain.
    """

    metric: str
    label: str
    unit: str
    higher_is_better: bool | None
    values_a: list[float]
    values_b: list[float]
    paired: bool
    mean_a: float | None
    mean_b: float | None
    median_a: float | None
    median_b: float | None
    spread_a: float | None
    spread_b: float | None
    difference: float | None
    ratio: float | None
    ci_low: float | None
    ci_high: float | None
    p_value: float | None
    p_value_permutation: float | None
    method: str
    better: str | None
    verdict: str
    warnings: list[str]


@dataclasses.dataclass(frozen=True, slots=True)
class _Estimate:
    """Centre and interval on the scale of the test: logs where ``is_ratio``, else the metric's own unit."""

    centre: float
    half_width: float | None
    p_value: float | None
    p_value_permutation: float | None
    is_ratio: bool
    method: str


def compare(runs_a: Sequence[RunResult], runs_b: Sequence[RunResult], metric: str) -> MetricComparison:
    """Compare one metric of the completed runs of two arms.

    A run that was disturbed (see :class:`engine.measure.results.RunResult`) says nothing about its setting and is left
    out. Runs are paired by their ``repeat`` where both arms have the same repeats; a repeat that lacks one arm is left
    out, too. What is left out is told in the warnings.

    Raises:
        ValueError: if there is no such metric.
    """
    if metric not in METRICS:
        raise ValueError(f"there is no metric {metric!r}; known: {', '.join(METRICS)}")
    disturbed = sum(bool(run.disturbed) for run in (*runs_a, *runs_b))
    done_a = [run for run in runs_a if _counts(run, metric)]
    done_b = [run for run in runs_b if _counts(run, metric)]
    values_a, values_b, paired = _arrange(done_a, done_b, metric)
    left_out = len(runs_a) + len(runs_b) - len(values_a) - len(values_b) - disturbed
    warnings = [disturbed_label(disturbed)] if disturbed else []
    if left_out:
        warnings.append(f"{left_out} runs left out: not completed, not measured or without a partner")
    return compare_values(values_a, values_b, metric, paired=paired, warnings=warnings)


def _counts(run: RunResult, metric: str) -> bool:
    return run.status == "completed" and not run.disturbed and run.metrics.get(metric) is not None


def disturbed_label(count: int) -> str:
    """How many runs are left out because they were disturbed, as a text.

    >>> disturbed_label(1)
    '1 disturbed run left out of averages: something else changed or used the engine while it was measured'
    """
    runs = "run" if count == 1 else "runs"
    happened = "it was measured" if count == 1 else "they were measured"
    return f"{count} disturbed {runs} left out of averages: something else changed or used the engine while {happened}"


def compare_all(runs_a: Sequence[RunResult], runs_b: Sequence[RunResult]) -> list[MetricComparison]:
    """Every metric that both arms measured, in the order of :data:`METRICS`."""
    compared = (compare(runs_a, runs_b, metric) for metric in METRICS)
    return [result for result in compared if result.values_a and result.values_b]


def compare_values(
    values_a: Sequence[float],
    values_b: Sequence[float],
    metric: str,
    *,
    paired: bool = True,
    warnings: Sequence[str] = (),
) -> MetricComparison:
    """As :func:`compare`, from bare numbers; with ``paired`` both have the same length and order."""
    info = METRICS[metric]
    a, b = [float(value) for value in values_a], [float(value) for value in values_b]
    estimate = _estimate(a, b, paired, info) if a and b else None
    ratio, low, high = _on_scale(estimate)
    better = _better(estimate, info)
    return MetricComparison(
        metric=metric,
        label=info.label,
        unit=info.unit,
        higher_is_better=info.higher_is_better,
        values_a=a,
        values_b=b,
        paired=paired,
        mean_a=statistics.fmean(a) if a else None,
        mean_b=statistics.fmean(b) if b else None,
        median_a=statistics.median(a) if a else None,
        median_b=statistics.median(b) if b else None,
        spread_a=_spread(a),
        spread_b=_spread(b),
        difference=statistics.fmean(b) - statistics.fmean(a) if a and b else None,
        ratio=ratio,
        ci_low=low,
        ci_high=high,
        p_value=estimate.p_value if estimate else None,
        p_value_permutation=estimate.p_value_permutation if estimate else None,
        method=estimate.method if estimate else "nothing measured",
        better=better,
        verdict=_verdict(a, b, estimate, info, better),
        warnings=[*warnings, *([] if info.once else _warnings(a, b, estimate))],
    )


def _arrange(
    runs_a: Sequence[RunResult], runs_b: Sequence[RunResult], metric: str
) -> tuple[list[float], list[float], bool]:
    by_repeat_a = {run.repeat: run for run in runs_a if run.repeat is not None}
    by_repeat_b = {run.repeat: run for run in runs_b if run.repeat is not None}
    labelled = 0 < len(by_repeat_a) == len(runs_a) and 0 < len(by_repeat_b) == len(runs_b)
    # repeats of two different comparisons are no pairs, even if they bear the same numbers
    together = {run.comparison_id for run in (*runs_a, *runs_b)}
    if labelled and len(together) == 1 and None not in together:
        common = sorted(key for key in by_repeat_a if key in by_repeat_b and key is not None)
        runs_a, runs_b = [by_repeat_a[key] for key in common], [by_repeat_b[key] for key in common]
        paired = True
    else:
        paired = False
    return [_value(run, metric) for run in runs_a], [_value(run, metric) for run in runs_b], paired


def _value(run: RunResult, metric: str) -> float:
    value = run.metrics[metric]
    assert value is not None
    return float(value)


def _spread(values: Sequence[float]) -> float | None:
    if len(values) < 2 or statistics.fmean(values) == 0:
        return None
    return statistics.stdev(values) / abs(statistics.fmean(values))


def _estimate(a: list[float], b: list[float], paired: bool, info: MetricInfo) -> _Estimate:
    positive = min(*a, *b) > 0
    scale = "log-ratios" if positive else "differences"
    if positive:
        a, b = [math.log(value) for value in a], [math.log(value) for value in b]
    if info.once:  # the same number in every repeat: an interval of width 0 would be a false certainty
        return _Estimate(statistics.fmean(b) - statistics.fmean(a), None, None, None, positive, "measured once an arm")
    if paired:
        return _estimate_paired([y - x for x, y in zip(a, b, strict=True)], positive, f"paired t on {scale}")
    return _estimate_unpaired(a, b, positive, f"Welch t on {'logs' if positive else 'values'}")


def _estimate_paired(differences: list[float], is_ratio: bool, method: str) -> _Estimate:
    n, centre = len(differences), statistics.fmean(differences)
    if n < 2:
        return _Estimate(centre, None, None, None, is_ratio, "one repeat")
    error = statistics.stdev(differences) / math.sqrt(n)
    half_width, p_value = _student(centre, error, n - 1)
    return _Estimate(centre, half_width, p_value, _sign_flip_p(differences), is_ratio, method)


def _estimate_unpaired(a: list[float], b: list[float], is_ratio: bool, method: str) -> _Estimate:
    from scipy.stats import mannwhitneyu

    centre = statistics.fmean(b) - statistics.fmean(a)
    if min(len(a), len(b)) < 2:
        return _Estimate(centre, None, None, None, is_ratio, "one repeat")
    part_a, part_b = statistics.variance(a) / len(a), statistics.variance(b) / len(b)
    error = math.sqrt(part_a + part_b)
    freedom = (part_a + part_b) ** 2 / (part_a**2 / (len(a) - 1) + part_b**2 / (len(b) - 1)) if error else 1.0
    half_width, p_value = _student(centre, error, freedom)
    return _Estimate(centre, half_width, p_value, float(mannwhitneyu(a, b).pvalue), is_ratio, method)


def _student(centre: float, error: float, freedom: float) -> tuple[float, float]:
    """Half width of the 95 % interval and the two-sided p value."""
    from scipy.stats import t

    if error <= 1e-12 * max(1.0, abs(centre)):  # the same in every repeat, to rounding
        return 0.0, 1.0 if abs(centre) <= 1e-12 else 0.0
    return float(t.ppf(0.5 + _LEVEL / 2, freedom)) * error, float(2 * t.sf(abs(centre) / error, freedom))


def _sign_flip_p(differences: list[float]) -> float:
    """Two-sided p of the mean under all flips of signs (a fixed sample of them for many repeats)."""
    observed = abs(math.fsum(differences)) * (1 - 1e-12)
    if len(differences) > _MOST_ENUMERATED:
        return _sign_flip_sampled(differences, observed)
    extreme = total = 0
    for signs in itertools.product((1, -1), repeat=len(differences)):
        total += 1
        extreme += abs(math.fsum(s * d for s, d in zip(signs, differences, strict=True))) >= observed
    return extreme / total


def _sign_flip_sampled(differences: list[float], observed: float) -> float:
    import numpy as np

    signs = np.random.default_rng(0).choice([-1.0, 1.0], size=(20_000, len(differences)))
    extreme = int((np.abs(signs @ np.array(differences)) >= observed).sum())
    return (extreme + 1) / (len(signs) + 1)


def _on_scale(estimate: _Estimate | None) -> tuple[float | None, float | None, float | None]:
    """(ratio or None, low, high) as published."""
    if estimate is None:
        return None, None, None
    change = math.exp if estimate.is_ratio else float
    ratio = math.exp(estimate.centre) if estimate.is_ratio else None
    if estimate.half_width is None:
        return ratio, None, None
    return ratio, change(estimate.centre - estimate.half_width), change(estimate.centre + estimate.half_width)


def _is_shown(estimate: _Estimate | None) -> bool:
    """True if the interval excludes "no difference"."""
    return (
        estimate is not None and estimate.half_width is not None and abs(estimate.centre) > estimate.half_width + 1e-12
    )


def _better(estimate: _Estimate | None, info: MetricInfo) -> str | None:
    if estimate is None or not _is_shown(estimate) or info.higher_is_better is None:
        return None
    return "B" if (estimate.centre > 0) == info.higher_is_better else "A"


def _verdict(a: list[float], b: list[float], estimate: _Estimate | None, info: MetricInfo, better: str | None) -> str:
    if estimate is None:
        return "Not measured in " + ("either arm." if not a and not b else "A." if not a else "B.")
    if estimate.half_width is None:
        if abs(estimate.centre) <= 1e-12:
            return "No difference measured."
        reason = "measured once on one text" if info.once else "one repeat says nothing about its uncertainty"
        return f"B is {_size(estimate, info)}; {reason}."
    interval = f"(95 % CI {_interval(estimate, info)})"
    if not _is_shown(estimate):
        if estimate.centre == 0 and estimate.half_width == 0:
            return "No difference: the same in every repeat."
        return f"No difference shown {interval}."
    return f"B is {_size(estimate, info)} {interval}{'' if better is None else _judgement(info, better)}."


def _judgement(info: MetricInfo, better: str) -> str:
    # "faster" and "slower" already say which is better
    return "" if info.unit in ("ms", "s", "tokens/s", "requests/s") else f": {'better' if better == 'B' else 'worse'}"


def _size(estimate: _Estimate, info: MetricInfo) -> str:
    """E.g. "faster by 32 %", "slower: takes 12 % longer", "higher by 3 blocks"."""
    centre = estimate.centre
    if not estimate.is_ratio:
        return f"{'higher' if centre > 0 else 'lower'} by {_amount(abs(centre), info)}"
    percent = f"{abs(math.expm1(centre)) * 100:.3g} %"
    if info.unit in ("tokens/s", "requests/s"):
        return f"{'faster' if centre > 0 else 'slower'} by {percent}"
    if info.unit in ("ms", "s"):
        return f"slower: takes {percent} longer" if centre > 0 else f"faster: takes {percent} less time"
    return f"{'higher' if centre > 0 else 'lower'} by {percent}"


def _interval(estimate: _Estimate, info: MetricInfo) -> str:
    """The bounds as the sentence counts them: as sizes where both lie on the side of the centre, else signed."""
    assert estimate.half_width is not None
    low, high = estimate.centre - estimate.half_width, estimate.centre + estimate.half_width
    if _is_shown(estimate):
        low, high = sorted((abs(low), abs(high))) if estimate.centre > 0 else (high, low)
        if estimate.is_ratio:
            return f"{abs(math.expm1(low)) * 100:.3g} to {abs(math.expm1(high)) * 100:.3g} %"
        return f"{_amount(abs(low), info)} to {_amount(abs(high), info)}"
    if estimate.is_ratio:
        return f"{_signed_percent(low)} to {_signed_percent(high)} %"
    return f"{low:+.3g} to {high:+.3g}{f' {info.unit}' if info.unit else ''}"


def _signed_percent(log_ratio: float) -> str:
    """Two digits where small, whole numbers where large (never an exponent).

    >>> _signed_percent(math.log(1.042)), _signed_percent(math.log(2.43))
    ('+4.2', '+143')
    """
    percent = math.expm1(log_ratio) * 100
    return f"{percent:+.2g}" if abs(percent) < 10 else f"{percent:+,.0f}"


def _amount(value: float, info: MetricInfo) -> str:
    return f"{value:.3g} {info.unit}".rstrip()


def _warnings(a: list[float], b: list[float], estimate: _Estimate | None) -> list[str]:
    found = []
    repeats = min(len(a), len(b))
    if 0 < repeats < MINIMUM_REPEATS:
        found.append(f"only {repeats} repeat{'s' if repeats > 1 else ''}: {MINIMUM_REPEATS} or more are better")
    for arm, values in (("A", a), ("B", b)):
        spread = _spread(values)
        if spread is not None and spread > UNSTABLE_SPREAD:
            found.append(f"{arm} may be unstable: spread {spread * 100:.0f} % of its mean")
    permutation = estimate.p_value_permutation if estimate else None
    if repeats >= 6 and permutation is not None and permutation > 0.05 and _is_shown(estimate):
        found.append(f"the permutation test does not agree (p = {permutation:.2f})")
    return found
