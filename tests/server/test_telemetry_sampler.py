"""The sampler: a bounded ring, a cursor, a thread that goes on; and its faces, the admin API and /metrics."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.measure.results import from_json
from engine.server.run import serve
from engine.telemetry.sampler import INTERVAL_VARIABLE, TelemetrySampler, interval_from_environment
from tests.server.conftest import ServedApp, wait_until
from tests.server.fake_nvml import GPU_IS_LOST, FakeNvml, installed, library, uuid
from tests.server.test_worker_process import started

TINY_WORKLOAD = {
    "name": "tiny", "description": "for tests", "num_requests": 2,
    "prompt_tokens": {"kind": "fixed", "minimum": 4, "maximum": 4},
    "output_tokens": {"kind": "fixed", "minimum": 4, "maximum": 4},
}  # fmt: skip


@pytest.fixture
def nvml() -> Iterator[FakeNvml]:
    with installed() as fake:
        yield fake


def test_ring_is_bounded_and_the_cursor_brings_only_what_is_new():
    sampler = TelemetrySampler(60.0)  # keeps a quarter of an hour: 15 samples
    for _ in range(20):
        sampler.take()
    kept = [entry.index for entry in sampler.since(0)]
    assert kept == list(range(5, 20))
    assert [entry.index for entry in sampler.since(18)] == [18, 19]
    assert sampler.since(20) == []
    assert sampler.last_index == 19


def test_thread_takes_a_sample_each_interval_until_it_is_closed():
    sampler = TelemetrySampler(0.05)
    sampler.start()
    wait_until(lambda: sampler.last_index >= 4)
    times = [entry.perf_s for entry in sampler.since(0)]
    assert all(later - earlier >= 0.045 for earlier, later in itertools.pairwise(times))
    sampler.close()
    last = sampler.last_index
    time.sleep(0.15)
    assert sampler.last_index == last


def test_newest_sample_is_there_before_the_thread_has_taken_one():
    assert TelemetrySampler().latest().index == 0


def test_thread_outlives_a_sample_that_fails(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    sampler = TelemetrySampler(0.05)
    sample, calls = sampler._telemetry.sample, []

    def fail_twice() -> Any:
        calls.append(1)
        if len(calls) <= 2:
            raise OSError("/proc is not there")
        return sample()

    monkeypatch.setattr(sampler._telemetry, "sample", fail_twice)
    sampler.start()
    wait_until(lambda: sampler.last_index >= 0)
    sampler.close()
    assert caplog.text.count("could not be read") == 1, "said once, not at every interval"


@pytest.mark.parametrize("interval_s", [0.0, -1.0, 0.01, 61.0, float("nan")])
def test_interval_outside_of_its_bounds_is_refused_with_the_remedy(interval_s: float):
    with pytest.raises(ConfigError) as problem:
        TelemetrySampler(interval_s)
    assert problem.value.field == INTERVAL_VARIABLE
    assert "0.05 to 60" in problem.value.remedy


def test_interval_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch, tiny_config: EngineConfig):
    monkeypatch.delenv(INTERVAL_VARIABLE, raising=False)
    assert interval_from_environment() == 0.5
    monkeypatch.setenv(INTERVAL_VARIABLE, "2")
    assert interval_from_environment() == 2.0
    monkeypatch.setenv(INTERVAL_VARIABLE, "often")
    with pytest.raises(ConfigError, match="not a number") as problem:
        serve(tiny_config)
    assert problem.value.field == INTERVAL_VARIABLE


# -- its faces -----------------------------------------------------------------------------------------------


@pytest.fixture
def gpu_worker(nvml: FakeNvml) -> Iterator[ServedApp]:
    """A worker that has loaded no model, on a machine with two GPUs."""
    nvml.set(devices=2)
    nvml.set(1, power_mw=123_400, reasons=0x24)
    app = ServedApp(None)
    yield app
    app.close()


def test_admin_api_brings_the_samples_above_the_cursor(gpu_worker: ServedApp):
    wait_until(lambda: gpu_worker.client.telemetry()["last_index"] >= 1)
    answer = gpu_worker.client.telemetry()
    assert [item["index"] for item in answer["samples"]] == list(range(answer["last_index"] + 1))
    assert answer["interval_s"] == 0.5
    assert answer["samples"][-1]["gpu"][1]["power_w"] == 123.4
    assert answer["samples"][-1]["gpu"][1]["throttle_reasons"] == ["software power cap", "software thermal slowdown"]
    newer = gpu_worker.client.telemetry(since=answer["last_index"] - 1)
    assert newer["samples"][0]["index"] == answer["last_index"]
    assert gpu_worker.client.status()["telemetry"]["gpu"][0]["uuid"] == uuid(0)


def test_worker_whose_driver_is_lost_goes_on_and_says_so(gpu_worker: ServedApp, nvml: FakeNvml):
    nvml.fail("nvmlDeviceGetCount_v2", GPU_IS_LOST)
    wait_until(lambda: gpu_worker.client.status()["telemetry"]["gpu"] is None)
    assert "lost" in gpu_worker.client.status()["telemetry"]["gpu_reason"]
    assert not [name for name in _scrape(gpu_worker) if name.startswith("DCGM")]


def test_admin_telemetry_needs_the_token(gpu_worker: ServedApp):
    assert httpx.get(gpu_worker.url + "/admin/telemetry", trust_env=False).status_code == 401


def test_metrics_carry_the_gpus_under_dcgms_names_and_units(gpu_worker: ServedApp, nvml: FakeNvml):
    gpu_worker.app.state.host._telemetry.engine_gpu = uuid(1)
    nvml.set(0, memory_used=3 * 2**30)
    nvml.fail("nvmlDeviceGetTemperature", 3, device=1)
    gpu_worker.app.state.host._telemetry.take()
    values = _scrape(gpu_worker)
    first = {"gpu": "0", "UUID": uuid(0), "modelName": "NVIDIA H100 80GB HBM3", "engine": "false"}
    second = {**first, "gpu": "1", "UUID": uuid(1), "engine": "true"}
    assert values["DCGM_FI_DEV_POWER_USAGE"] == [(first, 350.5), (second, 123.4)]
    assert values["DCGM_FI_DEV_FB_USED"][0] == (first, 3072.0)
    assert values["DCGM_FI_DEV_GPU_UTIL"][0] == (first, 87.0)
    assert values["DCGM_FI_DEV_SM_CLOCK"][0] == (first, 1980.0)
    assert values["DCGM_FI_DEV_CLOCKS_EVENT_REASONS"] == [(first, 0.0), (second, 36.0)]
    assert values["DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION"][0][1] >= 1_000_000
    assert values["DCGM_FI_DEV_GPU_TEMP"] == [(first, 61.0)], "what cannot be read is left out, not 0"
    assert values["process_resident_memory_bytes"][0][1] > 0


def test_metrics_of_a_machine_without_gpus_have_cpu_and_memory(monkeypatch: pytest.MonkeyPatch, nvml: FakeNvml):
    nvml.set(devices=0)
    app = ServedApp(None)
    try:
        values = _scrape(app)
        assert not [name for name in values if name.startswith("DCGM")]
        total = values["headroom:machine_memory_total_bytes"][0][1]
        assert 0 < values["headroom:machine_memory_available_bytes"][0][1] < total
        assert 0 <= values["headroom:machine_cpu_percent"][0][1] <= 100
        assert values["process_cpu_seconds_total"][0][1] > 0
    finally:
        app.close()


def _scrape(served: ServedApp) -> dict[str, list[tuple[dict[str, str], float]]]:
    text = httpx.get(served.url + "/metrics", trust_env=False).text
    samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for sample in samples:
        found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def test_host_ends_the_sampling_and_tells_which_gpu_the_model_is_on(nvml: FakeNvml, tiny_config: EngineConfig):
    app = ServedApp(tiny_config)
    app.wait_ready()
    telemetry = app.app.state.host._telemetry
    assert telemetry.engine_gpu is None, "the model is on the CPU"
    app.close()
    assert nvml.references == 0
    assert telemetry.latest().sample["process"]["resident_bytes"] > 0


@pytest.mark.slow
def test_real_worker_reads_power_of_gpus_that_it_does_not_use_and_claims_no_energy(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
):
    """The worker as a process, which finds the library by its name as it finds the driver's."""
    monkeypatch.setenv("LD_LIBRARY_PATH", f"{library().parent}:{os.environ.get('LD_LIBRARY_PATH', '')}")
    monkeypatch.setenv("FAKE_NVML", "devices=2 power_mw=71000 1.power_mw=350500 1.reasons=4")
    monkeypatch.setenv(INTERVAL_VARIABLE, "0.1")
    options = ("--model", str(tiny_llama), "--set", "dtype=float32", "--set", "memory_limit_gib=0.25")
    with started(tmp_path, *options) as worker:
        client = worker.ready()
        wait_until(lambda: client.telemetry()["last_index"] >= 3)
        answer = client.telemetry()
        assert answer["interval_s"] == 0.1
        assert [gpu["power_w"] for gpu in answer["samples"][-1]["gpu"]] == [71.0, 350.5]
        assert answer["samples"][-1]["gpu"][1]["throttle_reasons"] == ["software power cap"]
        energy = [sample["gpu"][0]["energy_mj"] for sample in answer["samples"]]
        assert energy == sorted(energy)
        assert energy[-1] > energy[0]
        job = client.start_run({"workload": TINY_WORKLOAD})
        wait_until(lambda: client.run_status(job["job_id"])["status"] != "running")
        result = from_json(client.run_status(job["job_id"])["results"][0])
        assert result.status == "completed"
        assert result.metrics["energy_j"] is None
        assert "the model is not on a GPU" in result.events[-1].summary
