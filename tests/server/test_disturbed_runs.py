"""A run on record had the engine to itself, or says that it had not."""

from __future__ import annotations

import time
from typing import Any

import pytest

from engine.measure.results import RunResult, from_json
from engine.worker.client import RunInProgressError
from tests.server.conftest import ServedApp, slowed, wait_until

pytestmark = pytest.mark.slow

WORKLOAD = {
    "name": "tiny",
    "num_requests": 8,
    "prompt_tokens": 12,
    "output_tokens": 15,
    "warmup_requests": 0,
    "arrival": {"kind": "closed-loop", "concurrency": 1},
}
LABEL = "the run to keep"


def start(served: ServedApp, **request: Any) -> str:
    """A run that is under way."""
    job_id = str(served.client.start_run({"workload": WORKLOAD, "label": LABEL, **request})["job_id"])
    wait_until(lambda: served.client.run_status(job_id)["progress"]["done"] >= 1, 120)
    return job_id


def finish(served: ServedApp, job_id: str) -> list[RunResult]:
    """Its records."""
    wait_until(lambda: served.client.run_status(job_id)["status"] != "running", 120)
    job = served.client.run_status(job_id)
    assert job["status"] == "completed", job["error"]
    return [from_json(result) for result in job["results"]]


def test_change_during_a_run_is_refused_naming_the_run_and_the_remedy(served: ServedApp):
    knobs = served.client.config()["config"]
    with slowed(served, 0.03):
        job_id = start(served)
        for change in (
            lambda: served.client.patch_config({"draft_length": 3}),
            lambda: served.client.load(knobs),
            served.client.reset_prefix_cache,
            lambda: served.client.start_run({"workload": WORKLOAD}),
        ):
            with pytest.raises(RunInProgressError) as refused:
                change()
            assert refused.value.status_code == 409
            assert LABEL in refused.value.message
            assert "tiny" in refused.value.message
            assert "of 8 requests" in refused.value.message
            assert refused.value.remedy
        (result,) = finish(served, job_id)
    assert result.disturbed == []
    assert served.client.config()["config"] == knobs
    served.client.patch_config({"draft_length": knobs["draft_length"]})  # afterwards it is nobody's matter


def test_forced_change_marks_the_run(served: ServedApp):
    before = served.client.config()["config"]["draft_length"]
    with slowed(served, 0.03):
        job_id = start(served)
        began = time.time()
        served.client.patch_config({"draft_length": before + 1}, force=True)
        served.client.reset_prefix_cache(force=True)
        (result,) = finish(served, job_id)
    served.client.patch_config({"draft_length": before})
    assert ["draft_length" in item["what"] for item in result.disturbed] == [True, False]
    assert "prefix cache" in result.disturbed[1]["what"]
    assert all(began <= item["time_unix_s"] <= time.time() for item in result.disturbed)


def test_requests_of_others_mark_the_run(served: ServedApp):
    with slowed(served, 0.03):
        job_id = start(served)
        for _ in range(3):
            served.client.complete("hello", max_tokens=1)
        (result,) = finish(served, job_id)
    assert [item["what"] for item in result.disturbed] == ["3 other requests were served during this run"]
    (clean,) = finish(served, start(served))
    assert clean.disturbed == []


def test_arms_of_a_comparison_do_not_disturb_it_and_a_forced_change_marks_what_follows(served: ServedApp):
    arms = {"arm_a": {"batching": "static"}, "arm_b": {"batching": "continuous"}, "repeats": 1}
    short = {**WORKLOAD, "num_requests": 3, "output_tokens": 8}
    assert [run.disturbed for run in finish(served, start(served, workload=short, comparison=arms))] == [[], []]
    with slowed(served, 0.03):
        job_id = start(served, workload=short, comparison=arms)
        wait_until(lambda: len(served.client.run_status(job_id)["run_ids"]) == 2, 120)
        served.client.patch_config({"draft_length": 7}, force=True)
        first, second = finish(served, job_id)
    served.client.patch_config({"draft_length": 4})
    assert first.disturbed == []
    assert len(second.disturbed) == 1
