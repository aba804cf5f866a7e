"""The driver, on the real stepping loop around a scripted engine."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import pytest

from engine.errors import ConfigError, EngineDeadError, WorkloadError
from engine.measure import METRICS, RunProgress, run_comparison, run_workload
from engine.measure.results import from_json, to_json

BURST = {"base": "quick", "num_requests": 5, "prompt_tokens": 20, "output_tokens": 8}


def test_a_run_measures_every_request_and_records_what_is_needed_to_repeat_it(scripted_loop):
    loop = scripted_loop()
    result = run_workload(loop, BURST, seed=4, label="first", slo={"e2e_ms": 60_000})
    assert (result.status, result.error, result.label) == ("completed", None, "first")
    assert [request.index for request in result.requests] == [0, 1, 2, 3, 4]
    for request in result.requests:
        assert (request.prompt_tokens, request.output_tokens, len(request.itl_ms)) == (20, 8, 7)
        assert request.ttft_ms + sum(request.itl_ms) == pytest.approx(request.e2e_ms, abs=5.0)
    assert result.metrics["requests_completed"] == 5
    assert result.metrics["goodput_requests_s"] == result.metrics["requests_s"]
    assert result.metrics["output_tokens_s"] == pytest.approx(40 / result.duration_s)
    assert result.metrics["weights_bytes"] == 1000
    assert set(result.metrics) == {name for name, info in METRICS.items() if not info.once}
    provenance = result.provenance
    assert (provenance.model, provenance.seed, len(provenance.workload_hash)) == ("scripted", 4, 64)
    assert provenance.workload["slo"]["e2e_ms"] == 60_000
    assert provenance.config_hash == loop.engine.config.hash()
    assert from_json(json.loads(json.dumps(to_json(result)))) == result


def test_a_burst_enters_the_first_step_together(scripted_loop):
    loop = scripted_loop()
    run_workload(loop, {**BURST, "warmup_requests": 0})
    assert loop.engine.batch_sizes == [5] * 8


def test_the_warm_up_is_left_out_of_the_figures_and_its_prefixes_are_forgotten(scripted_loop):
    loop = scripted_loop()
    result = run_workload(loop, {**BURST, "warmup_requests": 3})
    assert len(loop.engine.submitted) == 8
    assert len(result.requests) == 5
    assert loop.engine.prefix_resets == 1
    assert result.provenance.workload["warmup_requests"] == 3


def test_a_closed_loop_never_has_more_requests_in_flight_than_clients(scripted_loop):
    loop = scripted_loop()
    arrival = {"kind": "closed-loop", "concurrency": 2}
    result = run_workload(loop, {**BURST, "arrival": arrival, "warmup_requests": 0})
    assert result.metrics["requests_completed"] == 5
    assert max(loop.engine.batch_sizes) == 2
    assert result.requests[4].arrival_s > result.requests[0].arrival_s


def test_poisson_requests_count_from_when_they_were_due(scripted_loop):
    loop = scripted_loop(step_s=lambda config: 0.02)
    arrival = {"kind": "poisson", "rate_requests_s": 50.0}
    result = run_workload(loop, {**BURST, "arrival": arrival, "warmup_requests": 0}, seed=1)
    arrivals = [request.arrival_s for request in result.requests]
    assert arrivals == sorted(arrivals)
    assert arrivals[-1] > 0
    assert len(set(loop.engine.batch_sizes)) > 1  # they did not come all at once
    assert all(request.ttft_ms > 0 for request in result.requests)


def test_progress_tells_how_many_requests_are_done_and_when_it_will_end(scripted_loop):
    seen: list[RunProgress] = []
    run_workload(scripted_loop(), BURST, progress=seen.append)
    assert seen[0].detail == "warming up"
    assert seen[-1].done == seen[-1].total == 5
    assert seen[-1].eta_s == 0.0
    assert [progress.done for progress in seen] == sorted(progress.done for progress in seen)


def test_cancelling_aborts_what_is_in_flight_and_keeps_what_was_measured(scripted_loop):
    loop = scripted_loop(step_s=lambda config: 0.005)
    cancel = threading.Event()

    def stop_after_two(progress: RunProgress) -> None:
        if progress.done >= 2:
            cancel.set()

    arrival = {"kind": "closed-loop", "concurrency": 2}
    workload = {**BURST, "num_requests": 20, "arrival": arrival, "warmup_requests": 0}
    result = run_workload(loop, workload, cancel=cancel, progress=stop_after_two)
    assert result.status == "cancelled"
    reasons = [request.finish_reason for request in result.requests]
    assert len(reasons) == 20
    assert reasons[:2] == ["length", "length"]
    assert {"length", "unsent"} <= set(reasons) <= {"length", "abort", "unsent"}
    assert result.metrics["requests_unsent"] == reasons.count("unsent") > 10
    assert not loop.engine.has_unfinished()


def test_an_engine_that_dies_leaves_a_failed_run_with_its_partial_requests(scripted_loop, capsys):
    loop = scripted_loop(fail_at_step=4)
    result = run_workload(loop, {**BURST, "warmup_requests": 0})
    assert result.status == "failed"
    assert "out of memory" in (result.error or "")
    assert [request.finish_reason for request in result.requests] == ["error"] * 5
    assert [request.output_tokens for request in result.requests] == [4] * 5
    assert result.metrics["requests_failed"] == 5
    assert result.metrics["output_tokens"] == 20
    with pytest.raises(EngineDeadError):
        run_workload(loop, BURST)


def test_a_refused_request_is_recorded_with_its_reason_and_the_others_are_measured(scripted_loop):
    lengths = {"kind": "uniform", "minimum": 10, "maximum": 30}
    loop = scripted_loop(reject=lambda prompt: len(prompt) > 20)
    result = run_workload(loop, {**BURST, "num_requests": 12, "prompt_tokens": lengths, "warmup_requests": 0}, seed=2)
    refused = [request for request in result.requests if request.prompt_tokens > 20]
    assert 0 < len(refused) < 12
    assert all(request.finish_reason == "error" and "refused" in request.error for request in refused)
    assert result.status == "completed"
    assert f"{len(refused)} of 12 requests failed" in result.error
    assert result.metrics["requests_completed"] == 12 - len(refused)


def test_an_error_in_the_callers_callback_still_gives_back_the_run(scripted_loop):
    loop = scripted_loop(step_s=lambda config: 0.005)

    def broken(progress: RunProgress) -> None:
        if progress.done:
            raise OSError("no space left on device")

    arrival = {"kind": "closed-loop", "concurrency": 1}
    result = run_workload(loop, {**BURST, "arrival": arrival}, progress=broken)
    assert result.status == "failed"
    assert "no space left" in result.error
    assert result.requests[0].finish_reason == "length"


def test_knobs_of_a_run_are_restored_after_it(scripted_loop):
    loop = scripted_loop()
    result = run_workload(loop, BURST, changes={"max_running": 7})
    assert result.provenance.config["max_running"] == 7
    assert loop.engine.config.max_running == 64
    with pytest.raises(ConfigError):
        run_workload(loop, BURST, changes={"max_runing": 7})


def test_a_toggle_during_a_run_is_marked_in_its_record(scripted_loop):
    loop = scripted_loop(step_s=lambda config: 0.01)
    toggled = threading.Event()

    def toggle(progress: RunProgress) -> None:
        if progress.done >= 1 and not toggled.is_set():
            toggled.set()
            loop.reconfigure({"prefix_cache": False})

    arrival = {"kind": "closed-loop", "concurrency": 1}
    result = run_workload(loop, {**BURST, "arrival": arrival}, progress=toggle)
    marks = [event for event in result.events if event.kind == "reconfigure"]
    assert [mark.summary for mark in marks] == ["changed prefix_cache"]
    assert 0 < marks[0].t_s < result.duration_s


def test_samples_follow_the_engine_through_the_run(scripted_loop):
    loop = scripted_loop(step_s=lambda config: 0.02)
    result = run_workload(loop, {**BURST, "output_tokens": 40, "warmup_requests": 0})
    assert len(result.samples) >= 3
    moments = [sample.t_s for sample in result.samples]
    assert moments == sorted(moments)
    assert max(sample.running for sample in result.samples) == 5
    assert result.metrics["step_ms_mean"] == pytest.approx(20.0)
    assert result.metrics["running_mean"] == 5 * 39 / 40  # after the last step nobody runs
    seconds = [later - earlier for earlier, later in zip([0.0, *moments], moments, strict=False)]
    counted = sum(sample.output_tokens_s * span for sample, span in zip(result.samples, seconds, strict=True))
    assert counted == pytest.approx(5 * 40, abs=1.0)


def test_other_clients_in_flight_at_the_start_are_on_record(scripted_loop):
    from engine.sampling.params import SamplingParams

    loop = scripted_loop(step_s=lambda config: 0.002)
    loop.submit([5] * 10, SamplingParams(max_tokens=400), on_output=lambda output: None)
    result = run_workload(loop, {**BURST, "warmup_requests": 0})
    assert any(event.detail.get("other_requests") == 1 for event in result.events)


def test_a_workload_that_cannot_fit_is_refused_before_anything_runs(scripted_loop):
    loop = scripted_loop()
    with pytest.raises(WorkloadError) as caught:
        run_workload(loop, {**BURST, "prompt_tokens": 2045})
    assert "2053" in caught.value.message
    assert "2048" in caught.value.message
    assert loop.engine.submitted == []


def slower_without_prefix_cache(config: Any) -> float:
    return 0.003 if config.prefix_cache else 0.009


def test_a_comparison_sends_both_arms_the_same_requests_in_a_balanced_order(scripted_loop):
    loop = scripted_loop(step_s=slower_without_prefix_cache)
    comparison = run_comparison(loop, BURST, {"prefix_cache": False}, {}, repeats=4, seed=3)
    assert comparison.status == "completed"
    assert len(comparison.runs) == 8
    order = [(run.repeat, run.arm) for run in comparison.runs]
    assert [repeat for repeat, _ in order] == [0, 0, 1, 1, 2, 2, 3, 3]
    for first in (0, 4):  # mirrored: what drifts falls on both arms
        arms = [arm for _, arm in order[first : first + 4]]
        assert arms in (["A", "B", "B", "A"], ["B", "A", "A", "B"])
    hashes = [[run.provenance.workload_hash for run in comparison.arm(arm)] for arm in ("A", "B")]
    assert hashes[0] == hashes[1]
    assert len(set(hashes[0])) == 4
    assert {run.comparison_id for run in comparison.runs} == {comparison.comparison_id}
    assert [run.provenance.config["prefix_cache"] for run in comparison.arm("A")] == [False] * 4
    assert [run.provenance.config["prefix_cache"] for run in comparison.arm("B")] == [True] * 4
    assert loop.engine.prefix_resets == 8
    assert loop.engine.config.prefix_cache is True


@pytest.mark.slow
def test_a_comparison_finds_the_arm_that_is_really_faster(scripted_loop):
    from engine.measure import compare

    loop = scripted_loop(step_s=lambda config: 5 * slower_without_prefix_cache(config))
    comparison = run_comparison(loop, BURST, {"prefix_cache": False}, {"prefix_cache": True}, repeats=5)
    result = compare(comparison.arm("A"), comparison.arm("B"), "output_tokens_s")
    assert result.better == "B"
    assert 1.3 < result.ratio < 3.2  # 45 ms a step against 15 ms, and what a busy machine adds to both
    assert result.paired


def test_every_finished_run_of_a_comparison_is_handed_out_even_if_the_engine_dies_later(scripted_loop, capsys):
    loop = scripted_loop(fail_at_step=25)
    handed: list[Any] = []
    workload = {**BURST, "warmup_requests": 0}
    comparison = run_comparison(loop, workload, {}, {"prefix_cache": False}, repeats=5, on_run=handed.append)
    assert comparison.status == "failed"
    assert "out of memory" in comparison.error
    assert handed == comparison.runs
    assert [run.status for run in handed] == ["completed"] * 3 + ["failed"]


def test_a_recorder_that_fails_ends_the_comparison_without_losing_its_runs(scripted_loop):
    loop = scripted_loop()

    def full_disk(run: Any) -> None:
        raise OSError("no space left on device")

    comparison = run_comparison(loop, BURST, {"max_running": 3}, {}, repeats=3, on_run=full_disk)
    assert comparison.status == "failed"
    assert "no space left" in comparison.error
    assert len(comparison.runs) == 1
    assert loop.engine.config.max_running == 64


def test_cancelling_a_comparison_keeps_the_runs_done_and_restores_the_knobs(scripted_loop):
    loop = scripted_loop()
    cancel = threading.Event()
    comparison = run_comparison(
        loop,
        BURST,
        {"max_running": 3},
        {"max_running": 4},
        repeats=5,
        cancel=cancel,
        on_run=lambda run: cancel.set() if run.repeat == 1 else None,
    )
    assert comparison.status == "cancelled"
    assert [run.status for run in comparison.runs] == ["completed"] * 3 + ["cancelled"]
    assert loop.engine.config.max_running == 64


def test_progress_of_a_comparison_counts_all_its_runs(scripted_loop):
    seen: list[RunProgress] = []
    run_comparison(scripted_loop(), BURST, {}, {"max_running": 2}, repeats=2, progress=seen.append)
    assert {progress.total for progress in seen} == {20}
    assert seen[-1].done == 20
    assert "repeat 2 of 2" in seen[-1].detail


def test_a_lossy_comparison_has_its_quality_beside_its_speed(scripted_loop):
    from engine.measure import compare

    loop = scripted_loop()
    comparison = run_comparison(loop, BURST, {"weights": "model"}, {"weights": "int4"}, repeats=2)
    assert {run.metrics["kl_mean_nats"] for run in comparison.arm("A")} == {0.0}
    assert all(run.metrics["same_top_percent"] < 100 for run in comparison.arm("B"))
    assert "tokens of the bundled corpus, window 256, stride 128" in comparison.runs[0].events[0].summary
    row = compare(comparison.arm("A"), comparison.arm("B"), "perplexity")
    assert row.ratio != 1.0
    assert row.better is row.ci_low is None  # two equal repeats are no proof of certainty
    assert row.verdict.endswith("measured once on one text.")
    assert loop.engine.config.weights == "model"


def test_a_lossless_comparison_spends_no_time_on_quality(scripted_loop):
    comparison = run_comparison(scripted_loop(), BURST, {"batching": "static"}, {}, repeats=1)
    assert all("perplexity" not in run.metrics for run in comparison.runs)


@pytest.mark.parametrize(
    ("arm", "field"),
    [({"batchin": "static"}, "batchin"), ({"block_size": 32}, "block_size"), ({"max_running": 0}, "max_running")],
)
def test_an_impossible_arm_is_refused_before_anything_runs(scripted_loop, arm, field):
    loop = scripted_loop()
    with pytest.raises(ConfigError) as caught:
        run_comparison(loop, BURST, {}, arm, repeats=2)
    assert caught.value.field == field
    assert loop.engine.submitted == []


def test_waiting_for_a_run_never_blocks_the_engine_for_others(scripted_loop):
    loop = scripted_loop(step_s=lambda config: 0.002)
    thread = threading.Thread(target=run_workload, args=(loop, {**BURST, "output_tokens": 200}))
    thread.start()
    began = time.perf_counter()
    while thread.is_alive():
        loop.status_now()
    assert time.perf_counter() - began < 20
    thread.join()
