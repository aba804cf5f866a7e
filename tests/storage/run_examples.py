"""Runs as an engine on two CPU cores would record them, generated: for tests of the record and of the History page."""

from __future__ import annotations

import dataclasses
import hashlib
import random
from typing import Any

from engine.config import EngineConfig
from engine.measure.metrics import summarize
from engine.measure.results import EventRecord, Provenance, RequestRecord, RunResult, SampleRecord

WORKLOADS: dict[str, dict[str, Any]] = {
    "chat": {"name": "chat", "num_requests": 24, "rate_per_s": 4.0, "prompt_tokens": [32, 256], "output_tokens": 48},
    "summarize": {"name": "summarize", "num_requests": 12, "rate_per_s": 1.5, "prompt_tokens": [400, 900]},
}


def make_run(
    seed: int = 0, *, workload: str = "chat", changes: dict[str, Any] | None = None, **fields: Any
) -> RunResult:
    """A run whose parts agree with each other. ``fields`` replace those of the result."""
    rng = random.Random(seed)
    config = EngineConfig().with_changes(changes or {})
    requests = _requests(rng, WORKLOADS[workload], config)
    duration_s = max(request.arrival_s + (request.e2e_ms or 0) / 1e3 for request in requests)
    samples = _samples(rng, requests, duration_s)
    result = RunResult(
        run_id=hashlib.md5(f"run {seed}".encode()).hexdigest(),
        kind="bench",
        status="completed",
        label="",
        started_unix_s=1_790_000_000.0 + 3_000.0 * seed + rng.random(),
        duration_s=duration_s,
        provenance=_provenance(config, WORKLOADS[workload], seed),
        metrics=summarize(requests, duration_s),
        requests=requests,
        samples=samples,
        events=[EventRecord(0.0, "run", f"workload {workload} started", {"requests": len(requests)})],
    )
    return dataclasses.replace(result, **fields)


def failed_run(seed: int = 0, **fields: Any) -> RunResult:
    """A run that ended before its first request did."""
    changes = {"status": "failed", "error": "The engine worker exited with signal SIGKILL.", "duration_s": 0.0}
    empty = {"metrics": {}, "requests": [], "samples": [], "events": []}
    return make_run(seed, **(changes | empty | fields))


def with_gpu_samples(run: RunResult) -> RunResult:
    """The same run on a GPU whose power was read, with its energy."""
    samples = [
        dataclasses.replace(
            sample,
            gpu_power_w=300.0 + number,
            gpu_utilization_percent=90.0,
            gpu_memory_bytes=5 * 2**30,
            gpu_sm_clock_mhz=1980,
        )
        for number, sample in enumerate(run.samples)
    ]
    energy_j, tokens = 320.0 * run.duration_s, run.metrics["output_tokens"] or 1.0
    metrics = {
        "energy_j": energy_j,
        "power_w_mean": 320.0,
        "power_w_peak": 349.5,
        "idle_power_w": 70.0,
        "energy_per_output_token_j": energy_j / tokens,
        "net_energy_per_output_token_j": energy_j / tokens * 250 / 320,
        "gpu_utilization_percent_mean": 90.0,
        "gpu_memory_bytes_peak": 5.0 * 2**30,
        "throttled_percent": 25.0,
    }
    summary = (
        f"energy: {energy_j:,.1f} J in {run.duration_s:.2f} s on GPU 0 (NVIDIA H100), by its energy counter; idle "
        "power 70.0 W, measured for 2.0 s before the run; clocks held back by software power cap (25 %) of the samples"
    )
    detail = {
        "reason": None,
        "gpu": {"index": 0, "name": "NVIDIA H100"},
        "throttle_reasons": {"software power cap": 0.25},
    }
    events = [*run.events, EventRecord(0.0, "energy", summary, detail)]
    return dataclasses.replace(run, samples=samples, metrics={**run.metrics, **metrics}, events=events)


def make_comparison(seed: int, changes: dict[str, Any], repeats: int = 3) -> list[RunResult]:
    """Interleaved runs of the default setting (A) and of ``changes`` (B)."""
    comparison_id = hashlib.md5(f"comparison {seed}".encode()).hexdigest()
    filing = {"kind": "compare", "comparison_id": comparison_id, "label": "two settings"}
    runs = []
    for repeat in range(repeats):
        for number, arm in enumerate("AB"):
            arm_changes = changes if arm == "B" else None
            run = make_run(seed + 2 * repeat + number, changes=arm_changes, arm=arm, repeat=repeat, **filing)
            same = {"seed": repeat, "workload_hash": hashlib.sha256(f"requests {repeat}".encode()).hexdigest()}
            runs.append(dataclasses.replace(run, provenance=dataclasses.replace(run.provenance, **same)))
    return runs


def _requests(rng: random.Random, workload: dict[str, Any], config: EngineConfig) -> list[RequestRecord]:
    step_ms = {"model": 31.0, "int8": 24.0, "int4": 15.0}[config.weights] * (1.6 if config.batching == "static" else 1)
    arrival, records = 0.0, []
    for index in range(workload["num_requests"]):
        arrival += rng.expovariate(workload["rate_per_s"])
        prompt = rng.randint(*workload["prompt_tokens"])
        output = rng.randint(2, workload.get("output_tokens", 32))
        records.append(_request(rng, index, arrival, prompt, output, step_ms, config.speculation == "ngram"))
    return records


def _request(
    rng: random.Random, index: int, arrival_s: float, prompt: int, output: int, step_ms: float, speculates: bool
) -> RequestRecord:
    ttft = prompt * 0.9 + step_ms + rng.expovariate(1 / 40.0)
    gaps = [0.0 if speculates and rng.random() < 0.4 else rng.gauss(step_ms, step_ms / 9) for _ in range(output - 1)]
    gaps = [abs(gap) for gap in gaps]
    drafted = output if speculates else 0
    return RequestRecord(
        index=index,
        arrival_s=arrival_s,
        prompt_tokens=prompt,
        output_tokens=output,
        cached_tokens=16 * rng.randint(0, prompt // 32),
        ttft_ms=ttft,
        tpot_ms=sum(gaps) / len(gaps) if gaps else None,
        e2e_ms=ttft + sum(gaps),
        itl_ms=gaps,
        finish_reason="stop" if rng.random() < 0.3 else "length",
        preemptions=int(rng.random() < 0.05),
        draft_tokens=drafted,
        accepted_tokens=gaps.count(0.0) if speculates else 0,
    )


def _samples(rng: random.Random, requests: list[RequestRecord], duration_s: float) -> list[SampleRecord]:
    times = {request.index: _token_times(request) for request in requests}
    samples, period = [], 0.25
    for number in range(1, int(duration_s / period) + 2):
        end = number * period
        output = sum(end - period < t <= end for token_times in times.values() for t in token_times) / period
        running = [r for r in requests if r.arrival_s <= end < r.arrival_s + (r.e2e_ms or 0) / 1e3]
        waiting = [r for r in running if times[r.index] and times[r.index][0] > end]
        blocks = sum(-(-(r.prompt_tokens + sum(t <= end for t in times[r.index])) // 16) for r in running)
        samples.append(
            SampleRecord(
                t_s=end,
                output_tokens_s=output,
                total_tokens_s=output * 3.2,
                running=len(running) - len(waiting),
                waiting=len(waiting),
                kv_blocks_used=blocks,
                kv_blocks_cached=min(4 * number, 400),
                step_ms=rng.gauss(28, 3) if running else None,
                resident_bytes=900_000_000 + 20_000 * number,
            )
        )
    return samples


def _token_times(request: RequestRecord) -> list[float]:
    time, times = request.arrival_s + (request.ttft_ms or 0) / 1e3, []
    for gap in (0.0, *request.itl_ms):
        time += gap / 1e3
        times.append(time)
    return times


def _provenance(config: EngineConfig, workload: dict[str, Any], seed: int) -> Provenance:
    return Provenance(
        model="smollm2-135m",
        model_fingerprint=hashlib.sha256(b"SmolLM2-135M-Instruct.Q4_1.gguf").hexdigest(),
        config=config.to_dict(),
        config_hash=config.hash(),
        workload=workload,
        workload_hash=hashlib.sha256(f"{workload} {seed % 2}".encode()).hexdigest(),
        seed=seed % 2,
        versions={"headroom": "0.1.0", "python": "3.11.7", "torch": "2.13.0+cpu", "transformers": "5.23.0"},
        hardware={
            "cpu": "AVX-512 server core",
            "cores": 2,
            "memory_bytes": 16_000_000_000,
            "gpu": None,
            "host": "1f0c",
        },
        code_revision="b930249d1c2ab7f0a85d3c9e4f6b7a8c9d0e1f2a",
        code_dirty=seed % 3 == 0,
        path={
            "device": "cpu",
            "dtype": "bfloat16",
            "attention": "sdpa",
            "weights": config.weights,
            "execution": "eager",
        },
    )
