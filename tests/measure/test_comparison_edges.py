"""A/B statistics where they are easily wrong: what is left out, one value, rounding, flips of signs, sentences."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from engine.measure import compare, compare_all
from engine.measure.comparison import compare_values, disturbed_label

SPEED = "output_tokens_s"


def runs_of(make_run, values, **changes):
    return [make_run({SPEED: value}, repeat=index, **changes) for index, value in enumerate(values)]


# -- what is compared -------------------------------------------------------------------------------------------------


def test_nothing_is_warned_of_where_nothing_is_left_out(make_run):
    a, b = (runs_of(make_run, [base + i for i in range(5)]) for base in (100.0, 150.0))
    assert compare(a, b, SPEED).warnings == []


def test_failed_and_disturbed_runs_of_either_arm_are_left_out_and_counted_apart(make_run):
    a, b = (runs_of(make_run, [base + i for i in range(5)]) for base in (100.0, 150.0))
    a[0] = make_run({SPEED: 1.0}, repeat=0, status="failed")
    b[1] = make_run({SPEED: 1.0}, repeat=1, disturbed=["another request"])
    result = compare(a, b, SPEED)
    assert (result.values_a, result.values_b) == ([102.0, 103.0, 104.0], [152.0, 153.0, 154.0])
    assert result.warnings[:2] == [
        disturbed_label(1),
        "3 runs left out: not completed, not measured or without a partner",
    ]


def test_one_disturbed_run_and_several_are_told_in_the_right_number():
    assert disturbed_label(1).startswith("1 disturbed run left out")
    assert disturbed_label(1).endswith("while it was measured")
    assert disturbed_label(2).startswith("2 disturbed runs left out")
    assert disturbed_label(2).endswith("while they were measured")


@pytest.mark.parametrize("swapped", [False, True])
def test_what_one_arm_alone_measured_is_no_row_and_the_verdict_names_the_other(make_run, swapped):
    measured, other = runs_of(make_run, [5.0, 6.0]), [make_run({SPEED: None}, repeat=r) for r in range(2)]
    arms = (other, measured) if swapped else (measured, other)
    assert compare_all(*arms) == []
    result = compare(*arms, SPEED)
    assert result.verdict == f"Not measured in {'A' if swapped else 'B'}."
    assert result.difference is result.ratio is result.p_value is None
    assert (result.mean_a, result.mean_b) == ((None, 5.5) if swapped else (5.5, None))


@pytest.mark.parametrize("which", [0, 1])
def test_runs_without_a_repeat_are_not_paired(make_run, which):
    arms = [runs_of(make_run, [100.0, 101.0]), runs_of(make_run, [150.0, 151.0])]
    arms[which].append(make_run({SPEED: 120.0}, repeat=None))
    result = compare(*arms, SPEED)
    assert not result.paired
    assert (len(result.values_a), len(result.values_b)) == ((3, 2) if which == 0 else (2, 3))


def test_pairs_must_be_as_many_in_both_arms():
    with pytest.raises(ValueError, match="zip"):
        compare_values([1.0, 2.0], [1.0, 2.0, 3.0], SPEED)


# -- few values, and values that are the same --------------------------------------------------------------------------


def test_two_values_have_a_spread_and_one_has_none():
    assert compare_values([1.0, 3.0], [2.0, 2.0], SPEED).spread_a == pytest.approx(math.sqrt(2) / 2)
    assert compare_values([1.0], [2.0], SPEED).spread_a is None


def test_unpaired_arms_need_two_values_each():
    one = compare_values([1.0], [2.0, 2.5, 3.0], SPEED, paired=False)
    assert (one.method, one.ci_low, one.p_value, one.better) == ("one repeat", None, None, None)
    two = compare_values([1.0, 1.1], [2.0, 2.1, 2.2], SPEED, paired=False)
    assert two.method == "Welch t on logs"
    assert two.ci_low < two.ratio < two.ci_high


def test_the_method_names_the_scale():
    assert compare_values([1.0, 2.0], [2.0, 3.0], SPEED).method == "paired t on log-ratios"
    assert compare_values([0.0, 1.0], [2.0, 3.0], "preemptions").method == "paired t on differences"
    assert compare_values([0.0, 1.0], [2.0, 3.0], "preemptions", paired=False).method == "Welch t on values"


def test_what_differs_by_rounding_alone_is_the_same_in_every_repeat():
    ratios = compare_values([0.1, 0.2, 0.3, 0.7], [0.1 * 3, 0.2 * 3, 0.3 * 3, 0.7 * 3], SPEED)
    assert (ratios.p_value, ratios.better) == (0.0, "B")
    assert ratios.ci_low == ratios.ci_high == ratios.ratio
    none = compare_values([0.1 + 0.2, 1.0, 2.0], [0.3, 1.0, 2.0], SPEED)
    assert (none.p_value, none.better) == (1.0, None)
    assert none.ci_low == none.ci_high == none.ratio


def test_a_metric_that_is_measured_once_an_arm_has_a_difference_but_no_interval():
    result = compare_values([10.0] * 5, [12.0] * 5, "perplexity")
    assert result.ratio == pytest.approx(1.2)
    assert (result.ci_low, result.p_value, result.better, result.warnings) == (None, None, None, [])
    assert result.method == "measured once an arm"
    assert result.verdict == "B is higher by 20 %; measured once on one text."
    assert compare_values([10.0] * 5, [10.0] * 5, "perplexity").verdict == "No difference measured."
    assert (
        compare_values([0.0], [0.25], "kl_mean_nats").verdict == "B is higher by 0.25 nats; measured once on one text."
    )


# -- flips of signs ---------------------------------------------------------------------------------------------------


def flipped(differences):
    """The p value by enumeration, written without the code under test."""
    sums = np.array(list(itertools.product((1, -1), repeat=len(differences)))) @ np.array(differences)
    return float((np.abs(sums) >= abs(sum(differences)) - 1e-9).mean())


def compare_differences(differences):
    return compare_values([0.0] * len(differences), differences, "preemptions").p_value_permutation


@pytest.mark.parametrize("differences", [[3.0, 1.0, 1.0], [3.0, -1.0, 1.0], [2.6, 0.3, -0.2], [0.5, 0.25, -0.125]])
def test_p_of_the_flips_is_that_of_all_of_them(differences):
    assert compare_differences(differences) == pytest.approx(flipped(differences))


def test_fourteen_repeats_are_enumerated_and_more_are_sampled():
    assert compare_differences([1.0] * 14) == pytest.approx(2 / 2**14)
    # 20 000 samples; none is as far out as the truth, which counts as one
    assert compare_differences([1.0] * 20) == pytest.approx(1 / 20_001)


def test_the_sampled_p_is_near_the_true_one_and_the_same_every_time():
    differences = [float(value) for value in np.random.default_rng(3).normal(0.25, 1.0, size=15)]
    found = compare_differences(differences)
    assert found == pytest.approx(flipped(differences), abs=0.02)
    assert 0.05 < found < 0.95
    assert compare_differences(differences) == found


def test_flips_that_do_not_agree_with_the_interval_are_warned_of():
    b = [100.7, 101.0, 100.0, 100.0, 100.6, 101.6]
    assert compare_values([100.0] * 6, b, SPEED).warnings == ["the permutation test does not agree (p = 0.12)"]


# -- sentences --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "a", "b", "verdict"),
    [
        (SPEED, 1.0, 0.5, "B is slower by 50 % (95 % CI 50 to 50 %)."),
        ("requests_s", 1.0, 2.0, "B is faster by 100 % (95 % CI 100 to 100 %)."),
        ("duration_s", 1.0, 2.0, "B is slower: takes 100 % longer (95 % CI 100 to 100 %)."),
        ("ttft_ms_p50", 2.0, 1.0, "B is faster: takes 50 % less time (95 % CI 50 to 50 %)."),
        ("acceptance_rate", 0.5, 0.75, "B is higher by 50 % (95 % CI 50 to 50 %): better."),
        ("acceptance_rate", 0.75, 0.5, "B is lower by 33.3 % (95 % CI 33.3 to 33.3 %): worse."),
        ("energy_j", 4.0, 1.0, "B is lower by 75 % (95 % CI 75 to 75 %): better."),
        ("power_w_peak", 100.0, 200.0, "B is higher by 100 % (95 % CI 100 to 100 %)."),
        ("kv_blocks_used_peak", 0.0, 3.0, "B is higher by 3 blocks (95 % CI 3 blocks to 3 blocks): worse."),
        ("kv_blocks_used_peak", 3.0, 0.0, "B is lower by 3 blocks (95 % CI 3 blocks to 3 blocks): better."),
    ],
)
def test_verdict_says_the_size_in_the_words_of_the_metric(metric, a, b, verdict):
    assert compare_values([a] * 5, [b] * 5, metric).verdict == verdict


def test_bounds_are_named_from_the_smaller_size_to_the_larger():
    lower = compare_values([100.0, 101.0, 99.0, 100.0, 100.0], [50.0, 51.0, 50.0, 49.0, 50.0], SPEED)
    assert lower.verdict == "B is slower by 50 % (95 % CI 49.2 to 50.8 %)."
    fewer = compare_values([9.0, 10.0, 11.0, 10.0, 10.0], [1.0, 0.0, 2.0, 1.0, 1.0], "kv_blocks_used_peak")
    assert fewer.verdict.startswith("B is lower by 9 blocks (95 % CI 8.12 blocks to 9.88 blocks)")


def test_bounds_on_both_sides_of_none_are_signed():
    unclear = compare_values([100.0, 110.0, 90.0, 100.0, 105.0], [101.0, 100.0, 99.0, 104.0, 100.0], SPEED)
    assert unclear.verdict == "No difference shown (95 % CI -8.8 to +9.7 %)."
    counts = compare_values([0.0, 2.0, 1.0], [1.0, 1.0, 2.0], "kv_blocks_used_peak")
    assert counts.verdict == "No difference shown (95 % CI -2.54 to +3.2 blocks)."


def test_few_repeats_and_a_wide_spread_are_told_of_the_arm_that_has_them():
    warnings = compare_values([100.0, 101.0], [50.0, 100.0], SPEED).warnings
    assert warnings == ["only 2 repeats: 5 or more are better", "B may be unstable: spread 47 % of its mean"]


def test_one_repeat_of_a_comparison_is_a_pair(make_run):
    result = compare(runs_of(make_run, [100.0]), runs_of(make_run, [150.0]), SPEED)
    assert result.paired
    assert (result.ratio, result.method) == (pytest.approx(1.5), "one repeat")


def test_differences_that_cancel_out_are_not_the_same_in_every_repeat():
    verdict = compare_values([0.0, 2.0, 1.0], [2.0, 0.0, 1.0], "preemptions").verdict
    assert verdict.startswith("No difference shown (95 % CI -")


def test_few_repeats_are_those_of_the_arm_that_has_fewer_and_none_is_not_few():
    unequal = compare_values([1.0] * 5, [2.0, 2.01], SPEED, paired=False)
    assert unequal.warnings == ["only 2 repeats: 5 or more are better"]
    assert compare_values([5.0], [], SPEED, paired=False).warnings == []
