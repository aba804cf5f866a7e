"""A worker and its client that behave like the real ones, without a process or a model, for the tests of the pages."""

from __future__ import annotations

import dataclasses
import math
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from engine import config as engine_config
from engine.config import EngineConfig
from engine.measure.results import Provenance, RequestRecord, RunResult
from engine.outputs import EngineEvent, EngineStatus, MemoryReport, ReconfigureResult, StepStats
from pages.shared.messages import value_text
from storage import StorageError

PAGES = Path(__file__).parents[2] / "pages"

WORKLOADS = [
    {
        "name": "burst",
        "description": "Everything at once.",
        "num_requests": 8,
        "prompt_tokens": {"kind": "fixed", "minimum": 64, "maximum": 64},
        "output_tokens": {"kind": "uniform", "minimum": 16, "maximum": 64},
    },
    {
        "name": "chat",
        "description": "Short prompts, arriving at random.",
        "num_requests": 16,
        "prompt_tokens": {"kind": "fixed", "minimum": 32, "maximum": 32},
        "output_tokens": {"kind": "fixed", "minimum": 48, "maximum": 48},
    },
]


def fake_run(
    run_id: str,
    *,
    arm: str | None = None,
    repeat: int | None = None,
    comparison_id: str | None = None,
    config: EngineConfig | None = None,
    speed: float = 100.0,
) -> RunResult:
    """A complete run record with plausible figures."""
    config = config or EngineConfig()
    provenance = Provenance(
        model="fake-135m",
        model_fingerprint="f" * 64,
        config=config.to_dict(),
        config_hash=config.hash(),
        workload=dict(WORKLOADS[0]),
        workload_hash="w" * 64,
        seed=0,
        versions={"python": "3.11"},
        hardware={"cpu": "test"},
        code_revision="0" * 40,
        code_dirty=False,
        path={"device": "cpu", "dtype": "bfloat16", "weights": config.weights},
    )
    request = RequestRecord(0, 0.0, 64, 32, 0, 120.0, 10.0, 440.0, [10.0] * 31, "length", 0, 0, 0)
    metrics = {
        "output_tokens_s": speed,
        "total_tokens_s": 2 * speed,
        "ttft_ms_p50": 12_000 / speed,
        "tpot_ms_mean": 1000 / speed,
        "itl_ms_p99": 2000 / speed,
        "e2e_ms_p50": 40_000 / speed,
        "e2e_ms_p99": 44_000 / speed,
        "requests_s": speed / 32,
    }
    kind = "compare" if arm else "bench"
    return RunResult(
        run_id, kind, "completed", "burst", time.time(), 2.0, provenance, metrics, [request],
        arm=arm, repeat=repeat, comparison_id=comparison_id,
    )  # fmt: skip


class FakeApiError(Exception):
    """As the client raises for an answer of 4xx."""

    def __init__(self, message: str, *, field: str | None = None, remedy: str | None = None, status_code: int = 400):
        super().__init__(message)
        self.message, self.field, self.remedy, self.status_code = message, field, remedy, status_code


@dataclasses.dataclass
class FakeProcess:
    state: str = "running"
    exit_code: int | None = None
    log: Sequence[str] = ("engine ready",)


class FakeWorker:
    """Stands for the supervisor: alive until :meth:`kill`."""

    def __init__(self, client: FakeClient) -> None:
        self.process = FakeProcess()
        self.client = client
        self.restarts = 0

    def poll(self) -> FakeProcess:
        return self.process

    def kill(self, exit_code: int = -9) -> None:
        self.client.alive = False
        self.process = FakeProcess("dead", exit_code, ("step 41", "step 42"))

    def restart(self) -> None:
        self.restarts += 1
        self.client.alive = True
        self.client.jobs.clear()
        self.process = FakeProcess()

    def stop(self) -> None:
        self.process = FakeProcess("dead", 0)


class FakeClient:
    """Stands for :class:`engine.worker.client.EngineClient`: an engine that takes steps on demand."""

    def __init__(self, *, token_s: float = 0.005, num_blocks: int = 2000) -> None:
        self.alive = True
        self.config_now = EngineConfig()
        self.steps: list[StepStats] = []
        self.events: list[EngineEvent] = []
        self.jobs: dict[str, dict[str, Any]] = {}
        self.token_s, self.num_blocks = token_s, num_blocks
        self.execution: dict[str, Any] = {}
        self.phase: dict[str, Any] = {"status": "ready"}
        self.running = 0
        self.patches: list[dict[str, Any]] = []
        self.loads: list[dict[str, Any]] = []
        self.samples: list[dict[str, Any]] = []
        self.prefix_resets = 0
        self.recording = ""
        self.job_polls = 3
        self.hold_after = 1 << 30
        self.release = threading.Event()
        self._lock = threading.Lock()

    def _check(self) -> None:
        if not self.alive:
            raise ConnectionError("connection refused")

    def health(self) -> dict[str, Any]:
        self._check()
        return {"model": "fake-135m", "progress": None, "stage": "", "error": None, **self.phase}

    def status(self) -> dict[str, Any]:
        self._check()
        memory = MemoryReport(4 * 2**30, 270 << 20, 270 << 20, 300 << 20, 900 << 20, 1500 << 20)
        used = min(self.num_blocks, 40 * self.running)
        blocks = "s" * (used // 4) + "u" * (used - used // 4) + "c" * (self.num_blocks // 10)
        engine = EngineStatus(
            model={
                "name": "fake-135m", "family": "llama", "source": "gguf", "fingerprint": "f" * 64, "layers": 30,
                "stored_as": "mostly Q4_1 (79 %, GGUF)",
                "parameters": 134_515_008, "heads": 9, "kv_heads": 3, "head_dim": 64, "context_length": 2048,
            },
            config=self.config_now.to_dict(),
            config_hash=self.config_now.hash(),
            path={"device": "cpu", "dtype": "bfloat16", "attention": "sdpa", "weights": "bfloat16"},
            memory=memory, block_size=16, num_blocks=self.num_blocks, max_model_len=2048,
            blocks=blocks[: self.num_blocks].ljust(self.num_blocks, "."),
            running=self.running, waiting=0,
            totals={"output_tokens": sum(step.output_tokens for step in self.steps), "preemptions": 0,
                    "prefix_query_tokens": 400, "prefix_hit_tokens": 100},
            execution=self.execution,
        )  # fmt: skip
        return {"worker": {"pid": 1, "uptime_s": 1.0}, "engine": dataclasses.asdict(engine), "telemetry": {}}

    def reset_prefix_cache(self) -> int:
        self._check()
        self.prefix_resets += 1
        return 17

    def config(self) -> dict[str, Any]:
        return {"config": self.config_now.to_dict(), "hash": self.config_now.hash(), "knobs": engine_config.schema()}

    def patch_config(self, changes: Mapping[str, Any], *, force: bool = False) -> ReconfigureResult:
        self._check()
        self._refuse_during_run(force)
        self.patches.append(dict(changes))
        before, self.config_now = self.config_now, self.config_now.with_changes(changes)
        changed = before.difference(self.config_now)
        detail = {"changed": {name: list(pair) for name, pair in changed.items()}}
        summary = ", ".join(f"{name}: {value_text(old)} → {value_text(new)}" for name, (old, new) in changed.items())
        summary = f"{summary} (paused 0.4 ms)"
        self.events.append(EngineEvent(len(self.events), time.time(), "reconfigure", summary, detail))
        return ReconfigureResult(changed, "live", 0.4, 0.0, self.running, [])

    def _refuse_during_run(self, force: bool) -> None:
        if self.recording and not force:
            message = f"{self.recording} is in progress, and this would disturb it."
            raise FakeApiError(message, field="run", remedy="Wait for it.", status_code=409)

    def series(self, *, steps_since: int = -1, events_since: int = -1) -> dict[str, Any]:
        self._check()
        return {
            "steps": [step for step in self.steps if step.index > steps_since],
            "events": [event for event in self.events if event.index > events_since],
            "last_step": len(self.steps) - 1,
            "last_event": len(self.events) - 1,
        }

    def telemetry(self, *, since: int = -1) -> dict[str, Any]:
        self._check()
        return {"samples": self.samples[since + 1 :], "last_index": len(self.samples) - 1, "interval_s": 0.5}

    def add_step(self, at: float | None = None) -> None:
        """One step of decoding, with a prefill now and then."""
        with self._lock:
            index = len(self.steps)
            prefill = 64 if index % 20 == 0 else 0
            duration = 8 + 3 * math.sin(index / 9) + prefill / 4
            self.steps.append(
                StepStats(
                    index, at or time.time(), duration, 0.4, duration - 1, 0.6, max(self.running, 1), index % 3,
                    prefill, 8, 4, 3, 8, 0, 200 + index % 50, 40, prefill // 2, prefill,
                )
            )  # fmt: skip

    def load(self, config: Mapping[str, Any], *, force: bool = False) -> None:
        self._refuse_during_run(force)
        self.loads.append(dict(config))

    def workloads(self) -> list[dict[str, Any]]:
        return WORKLOADS

    def start_run(self, request: Mapping[str, Any]) -> dict[str, Any]:
        self._check()
        comparison = request.get("comparison")
        count = 2 * int(comparison["repeats"]) if comparison else 1
        run_ids = [uuid.uuid4().hex for _ in range(count)]
        job_id = uuid.uuid4().hex
        self.jobs[job_id] = {"run_ids": run_ids, "comparison": comparison, "polls": 0, "cancelled": False}
        return {"job_id": job_id, "run_ids": [] if comparison else run_ids}

    def run_status(self, job_id: str) -> dict[str, Any]:
        self._check()
        if job_id not in self.jobs:
            raise FakeApiError("no such job", status_code=404)
        job = self.jobs[job_id]
        job["polls"] += 1
        total = len(job["run_ids"])
        done = min(total, job["polls"] // self.job_polls)
        results = [self._result(job, job_id, index) for index in range(min(done + 1, total))]
        if done < total:
            results[-1].status = "running"
        status = "cancelled" if job["cancelled"] else "completed" if done == total else "running"
        progress = {
            "done": done,
            "total": total,
            "elapsed_s": 1.0,
            "eta_s": 2.0,
            "detail": f"run {done + 1} of {total}",
        }
        return {"status": status, "progress": progress, "results": results, "error": None}

    def _result(self, job: dict[str, Any], job_id: str, index: int) -> RunResult:
        run_id, comparison = job["run_ids"][index], job["comparison"]
        if not comparison:
            return fake_run(run_id)
        arm = "AB"[index % 2]
        changes = comparison["arm_a"] if arm == "A" else comparison["arm_b"]
        return fake_run(
            run_id,
            arm=arm,
            repeat=index // 2,
            comparison_id=job_id,
            config=self.config_now.with_changes(changes),
            speed=(180 if arm == "B" else 100) + index,
        )

    def cancel_run(self, job_id: str) -> None:
        self.jobs[job_id]["cancelled"] = True

    def stream_chat(self, messages: Sequence[Mapping[str, str]], **parameters: Any) -> Iterator[dict[str, Any]]:
        self._check()
        words = (f"word{index} " for index in range(int(parameters.get("max_tokens", 16))))
        self.running += 1
        try:
            for index, word in enumerate(words):
                time.sleep(self.token_s)
                if index >= self.hold_after:
                    self.release.wait(30)
                self._check()
                self.add_step()
                yield {"choices": [{"delta": {"content": word}, "finish_reason": None}]}
            usage = {"prompt_tokens": 5, "completion_tokens": int(parameters.get("max_tokens", 16))}
            yield {"choices": [{"delta": {}, "finish_reason": "length"}], "usage": usage}
        finally:
            self.running -= 1


class FullStore:
    """A store whose disk is full until :attr:`full` is cleared; then it is the real one."""

    def __init__(self, store: Any) -> None:
        self._store, self.full = store, True

    def __getattr__(self, name: str) -> Any:
        if self.full and name in ("begin_run", "save_run", "fail_run"):
            raise StorageError("the disk is full.", field="record", remedy="Free some space.")
        return getattr(self._store, name)
