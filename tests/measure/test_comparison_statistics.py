"""A/B statistics against hand-computed numbers, scipy, and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from engine.measure import CLAIMS, METRICS, claims_for, compare, compare_all, judge_claim
from engine.measure.comparison import compare_values

A = [100.0, 104.0, 98.0, 101.0, 103.0]


def test_interval_and_p_value_are_the_paired_t_on_log_ratios():
    b = [131.0, 139.0, 127.0, 135.0, 133.0]
    result = compare_values(A, b, "output_tokens_s")
    reference = stats.ttest_rel(np.log(b), np.log(A))
    interval = reference.confidence_interval(0.95)
    assert result.p_value == pytest.approx(reference.pvalue)
    assert (result.ci_low, result.ci_high) == pytest.approx((math.exp(interval.low), math.exp(interval.high)))
    assert result.ratio == pytest.approx(math.prod(y / x for x, y in zip(A, b, strict=True)) ** (1 / 5))
    assert result.difference == pytest.approx(133.0 - 101.2)
    assert result.p_value_permutation == pytest.approx(2 / 2**5)
    assert result.spread_a == pytest.approx(np.std(A, ddof=1) / 101.2)
    assert result.better == "B"
    assert result.verdict == "B is faster by 31.4 % (95 % CI 28.7 to 34.1 %)."


def test_less_time_is_better_and_the_verdict_says_so():
    halved = [value / 2 for value in (101.0, 103.0, 99.0, 100.0, 104.0)]
    result = compare_values(A, halved, "ttft_ms_mean")
    assert result.better == "B"
    assert result.verdict.startswith("B is faster: takes 49.9 % less time (95 % CI ")
    back = compare_values(halved, A, "ttft_ms_mean")
    assert back.better == "A"
    assert back.verdict.startswith("B is slower: takes 99.6 % longer (95 % CI ")


def test_no_difference_is_claimed_where_the_interval_includes_none():
    result = compare_values(A, [101.0, 102.0, 99.0, 103.0, 100.0], "output_tokens_s")
    assert result.better is None
    assert result.ci_low < 1 < result.ci_high
    assert result.verdict.startswith("No difference shown (95 % CI -")


def test_one_repeat_gives_a_ratio_but_no_certainty():
    result = compare_values([100.0], [150.0], "output_tokens_s")
    assert result.ratio == pytest.approx(1.5)
    assert result.ci_low is result.p_value is result.better is None
    assert "one repeat says nothing" in result.verdict
    assert result.warnings == ["only 1 repeat: 5 or more are better"]


def test_few_repeats_and_a_wide_spread_are_warned_of():
    result = compare_values([100.0, 140.0, 90.0], [200.0, 210.0, 205.0], "output_tokens_s")
    assert result.warnings[0] == "only 3 repeats: 5 or more are better"
    assert result.warnings[1] == "A may be unstable: spread 24 % of its mean"


def test_values_of_zero_are_compared_by_difference():
    result = compare_values([0.0, 0.0, 0.0, 0.0, 0.0], [3.0, 4.0, 3.0, 5.0, 3.0], "preemptions")
    reference = stats.ttest_1samp([3.0, 4.0, 3.0, 5.0, 3.0], 0)
    assert result.ratio is None
    assert result.p_value == pytest.approx(reference.pvalue)
    assert result.ci_low == pytest.approx(reference.confidence_interval().low)
    assert result.better == "A"
    assert result.verdict.startswith("B is higher by 3.6 (95 % CI 2.49 to 4.71): worse.")


def test_a_difference_that_is_the_same_every_time_is_certain():
    result = compare_values([1000.0] * 3, [250.0] * 3, "weights_bytes")
    assert (result.ratio, result.ci_low, result.ci_high) == pytest.approx((0.25, 0.25, 0.25))
    assert result.better == "B"
    assert compare_values([7.0] * 3, [7.0] * 3, "preemptions").verdict == "No difference: the same in every repeat."


def test_only_completed_runs_of_the_same_repeat_are_paired(make_run):
    runs_a = [make_run({"output_tokens_s": 100.0 + r}, arm="A", repeat=r) for r in range(4)]
    runs_b = [make_run({"output_tokens_s": 200.0 + r}, arm="B", repeat=r) for r in (3, 0, 1)]
    runs_b.append(make_run({"output_tokens_s": 1.0}, arm="B", repeat=2, status="failed"))
    result = compare(runs_a, runs_b, "output_tokens_s")
    assert result.paired
    assert result.values_a == [100.0, 101.0, 103.0]
    assert result.values_b == [200.0, 201.0, 203.0]
    assert "2 runs left out" in result.warnings[0]


def test_runs_of_different_comparisons_are_not_paired(make_run):
    runs_a = [make_run({"output_tokens_s": v}, comparison_id="x", repeat=i) for i, v in enumerate(A)]
    runs_b = [make_run({"output_tokens_s": 2 * v}, comparison_id="y", repeat=i) for i, v in enumerate(A)]
    result = compare(runs_a, runs_b, "output_tokens_s")
    reference = stats.ttest_ind(np.log([2 * v for v in A]), np.log(A), equal_var=False)
    assert not result.paired
    assert result.p_value == pytest.approx(reference.pvalue)
    assert result.ci_low == pytest.approx(math.exp(reference.confidence_interval().low))
    assert result.p_value_permutation == pytest.approx(stats.mannwhitneyu(A, [2 * v for v in A]).pvalue)


def test_metrics_that_an_arm_did_not_measure_are_left_out_of_the_table(make_run):
    runs = [make_run({"output_tokens_s": 5.0, "acceptance_rate": None}, repeat=r) for r in range(2)]
    assert [row.metric for row in compare_all(runs, runs)] == ["output_tokens_s"]
    assert compare(runs, runs, "acceptance_rate").verdict == "Not measured in either arm."
    with pytest.raises(ValueError, match="no metric 'speed'"):
        compare(runs, runs, "speed")


def test_two_equal_arms_are_told_apart_about_one_time_in_twenty():
    noise = np.random.default_rng(5).lognormal(0.0, 0.05, size=(400, 2, 5)) * 100
    found = sum(compare_values(a, b, "output_tokens_s").better is not None for a, b in noise.tolist())
    assert 8 <= found <= 34  # 20 expected; P(outside) < 0.2 %


@settings(deadline=None)  # a shared machine pauses now and then
@given(
    st.lists(st.tuples(st.floats(0.01, 1e5), st.floats(0.01, 1e5)), min_size=2, max_size=8),
    st.sampled_from(["output_tokens_s", "ttft_ms_p99", "preemptions"]),
)
def test_swapping_the_arms_turns_the_result_round(pairs, metric):
    a, b = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    forward, backward = compare_values(a, b, metric), compare_values(b, a, metric)
    assert forward.ratio * backward.ratio == pytest.approx(1.0)
    assert forward.ci_low * backward.ci_high == pytest.approx(1.0)
    assert forward.p_value == pytest.approx(backward.p_value)
    assert {forward.better, backward.better} in ({None}, {"A", "B"})
    assert forward.ci_low <= forward.ratio * (1 + 1e-9)
    assert forward.ratio <= forward.ci_high * (1 + 1e-9)
    if forward.better is not None:
        assert forward.p_value < 0.05


def test_every_claim_names_a_metric_that_is_measured():
    assert all(claim.metric in METRICS and 0 < claim.low <= claim.high for claim in CLAIMS)


def test_claims_are_found_for_a_change_and_turned_round_for_its_undoing():
    assert [claim.name for claim in claims_for({"weights": ("model", "int4")})] == ["int4-speed", "int4-memory"]
    undone = claims_for({"weights": ("int4", "model")})
    assert [(claim.low, claim.high) for claim in undone] == [(0.4, 0.4), (4.0, 4.0)]
    assert next(claim.name for claim in claims_for({"attention": ("reference", "triton")})) == "flash-attention"
    assert claims_for({"attention": ("sdpa", "triton")}) == []
    assert claims_for({"weights": ("int8", "int4")}) == []
    assert claims_for({"token_budget": (256, 512)}) == []
    assert claims_for({"speculation": ("off", "ngram")})[0].high == 3.0
    both = claims_for({"weights": ("model", "int4"), "batching": ("static", "continuous")})
    assert both[-1].name == "together"
    opposed = claims_for({"weights": ("model", "int4"), "batching": ("continuous", "static")})
    assert "together" not in [claim.name for claim in opposed]


@pytest.mark.parametrize(
    ("factor", "noise", "status"),
    [
        (2.5, 0.01, "confirmed"),
        (1.3, 0.01, "below"),
        (7.0, 0.01, "above"),
        (0.8, 0.01, "opposite"),
        (1.0, 0.01, "none"),
        (1.6, 0.8, "none"),
    ],
)
def test_a_claim_is_held_against_the_measured_interval(factor, noise, status):
    claim = next(claim for claim in CLAIMS if claim.name == "continuous-batching")
    wobble = [1 + noise, 1 - noise, 1.0, 1 + noise / 2, 1 - noise / 2]
    measured = compare_values(A, [factor * a * w for a, w in zip(A, wobble, strict=True)], "output_tokens_s")
    verdict = judge_claim(claim, measured)
    assert verdict.status == status
    assert "claimed 2–5×" in verdict.text


def test_a_claim_cannot_be_judged_by_one_repeat_or_another_metric():
    claim = CLAIMS[0]
    assert judge_claim(claim, compare_values([1.0], [2.0], claim.metric)).status == "unmeasured"
    with pytest.raises(ValueError, match="not ttft_ms_mean"):
        judge_claim(claim, compare_values(A, A, "ttft_ms_mean"))
