"""The admin face: token, configuration, series, loading, measured runs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.config import EngineConfig
from engine.measure.results import from_json
from engine.worker.client import EngineClient, EngineUnreachableError, WorkerError
from tests.server.conftest import ServedApp, wait_until

TINY_WORKLOAD = {
    "name": "tiny",
    "description": "for tests",
    "num_requests": 4,
    "prompt_tokens": {"kind": "fixed", "minimum": 8, "maximum": 8},
    "output_tokens": {"kind": "fixed", "minimum": 6, "maximum": 6},
}


@pytest.fixture
def server(served: Any) -> Any:
    return served


def wait_for(client: EngineClient, job_id: str, timeout: float = 60) -> dict[str, Any]:
    deadline = time.monotonic() + timeout
    while (job := client.run_status(job_id))["status"] == "running":
        assert time.monotonic() < deadline, job["progress"]
        time.sleep(0.05)
    return job


@pytest.mark.parametrize(("headers", "status"), [({}, 401), ({"Authorization": "Bearer wrong"}, 403)])
def test_admin_routes_need_the_token(server: Any, headers: dict[str, str], status: int):
    for method, path in (("GET", "/admin/status"), ("PATCH", "/admin/config"), ("POST", "/admin/shutdown")):
        response = httpx.request(method, server.url + path, headers=headers, json={}, trust_env=False)
        assert response.status_code == status
        assert response.json()["error"]["remedy"]


def test_status_has_worker_engine_and_telemetry(server: Any):
    status = server.client.status()
    assert status["worker"]["pid"] > 0
    assert status["engine"]["num_blocks"] == len(status["engine"]["blocks"])
    assert status["telemetry"]


def test_status_numbers_the_newest_step_and_event_as_the_series_do(server: Any):
    server.client.complete([1, 2, 3], max_tokens=2)
    worker, series = server.client.status()["worker"], server.client.series()
    assert worker["last_step"] == series["last_step"] == series["steps"][-1]["index"]
    assert worker["last_event"] == series["last_event"] == series["events"][-1]["index"]
    assert worker["last_event_unix_s"] == series["events"][-1]["time_unix_s"]


def test_config_carries_every_knob_and_can_be_changed(server: Any):
    document = server.client.config()
    assert document["config"].keys() == {knob["name"] for knob in document["knobs"]}
    result = server.client.patch_config({"batching": "static"})
    assert result.changed == {"batching": ("continuous", "static")}
    assert server.client.config()["config"]["batching"] == "static"
    server.client.patch_config({"batching": "continuous"})


def test_reset_forgets_the_prefixes_and_is_in_the_event_log(server: Any):
    prompt = list(range(40))
    cached = [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in _complete_twice(server, prompt)]
    assert cached[1] == 39
    assert server.client.reset_prefix_cache() >= 10
    assert server.client.status()["engine"]["blocks"].count("c") == 0
    assert server.client.series()["events"][-1]["kind"] == "cache"
    assert next(iter(_complete_twice(server, prompt)))["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def _complete_twice(server: Any, prompt: list[int]) -> list[dict[str, Any]]:
    return [server.client.complete(prompt, max_tokens=2, temperature=0, ignore_eos=True) for _ in range(2)]


@pytest.mark.parametrize(
    ("changes", "field"),
    [({"nonsense": 1}, "nonsense"), ({"token_budget": -4}, "token_budget"), ({"dtype": "float16"}, "dtype")],
)
def test_bad_change_is_refused_by_name_and_nothing_changes(server: Any, changes: dict[str, Any], field: str):
    before = server.client.config()["hash"]
    with pytest.raises(WorkerError) as problem:
        server.client.patch_config(changes)
    assert (problem.value.status_code, problem.value.field) == (400, field)
    assert problem.value.remedy
    assert server.client.config()["hash"] == before


def test_series_brings_only_what_is_new(server: Any):
    server.client.complete([1, 2, 3], max_tokens=5, temperature=0, ignore_eos=True)
    everything = server.client.series()
    assert everything["steps"][-1]["index"] == everything["last_step"]
    nothing = server.client.series(steps_since=everything["last_step"], events_since=everything["last_event"])
    assert (nothing["steps"], nothing["events"]) == ([], [])
    assert nothing["last_step"] == everything["last_step"]


def test_run_is_measured_and_its_record_is_complete(server: Any):
    started = server.client.start_run({"workload": TINY_WORKLOAD, "label": "a run", "changes": {"batching": "static"}})
    job = wait_for(server.client, started["job_id"])
    assert job["status"] == "completed", job["error"]
    result = from_json(job["results"][0])
    assert result.run_id == started["run_ids"][0]
    assert result.provenance.config["batching"] == "static"
    assert len(result.requests) == 4
    assert all(request.output_tokens == 6 for request in result.requests)
    assert server.client.config()["config"]["batching"] == "continuous", "the knobs in force before are restored"


def test_comparison_runs_both_arms(server: Any):
    comparison = {"arm_a": {"batching": "static"}, "arm_b": {"batching": "continuous"}, "repeats": 2}
    started = server.client.start_run({"workload": TINY_WORKLOAD, "comparison": comparison})
    job = wait_for(server.client, started["job_id"])
    assert job["status"] == "completed", job["error"]
    assert sorted(result["arm"] for result in job["results"]) == ["A", "A", "B", "B"]


def test_second_run_at_once_is_refused_and_the_first_can_be_cancelled(server: Any):
    long = {**TINY_WORKLOAD, "num_requests": 200, "output_tokens": {"kind": "fixed", "minimum": 400, "maximum": 400}}
    started = server.client.start_run({"workload": long})
    with pytest.raises(WorkerError, match="in progress") as problem:
        server.client.start_run({"workload": TINY_WORKLOAD})
    assert problem.value.status_code == 409
    server.client.cancel_run(started["job_id"])
    job = wait_for(server.client, started["job_id"])
    assert job["status"] == "cancelled"
    wait_until(server.idle)


@pytest.mark.parametrize(
    "body",
    [
        {"workload": "no-such"},
        {"workload": TINY_WORKLOAD, "changes": {"weights": "int3"}},
        {"workload": {**TINY_WORKLOAD, "num_requests": -1}},
        {"workload": TINY_WORKLOAD, "nonsense": 1},
    ],
)
def test_run_that_cannot_be_run_is_refused_with_the_remedy(server: Any, body: dict[str, Any]):
    with pytest.raises(WorkerError) as problem:
        server.client.start_run(body)
    assert problem.value.status_code == 400
    assert problem.value.field
    assert problem.value.remedy


def test_unknown_job_is_404(server: Any):
    with pytest.raises(WorkerError) as problem:
        server.client.run_status("nope")
    assert problem.value.status_code == 404


def test_load_of_an_unknown_model_leaves_the_former_one_serving(server: Any, tiny_llama: Path):
    server.client.load({"model": "/no/such/folder"})
    deadline = time.monotonic() + 20
    while not (health := server.client.health())["error"]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert health["status"] == "ready"
    assert health["error"]["remedy"]
    assert server.client.complete([1, 2], max_tokens=2)["choices"]


def test_reload_with_another_envelope_takes_effect(server: Any, tiny_llama: Path):
    knobs = {
        "model": str(tiny_llama),
        "dtype": "float32",
        "block_size": 8,
        "memory_limit_gib": 0.25,
        "max_num_seqs": 16,
    }
    server.client.load(knobs)
    deadline = time.monotonic() + 30
    while True:
        health = server.client.health()
        engine = server.client.status()["engine"]
        if health["status"] == "ready" and engine and engine["block_size"] == 8:
            break
        assert time.monotonic() < deadline, health
        time.sleep(0.05)
    assert server.client.complete([1, 2], max_tokens=2)["choices"]


def test_before_a_model_is_loaded_requests_get_503_and_health_tells_the_stage():
    running = ServedApp(None)
    try:
        assert running.client.health()["status"] == "loading"
        response = httpx.post(running.url + "/v1/completions", json={"prompt": "x"}, trust_env=False)
        assert response.status_code == 503
        assert running.client.status()["engine"] is None
    finally:
        running.close()


def test_failed_first_load_is_reported_with_the_remedy():
    running = ServedApp(EngineConfig.from_mapping({"model": "/no/such/folder"}))
    try:
        deadline = time.monotonic() + 20
        while (health := running.client.health())["status"] == "loading":
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert health["status"] == "failed"
        assert health["error"]["field"] == "model"
    finally:
        running.close()


def test_client_says_that_nobody_answers():
    with pytest.raises(EngineUnreachableError) as problem:
        EngineClient("http://127.0.0.1:9", "x").status()
    assert problem.value.remedy
