"""Measured runs that the worker carries out: one at a time, in a thread, with progress and cancellation."""

from __future__ import annotations

import dataclasses
import logging
import threading
import uuid
from typing import Any, Literal

from engine.errors import HeadroomError
from engine.loop import EngineLoop
from engine.measure import RunProgress, get_workload, run_comparison, run_workload
from engine.measure.results import RunResult, to_json
from engine.server.schemas import RunBody
from engine.telemetry_sampler import TelemetrySampler

logger = logging.getLogger(__name__)

JobStatus = Literal["running", "completed", "failed", "cancelled"]
JOBS_KEPT = 20


class BusyError(HeadroomError):
    """Another job is running (409): two at once would measure each other."""


class UnknownJobError(HeadroomError):
    """There is no such job (404)."""


@dataclasses.dataclass
class Job:
    """One job. Written by its thread, read by the API.

    Attributes:
        run_ids: known in advance for a run by itself; a comparison's grow as its runs begin.
        results: latest record of every run by id; one of status "running" is only announced.
    """

    job_id: str
    body: RunBody
    run_ids: list[str]
    status: JobStatus = "running"
    progress: RunProgress = dataclasses.field(default_factory=lambda: RunProgress(0, 0, 0.0, None, "starting"))
    results: dict[str, RunResult] = dataclasses.field(default_factory=dict)
    error: dict[str, str | None] | None = None
    cancel: threading.Event = dataclasses.field(default_factory=threading.Event)

    def to_dict(self) -> dict[str, Any]:
        """JSON form, as answered by ``GET /admin/runs/{job_id}``."""
        return {
            "job_id": self.job_id,
            "run_ids": list(self.run_ids),
            "status": self.status,
            "progress": dataclasses.asdict(self.progress),
            "results": [to_json(result) for result in list(self.results.values())],
            "error": self.error,
        }

    def take(self, result: RunResult) -> None:
        """Keep the newest record of a run."""
        self.results[result.run_id] = result
        if result.run_id not in self.run_ids:
            self.run_ids.append(result.run_id)

    def report(self, progress: RunProgress) -> None:
        """Keep the newest progress."""
        self.progress = progress


class JobRunner:
    """Starts jobs and remembers the last ones until they are read.

    Args:
        telemetry: what the runs measure their energy with.
    """

    def __init__(self, telemetry: TelemetrySampler) -> None:
        self._telemetry = telemetry
        self._jobs: dict[str, Job] = {}
        self._lock = threading.Lock()

    def start(self, loop: EngineLoop, body: RunBody) -> Job:
        """Start a job.

        Raises:
            BusyError: if another one is running.
            WorkloadError, ConfigError: if it could not run; nothing has happened then.
        """
        get_workload(body.workload)
        arms = [body.comparison.arm_a, body.comparison.arm_b] if body.comparison else [body.changes]
        for changes in arms:
            loop.engine.config.with_changes(changes)
        job = Job(uuid.uuid4().hex, body, [] if body.comparison else [uuid.uuid4().hex])
        with self._lock:
            if any(other.status == "running" for other in self._jobs.values()):
                raise BusyError("a run is in progress.", field="run", remedy="Wait for it, or cancel it.")
            self._jobs[job.job_id] = job
            for old in list(self._jobs)[:-JOBS_KEPT]:
                del self._jobs[old]
        threading.Thread(target=self._run, args=(loop, job), name=f"job-{job.job_id[:8]}", daemon=True).start()
        return job

    def get(self, job_id: str) -> Job:
        """The job of that id.

        Raises:
            UnknownJobError: if it is not known (any more).
        """
        job = self._jobs.get(job_id)
        if job is None:
            raise UnknownJobError(f"there is no run {job_id!r}.", field="job_id", remedy="It may be too old.")
        return job

    def _run(self, loop: EngineLoop, job: Job) -> None:
        try:
            measure = _compare if job.body.comparison else _bench
            status, error = measure(loop, job, self._telemetry)
            job.error = {"message": error, "field": None, "remedy": None} if error else None
            job.status = status
        except HeadroomError as problem:
            job.error, job.status = problem.to_dict(), "failed"
        except Exception as problem:
            logger.exception("a run failed")
            message = f"{type(problem).__name__}: {problem}"
            job.error = {"message": message, "field": None, "remedy": "See the worker's log."}
            job.status = "failed"


def _bench(loop: EngineLoop, job: Job, telemetry: TelemetrySampler) -> tuple[JobStatus, str | None]:
    body = job.body
    result = run_workload(
        loop,
        body.workload,
        seed=body.seed,
        changes=body.changes,
        slo=body.slo,
        label=body.label,
        run_id=job.run_ids[0],
        telemetry=telemetry,
        progress=job.report,
        cancel=job.cancel,
        on_start=job.take,
    )
    job.take(result)
    return result.status, result.error


def _compare(loop: EngineLoop, job: Job, telemetry: TelemetrySampler) -> tuple[JobStatus, str | None]:
    body, arms = job.body, job.body.comparison
    assert arms is not None
    comparison = run_comparison(
        loop,
        body.workload,
        arms.arm_a,
        arms.arm_b,
        repeats=arms.repeats,
        seed=body.seed,
        slo=body.slo,
        label=body.label,
        quality=arms.quality,
        comparison_id=job.job_id,
        telemetry=telemetry,
        progress=job.report,
        cancel=job.cancel,
        on_run=job.take,
        on_start=job.take,
    )
    return comparison.status, comparison.error
