"""The measurement room on the real engine: a tiny model for what needs many tokens, the default model once."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import EngineConfig
from engine.core import Engine
from engine.measure import compare, measure_quality, run_comparison, run_workload
from engine.worker.loop import EngineLoop


@pytest.fixture
def start_loop() -> Iterator[Callable[..., EngineLoop]]:
    """A function that loads a model and starts its loop."""
    loops: list[EngineLoop] = []

    def start(**knobs: Any) -> EngineLoop:
        loop = EngineLoop(Engine.load(EngineConfig.from_mapping({"dtype": "float32", "device": "cpu", **knobs})))
        loop.start()
        loops.append(loop)
        return loop

    yield start
    for loop in loops:
        loop.stop()


def test_the_prefix_hit_rate_is_what_the_workload_shares(start_loop, tiny_llama: Path):
    loop = start_loop(model=str(tiny_llama))
    workload = {
        "num_requests": 6,
        "arrival": {"kind": "closed-loop", "concurrency": 1},
        "shared_prefix_tokens": 64,
        "prompt_tokens": 16,
        "output_tokens": 4,
    }
    with_cache = run_workload(loop, workload)
    # the first request computes the 64 shared tokens, the five others find them: whole blocks of 16
    assert with_cache.metrics["prefix_hit_rate"] == pytest.approx(5 * 64 / (6 * 80))
    without = run_workload(loop, workload, changes={"prefix_cache": False})
    assert without.metrics["prefix_hit_rate"] == 0.0
    again = run_workload(loop, workload)  # nothing was left over from the first run
    assert again.metrics["prefix_hit_rate"] == with_cache.metrics["prefix_hit_rate"]
    assert again.provenance.workload_hash == with_cache.provenance.workload_hash


def test_speculation_is_measured_by_acceptance_and_accepted_length(start_loop, tiny_llama: Path):
    loop = start_loop(model=str(tiny_llama), speculation="ngram", draft_length=4)
    workload = {"base": "quick", "prompt_source": "extract", "prompt_tokens": 120, "output_tokens": 60}
    metrics = run_workload(loop, workload).metrics
    assert 0 <= metrics["acceptance_rate"] <= 1
    # τ = 1 + accepted tokens per pass: every pass gives one token of its own besides the drafts it accepted
    passes = 6 * 59 / metrics["mean_accepted_length"]
    accepted = metrics["acceptance_rate"] * _drafts(loop)
    assert metrics["mean_accepted_length"] >= 1
    assert passes == pytest.approx(6 * 59 - accepted, abs=6)


def _drafts(loop: EngineLoop) -> int:
    return sum(step.draft_tokens for step in loop.steps.since(0))


def test_a_burst_on_static_batching_is_one_batch(start_loop, tiny_llama: Path):
    loop = start_loop(model=str(tiny_llama), batching="static")
    result = run_workload(loop, {"base": "quick", "num_requests": 8, "warmup_requests": 0})
    assert result.metrics["requests_completed"] == 8
    assert max(step.num_running for step in loop.steps.since(0)) == 8
    assert len(loop.steps.since(0)) < 2 * 24


def test_int4_costs_quality_and_the_model_itself_costs_none(start_loop, tiny_llama: Path):
    loop = start_loop(model=str(tiny_llama))
    arguments = {"max_tokens": 96, "window": 48, "stride": 24}
    result = measure_quality(loop, {"weights": "int8"}, {"weights": "int4", "group_size": "32"}, **arguments)
    assert result is not None
    assert result.reference.kl_max == 0.0
    assert 0 < result.a.kl_mean < result.b.kl_mean
    assert result.a.same_top_percent >= result.b.same_top_percent
    assert result.a.tokens == 95
    assert "int4" in result.b.path["weights"]
    assert loop.engine.config.weights == "model"
    back = measure_quality(loop, {}, {}, **arguments)
    assert back is not None
    assert back.a.perplexity == result.reference.perplexity  # bit-identical weights came back


def test_cancelling_a_run_frees_its_blocks(start_loop, tiny_llama: Path):
    loop = start_loop(model=str(tiny_llama))
    cancel = threading.Event()
    workload = {"base": "quick", "num_requests": 20, "output_tokens": 400, "warmup_requests": 0}
    result = run_workload(loop, workload, cancel=cancel, progress=lambda progress: cancel.set())
    assert result.status == "cancelled"
    assert {request.finish_reason for request in result.requests} == {"abort"}
    loop.call(lambda engine: engine.check_invariants())
    assert "u" not in loop.status(max_age_s=0).blocks


@pytest.mark.model
def test_quick_on_the_default_model_compares_two_batchings(start_loop, default_gguf: Path):
    loop = start_loop(model="smollm2-135m")
    workload = {"base": "quick", "output_tokens": 12}
    slo = {"ttft_ms": 600_000}
    comparison = run_comparison(loop, workload, {"max_running": 1}, {"max_running": 6}, repeats=2, slo=slo)
    assert comparison.status == "completed"
    for run in comparison.runs:
        assert run.metrics["output_tokens"] == 6 * 12
        assert run.metrics["goodput_requests_s"] == run.metrics["requests_s"]
        assert run.provenance.model_fingerprint
    throughput = compare(comparison.arm("A"), comparison.arm("B"), "output_tokens_s")
    assert throughput.ratio > 1.2  # six sequences share each reading of the weights
    assert compare(comparison.arm("A"), comparison.arm("B"), "running_mean").ratio > 3


@pytest.mark.model
def test_perplexity_of_the_default_model_is_that_of_transformers(start_loop, hf_default_model: Any):
    loop = start_loop(model="smollm2-135m", memory_limit_gib=2.0)
    text = "The ferry left the harbour a little after six, when the light was still grey. " * 2
    token_ids = loop.engine.tokenizer.encode(text, add_special_tokens=False)
    with torch.inference_mode():
        tokens = torch.tensor([token_ids])
        expected = math.exp(hf_default_model(tokens, labels=tokens).loss.item())
    measured = measure_quality(loop, {}, {}, token_ids=token_ids, window=len(token_ids), stride=1)
    assert measured is not None
    assert measured.a.tokens == len(token_ids) - 1
    assert measured.a.perplexity == pytest.approx(expected, rel=1e-4)
