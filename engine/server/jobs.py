"""Measured runs that the worker carries out: one at a time, in a thread, with progress and cancellation."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any, Literal

from engine.errors import HeadroomError
from engine.measure import RunProgress, get_workload, run_comparison, run_workload
from engine.measure.metrics import Slo
from engine.measure.results import RunResult, to_json
from engine.server.bodies import shorten
from engine.server.schemas import RunBody
from engine.server.traffic import Traffic
from engine.telemetry.sampler import TelemetrySampler
from engine.worker.loop import EngineLoop

logger = logging.getLogger(__name__)

JobStatus = Literal["running", "completed", "failed", "cancelled"]
JOBS_KEPT = 20


class BusyError(HeadroomError):
    """Another job is running (409): two at once would measure each other."""


class DisturbsRunError(BusyError):
    """A change would disturb the run that is being recorded (409)."""


class UnknownJobError(HeadroomError):
    """There is no such job (404)."""


@dataclasses.dataclass
class RunJob:
    """One job. Written by its thread, read by the API.

    Attributes:
        run_ids: known in advance for a run by itself; a comparison's grow as its runs begin.
        results: latest record of every run by id; one of status "running" is only announced.
        disturbances: changes from outside, (Unix time, what); they still hold for the runs that follow.
        traffic: the requests from outside.
    """

    job_id: str
    body: RunBody
    run_ids: list[str]
    status: JobStatus = "running"
    progress: RunProgress = dataclasses.field(default_factory=lambda: RunProgress(0, 0, 0.0, None, "starting"))
    results: dict[str, RunResult] = dataclasses.field(default_factory=dict)
    error: dict[str, str | None] | None = None
    cancel: threading.Event = dataclasses.field(default_factory=threading.Event)
    disturbances: list[tuple[float, str]] = dataclasses.field(default_factory=list)
    traffic: Traffic = dataclasses.field(default_factory=Traffic)

    def describe(self) -> str:
        """Which run this is and how far, for people."""
        body = self.body
        name = body.workload if isinstance(body.workload, str) else str(body.workload.get("name") or "a workload")
        label = f" {body.label!r}" if body.label else ""
        kind = "comparison" if body.comparison else "run"
        where = self.progress.detail or "starting"
        done, total = self.progress.done, self.progress.total
        return f"the {kind}{shorten(label)} of {shorten(name)} ({done} of {total} requests; {where}; {self.job_id[:8]})"

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
        """Keep the newest record of a run, marked with what has disturbed it."""
        result.disturbed = self._disturbed(result)
        self.results[result.run_id] = result
        if result.run_id not in self.run_ids:
            self.run_ids.append(result.run_id)

    def _disturbed(self, result: RunResult) -> list[dict[str, Any]]:
        if result.status == "running":
            return []
        start = result.started_unix_s
        end = start + result.duration_s
        # Changes from before this run hold in it, too; those after it no longer concern it.
        found = [(at, what) for at, what in list(self.disturbances) if at <= max(end, start)]
        others = self.traffic.during(start, end)
        if others:
            requests = "1 other request was" if len(others) == 1 else f"{len(others):,} other requests were"
            found.append((max(others[0], start), f"{requests} served during this run"))
        return [{"time_unix_s": at, "what": what} for at, what in sorted(found)]

    def report(self, progress: RunProgress) -> None:
        """Keep the newest progress."""
        self.progress = progress


class JobRunner:
    """Starts jobs and remembers the last ones until they are read.

    Args:
        telemetry: what the runs measure their energy with.
        traffic: the requests from outside, which disturb a run.
    """

    def __init__(self, telemetry: TelemetrySampler, traffic: Traffic | None = None) -> None:
        self._telemetry = telemetry
        self._traffic = traffic or Traffic()
        self._jobs: dict[str, RunJob] = {}
        self._lock = threading.Lock()

    def start(self, loop: EngineLoop, body: RunBody) -> RunJob:
        """Start a job.

        Raises:
            BusyError: if another one is running.
            WorkloadError, ConfigError: if it could not run; nothing has happened then.
        """
        _check_workload(body)
        arms = [body.comparison.arm_a, body.comparison.arm_b] if body.comparison else [body.changes]
        for changes in arms:
            loop.snapshot.config.with_changes(changes)
        job = RunJob(uuid.uuid4().hex, body, [] if body.comparison else [uuid.uuid4().hex], traffic=self._traffic)
        with self._lock:
            if running := self._running():
                message = f"a run is in progress: {running.describe()}."
                raise BusyError(message, field="run", remedy="Wait for it, or cancel it.")
            self._jobs[job.job_id] = job
            for old in list(self._jobs)[:-JOBS_KEPT]:
                del self._jobs[old]
        threading.Thread(target=self._run, args=(loop, job), name=f"job-{job.job_id[:8]}", daemon=True).start()
        return job

    def get(self, job_id: str) -> RunJob:
        """The job of that id.

        Raises:
            UnknownJobError: if it is not known (any more).
        """
        job = self._jobs.get(job_id)
        if job is None:
            raise UnknownJobError(f"there is no run {job_id!r}.", field="job_id", remedy="It may be too old.")
        return job

    def running(self) -> RunJob | None:
        """The job in progress, if there is one."""
        with self._lock:
            return self._running()

    def cancel_all(self) -> None:
        """Ask what is running to end; it keeps what it has measured."""
        if job := self.running():
            job.cancel.set()

    def permit(self, what: str, *, force: bool) -> Callable[[], None]:
        """Ask before something that would disturb a run in progress.

        Args:
            what: will be done, as it shall stand on the record of the run.
            force: do it all the same.

        Returns:
            To be called once it is done: marks the run.

        Raises:
            DisturbsRunError: naming the run, if one is in progress and it is not forced.
        """
        job = self.running()
        if job is not None and not force:
            message = f"{job.describe()} is in progress, and this would disturb it."
            remedy = "Wait for it, cancel it, or force it: the run is then marked as disturbed."
            raise DisturbsRunError(message, field="run", remedy=remedy)
        began = time.time()

        def mark() -> None:  # also a run that has been started in between
            for disturbed in {id(each): each for each in (job, self.running()) if each is not None}.values():
                disturbed.disturbances.append((began, what))

        return mark

    def _running(self) -> RunJob | None:
        return next((job for job in self._jobs.values() if job.status == "running"), None)

    def _run(self, loop: EngineLoop, job: RunJob) -> None:
        try:
            measure = _compare if job.body.comparison else _bench
            status, error = measure(loop, job, self._telemetry)
            job.error = {"message": error, "field": None, "remedy": None} if error else None
            job.status = status
        except HeadroomError as exc:
            job.error, job.status = exc.to_dict(), "failed"
        except Exception as exc:
            logger.exception("a run failed")
            message = f"{type(exc).__name__}: {exc}"
            job.error = {"message": message, "field": None, "remedy": "See the worker's log."}
            job.status = "failed"


def _check_workload(body: RunBody) -> None:
    """Refuse now what the run would fail of."""
    get_workload(body.workload)
    if body.slo is not None:
        Slo.from_mapping(body.slo)


def _bench(loop: EngineLoop, job: RunJob, telemetry: TelemetrySampler) -> tuple[JobStatus, str | None]:
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


def _compare(loop: EngineLoop, job: RunJob, telemetry: TelemetrySampler) -> tuple[JobStatus, str | None]:
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
