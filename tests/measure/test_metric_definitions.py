"""Metrics against numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import WorkloadError
from engine.measure.metrics import METRICS, Slo, percentile, summarize


@pytest.fixture
def two_requests(make_request):
    """0 ms: A arrives; tokens at 100, 120, 160. 50 ms: B arrives; tokens at 250, 260. The run lasts 0.26 s."""
    a = make_request(ttft_ms=100.0, tpot_ms=30.0, e2e_ms=160.0, itl_ms=[20.0, 40.0], prompt_tokens=10)
    b = make_request(
        index=1,
        ttft_ms=200.0,
        tpot_ms=10.0,
        e2e_ms=210.0,
        itl_ms=[10.0],
        output_tokens=2,
        prompt_tokens=30,
        cached_tokens=16,
        preemptions=1,
    )
    return [a, b]


def test_latencies_and_rates_are_those_worked_out_by_hand(two_requests):
    metrics = summarize(two_requests, 0.26)
    expected = {
        "ttft_ms_mean": 150.0,
        "ttft_ms_p50": 150.0,
        "ttft_ms_p90": 190.0,
        "itl_ms_mean": 70 / 3,  # pooled: 20, 40, 10
        "itl_ms_p50": 20.0,
        "tpot_ms_mean": 20.0,  # of the requests: 30 and 10
        "e2e_ms_p99": 160.0 + 0.99 * 50.0,
        "output_tokens_s": 5 / 0.26,
        "total_tokens_s": 45 / 0.26,
        "requests_s": 2 / 0.26,
        "prefix_hit_rate": 16 / 40,
        "preemptions": 1.0,
        "requests_completed": 2.0,
        "duration_s": 0.26,
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)


def test_every_metric_of_a_summary_is_defined_and_named_with_its_unit(two_requests):
    for name in summarize(two_requests, 1.0):
        assert name in METRICS
        assert METRICS[name].definition.endswith(".")
        if METRICS[name].unit == "ms":
            assert "_ms" in name
        if METRICS[name].unit == "tokens/s":
            assert name.endswith("tokens_s")


def test_goodput_counts_completed_requests_that_meet_every_objective(two_requests, make_request):
    failed = make_request(index=2, finish_reason="error", ttft_ms=1.0, tpot_ms=1.0)
    one_token = make_request(index=3, ttft_ms=10.0, tpot_ms=None, itl_ms=[], output_tokens=1)
    requests = [*two_requests, failed, one_token]
    metrics = summarize(requests, 2.0, {"ttft_ms": 150, "tpot_ms": 30})
    assert metrics["goodput_requests_s"] == 1.0  # A (30 is within 30) and the single token, in 2 s
    assert metrics["slo_attainment"] == 0.5
    assert summarize(requests, 2.0)["goodput_requests_s"] is None


def test_failed_aborted_and_unsent_requests_are_counted_but_do_not_enter_latencies(make_request):
    requests = [
        make_request(),
        make_request(finish_reason="error", ttft_ms=9e9, e2e_ms=9e9, error="boom"),
        make_request(finish_reason="abort", ttft_ms=9e9, e2e_ms=None),
        make_request(finish_reason="unsent", output_tokens=0, ttft_ms=None, tpot_ms=None, e2e_ms=None, itl_ms=[]),
    ]
    metrics = summarize(requests, 1.0)
    counts = {name: metrics[name] for name in metrics if name.startswith("requests_") and name != "requests_s"}
    assert counts == {
        "requests_completed": 1.0,
        "requests_failed": 1.0,
        "requests_aborted": 1.0,
        "requests_unsent": 1.0,
    }
    assert metrics["requests"] == 4.0
    assert metrics["ttft_ms_p99"] == 100.0
    assert metrics["output_tokens_s"] == 9.0  # what was delivered counts, whatever came after
    assert metrics["total_tokens_s"] == 39.0  # the unsent request's prompt was never processed


def test_mean_accepted_length_counts_the_bonus_token(make_request):
    # passes after the first token: 3 tokens (2 accepted + bonus), 1 token, 2 tokens (1 accepted + bonus)
    request = make_request(output_tokens=7, itl_ms=[30.0, 0.0, 0.0, 30.0, 30.0, 0.0], draft_tokens=6, accepted_tokens=3)
    metrics = summarize([request], 1.0)
    assert metrics["mean_accepted_length"] == 2.0
    assert metrics["acceptance_rate"] == 0.5


def test_nothing_measured_is_none_and_never_zero(make_request):
    metrics = summarize([], 0.0)
    assert metrics["ttft_ms_mean"] is None
    assert metrics["output_tokens_s"] is None
    assert metrics["prefix_hit_rate"] is None
    assert summarize([make_request()], 1.0)["acceptance_rate"] is None
    assert summarize([make_request()], 1.0)["mean_accepted_length"] is None


@settings(deadline=None)  # a shared machine pauses now and then
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=40), st.sampled_from([0, 50, 90, 95, 99, 100]))
def test_percentiles_are_those_of_numpy(values, percent):
    assert percentile(values, percent) == pytest.approx(float(np.percentile(values, percent)), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("bad", [{"ttft": 100}, {"ttft_ms": 0}, {"tpot_ms": "fast"}, {"e2e_ms": float("nan")}])
def test_an_objective_that_makes_no_sense_is_refused_by_name(bad):
    with pytest.raises(WorkloadError) as caught:
        Slo.from_mapping(bad)
    assert caught.value.field == f"slo.{next(iter(bad))}"
    assert caught.value.remedy


@pytest.mark.parametrize("bound", [float("inf"), True, -1.0])
def test_a_bound_that_holds_nothing_back_is_refused(bound):
    with pytest.raises(WorkloadError, match="not a bound on a time"):
        Slo(ttft_ms=bound)


def test_a_bound_may_be_a_part_of_a_millisecond():
    assert Slo.from_mapping({"tpot_ms": 0.25}) == Slo(tpot_ms=0.25)


def test_a_prompt_counts_from_its_first_output_token_on(make_request):
    one_token = make_request(prompt_tokens=8, cached_tokens=4, output_tokens=1, tpot_ms=None, itl_ms=[])
    never_begun = make_request(
        prompt_tokens=100, cached_tokens=0, output_tokens=0, finish_reason="unsent", ttft_ms=None, itl_ms=[]
    )
    metrics = summarize([one_token, never_begun], 1.0)
    assert (metrics["prompt_tokens"], metrics["prefix_hit_rate"]) == (8.0, 0.5)
    assert (metrics["output_tokens"], metrics["total_tokens_s"]) == (1.0, 9.0)


def test_every_gap_above_zero_begins_a_pass_however_short_it_is(make_request):
    request = make_request(output_tokens=6, itl_ms=[30.0, 0.0, 0.0, 0.0, 0.25], draft_tokens=1, accepted_tokens=1)
    metrics = summarize([request], 1.0)
    assert metrics["mean_accepted_length"] == 2.5  # five tokens after the first, in two passes
    assert metrics["acceptance_rate"] == 1.0


def test_every_latency_has_its_mean_and_percentiles_by_name_label_and_definition(two_requests):
    measured = {name for name in summarize(two_requests, 1.0) if "_ms_" in name}
    assert {name for name, info in METRICS.items() if info.unit == "ms"} >= measured
    for name, label in (("ttft", "TTFT"), ("itl", "ITL"), ("tpot", "TPOT"), ("e2e", "E2E latency")):
        assert METRICS[f"{name}_ms_mean"].label == f"{label} mean"
        assert METRICS[f"{name}_ms_mean"].definition.startswith("Mean of: ")
        assert METRICS[f"{name}_ms_p99"].label == f"{label} p99"
        assert METRICS[f"{name}_ms_p99"].definition.startswith("99th percentile of: ")
        assert METRICS[f"{name}_ms_p99"].higher_is_better is False
