"""Watches the jobs started from the pages and puts every run on record, with or without a browser tab open."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

from engine.measure.results import Provenance, RunResult, from_json
from engine.measure.unsaved import kept_message
from storage.spool import keep

logger = logging.getLogger(__name__)
JobState = Literal["running", "completed", "failed", "cancelled"]
_POLL_S = 0.6
#: A worker that is alive but does not answer for so long has lost the job.
_SILENT_S = 120.0


class JobSource(Protocol):
    """The part of :class:`engine.worker.client.EngineClient` that runs jobs."""

    def start_run(self, request: Mapping[str, Any]) -> Mapping[str, Any]: ...

    def run_status(self, job_id: str) -> Mapping[str, Any]: ...

    def cancel_run(self, job_id: str) -> Any: ...


class RunStore(Protocol):
    """The part of :class:`storage.Store` that the recorder writes."""

    def begin_run(self, result: RunResult) -> Any: ...

    def save_run(self, result: RunResult) -> Any: ...

    def fail_run(self, run_id: str, error: str) -> Any: ...


@dataclasses.dataclass
class Job:
    """A measured run or a comparison on its way. Written by its thread, read by the pages.

    Attributes:
        job_id: the worker's name for it; ``run_ids``: its runs as far as they are known in advance.
        kind: "bench" or "compare"; title: for people; request: as sent to the worker.
        state: "running" or how it ended; error: why, if it failed.
        done, total, elapsed_s, eta_s, detail: progress as the worker reports it.
        results: finished runs, in order of their end.
        announced: runs that are on record as running or later.
        unrecorded: finished runs that could not be written, to be offered for download.
        storage_error: why they could not be written, with the remedy.
    """

    job_id: str
    run_ids: list[str]
    kind: Literal["bench", "compare"]
    title: str
    request: dict[str, Any]
    started_unix_s: float = dataclasses.field(default_factory=time.time)
    state: JobState = "running"
    error: str | None = None
    done: float = 0.0
    total: float = 0.0
    elapsed_s: float = 0.0
    eta_s: float | None = None
    detail: str = ""
    results: list[RunResult] = dataclasses.field(default_factory=list)
    unrecorded: list[RunResult] = dataclasses.field(default_factory=list)
    announced: set[str] = dataclasses.field(default_factory=set)
    storage_error: str | None = None

    @property
    def active(self) -> bool:
        """True until it has ended and everything is recorded."""
        return self.state == "running"


class RunRecorder:
    """Starts jobs at the worker, follows each in a thread, and writes its runs to the store.

    Args:
        source: gives the client of the worker that runs now.
        open_store: gives the store; called in the following thread, so a missing or full disk is the job's to report.
        death_notice: says how the worker died ("killed by signal 9 (SIGKILL)"), None while it lives.
        describe: facts for the announcement of a run: model, fingerprint, config, config_hash, path.
    """

    def __init__(
        self,
        source: Callable[[], JobSource],
        open_store: Callable[[], RunStore],
        death_notice: Callable[[], str | None],
        describe: Callable[[], Mapping[str, Any]],
    ) -> None:
        self._source = source
        self._open_store = open_store
        self._death_notice = death_notice
        self._describe = describe
        self._jobs: list[Job] = []
        self._lock = threading.Lock()

    def jobs(self) -> list[Job]:
        """All jobs of this dashboard, newest first."""
        with self._lock:
            return list(reversed(self._jobs))

    def active(self) -> Job | None:
        """The job that runs now, if any."""
        return next((job for job in self.jobs() if job.active), None)

    def get(self, job_id: str) -> Job | None:
        """The job of that id, None if this dashboard did not start it."""
        return next((job for job in self.jobs() if job.job_id == job_id), None)

    def unrecorded(self) -> list[Job]:
        """Jobs with finished runs that are not on record."""
        return [job for job in self.jobs() if job.unrecorded]

    def launch(self, request: Mapping[str, Any], *, title: str) -> Job:
        """Start a run or a comparison; it is recorded from here on, whatever becomes of the page.

        Raises:
            HeadroomError: what the worker answered if it refuses (another job runs, a knob is wrong …).
        """
        answer = self._source().start_run(request)
        run_ids = list(answer.get("run_ids") or ([answer["run_id"]] if answer.get("run_id") else []))
        kind: Literal["bench", "compare"] = "compare" if request.get("comparison") else "bench"
        job = Job(str(answer["job_id"]), run_ids, kind, title, dict(request))
        with self._lock:
            self._jobs.append(job)
        logger.info("job %s started: %s, runs %s", job.job_id, title, ", ".join(run_ids) or "not named yet")
        threading.Thread(target=self._follow, args=(job,), name=f"record-{job.job_id[:8]}", daemon=True).start()
        return job

    def cancel(self, job: Job) -> None:
        """Ask the worker to end the job; what is finished of it is kept."""
        self._source().cancel_run(job.job_id)

    def retry(self, job: Job) -> None:
        """Try again to write what could not be written (after the disk was freed)."""
        waiting, job.unrecorded, job.storage_error = job.unrecorded, [], None
        for result in waiting:
            self._save(job, result)

    def forget(self, job: Job) -> None:
        """Drop what could not be written (after it was downloaded)."""
        job.unrecorded, job.storage_error = [], None

    def _follow(self, job: Job) -> None:
        heard = time.monotonic()
        while True:
            try:
                self._take(job, self._source().run_status(job.job_id))
                heard = time.monotonic()
            except Exception as error:
                reason = self._reason_of_loss(error, heard)
                if reason is not None:
                    self._end(job, "failed", reason)
            if job.state != "running":
                return
            time.sleep(_POLL_S)

    def _reason_of_loss(self, error: Exception, heard: float) -> str | None:
        """Why the job is lost, None if the worker may only be slow to answer."""
        death = self._death_notice()
        if death is not None:
            return f"The engine worker died: {death}."
        if getattr(error, "status_code", None) == 404:
            return "The worker was restarted and does not know this run any more."
        if time.monotonic() - heard > _SILENT_S:
            return f"The worker did not answer for {_SILENT_S:.0f} s ({error})."
        return None

    def _take(self, job: Job, view: Mapping[str, Any]) -> None:
        progress = view.get("progress") or {}
        job.done, job.total = float(progress.get("done") or 0), float(progress.get("total") or 0)
        job.elapsed_s, job.eta_s = float(progress.get("elapsed_s") or 0), progress.get("eta_s")
        job.detail = str(progress.get("detail") or "")
        known = {result.run_id for result in job.results}
        for item in view.get("results") or ():
            result = item if isinstance(item, RunResult) else from_json(dict(item))
            if result.status == "running":
                self._begin(job, result)
            elif result.run_id not in known:
                self._save(job, result)
                job.results.append(result)
        state = view.get("status")
        if state in ("completed", "failed", "cancelled"):
            error = view.get("error")
            self._end(job, state, str(error.get("message") if isinstance(error, Mapping) else error) if error else None)

    def _end(self, job: Job, state: JobState, error: str | None) -> None:
        """Close the job: runs that began but never finished are failed, not left running for ever."""
        job.error = error
        if state == "failed":  # it may have died before anything was heard of the run
            for run_id in job.run_ids:
                self._begin(job, self._announcement(job, run_id))
        finished = {result.run_id for result in job.results}
        reason = error or f"{state} before this run was finished"
        for run_id in sorted(job.announced - finished):
            self._fail(job, run_id, reason)
        logger.info("job %s %s, finished runs: %d%s", job.job_id, state, len(finished), f"; {error}" if error else "")
        job.state = state

    def _begin(self, job: Job, announcement: RunResult) -> None:
        """Put a run on record as running, so that even a crash of everything leaves a trace."""
        finished = any(result.run_id == announcement.run_id for result in job.results)
        if announcement.run_id not in job.announced and not finished:
            job.announced.add(announcement.run_id)
            self._write(job, None, lambda store: store.begin_run(announcement))

    def _announcement(self, job: Job, run_id: str) -> RunResult:
        facts = self._describe()
        workload = job.request.get("workload")
        provenance = Provenance(
            model=str(facts.get("model", "")),
            model_fingerprint=str(facts.get("fingerprint", "")),
            config=dict(facts.get("config") or {}),
            config_hash=str(facts.get("config_hash", "")),
            workload=dict(workload) if isinstance(workload, Mapping) else {"name": str(workload)},
            workload_hash="",
            seed=int(job.request.get("seed") or 0),
            versions={},
            hardware={},
            code_revision="",
            code_dirty=None,
            path=dict(facts.get("path") or {}),
        )
        return RunResult(
            run_id=run_id,
            kind=job.kind,
            status="running",
            label=str(job.request.get("label") or job.title),
            started_unix_s=time.time(),
            duration_s=0.0,
            provenance=provenance,
            metrics={},
        )

    def _save(self, job: Job, result: RunResult) -> None:
        self._write(job, result, lambda store: store.save_run(result))

    def _fail(self, job: Job, run_id: str, reason: str) -> None:
        self._write(job, None, lambda store: store.fail_run(run_id, reason))

    def _write(self, job: Job, result: RunResult | None, write: Callable[[RunStore], Any]) -> None:
        try:
            write(self._open_store())
        except Exception as error:  # disk full, database gone: nothing is lost, the page offers the JSON
            logger.exception("a run could not be recorded")
            job.storage_error = str(error) or type(error).__name__
            if result is not None:
                job.unrecorded.append(result)
                if getattr(error, "kept", None) is None:  # the store was not there to keep it
                    path = keep(result)
                    job.storage_error += f" {kept_message(path)}" if path is not None else ""
