"""Running a workload on a live engine.

    all-at-once   the stepping thread is held for the moment of submission, so that the first batch is the whole burst
    poisson       requests are due at their times whatever the engine does; a late submission counts as queueing
    closed loop   a client's next request arrives when its last one has ended

Whatever happens (cancelled, engine died, a bug here), what was measured until then comes back as a
:class:`RunResult` whose status says so.
"""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from engine.config import knob
from engine.errors import (
    CapacityError,
    EngineDeadError,
    HeadroomError,
    QueueFullError,
    RequestError,
    WorkloadError,
)
from engine.measure.energy import EnergyMeter, energy_meter
from engine.measure.metrics import Slo, summarize
from engine.measure.prompts import WorkloadRequest, expand, expand_warmup, workload_hash
from engine.measure.provenance import collect_provenance
from engine.measure.recording import RequestLog, Sampler, describe_error
from engine.measure.results import EventRecord, RunResult, RunStatus
from engine.measure.workloads import Workload, get_workload

if TYPE_CHECKING:
    from engine.telemetry.sampler import TelemetrySampler
    from engine.worker.loop import EngineLoop

_POLL_S = 0.1
_ABORT_TIMEOUT_S = 10.0
_HOLD_TIMEOUT_S = 30.0


@dataclasses.dataclass(frozen=True, slots=True)
class RunProgress:
    """How far a run or a comparison is.

    Attributes:
        done, total: requests ended, and requests of everything that was asked for (all runs of a comparison).
        elapsed_s: since the start; eta_s: expected until the end, None before anything is done.
        detail: one line, e.g. "repeat 2 of 5, B: 12 of 32 requests".
    """

    done: int
    total: int
    elapsed_s: float
    eta_s: float | None
    detail: str


ProgressCallback = Callable[[RunProgress], None]


@dataclasses.dataclass(frozen=True, slots=True)
class RunPlan:
    """One run: what to send and how to file it."""

    workload: Workload
    requests: list[WorkloadRequest]
    warmup: list[WorkloadRequest]
    seed: int
    label: str
    kind: Literal["bench", "compare"]
    run_id: str
    comparison_id: str | None = None
    arm: str | None = None
    repeat: int | None = None


def run_workload(
    loop: EngineLoop,
    workload: str | Mapping[str, Any] | Workload,
    *,
    seed: int = 0,
    changes: Mapping[str, Any] | None = None,
    slo: Slo | Mapping[str, Any] | None = None,
    label: str = "",
    kind: Literal["bench", "compare"] = "bench",
    run_id: str | None = None,
    telemetry: TelemetrySampler | None = None,
    progress: ProgressCallback | None = None,
    cancel: threading.Event | None = None,
    on_start: Callable[[RunResult], None] | None = None,
) -> RunResult:
    """Run a workload on a live engine and measure it.

    The prefix cache is emptied after the warm-up, so that a run finds only prefixes of its own.

    Args:
        changes: knobs for this run alone; their previous values are restored afterwards.
        slo: objectives for goodput, instead of the workload's own.
        telemetry: samples the GPU, for the run's energy; one of the run's own if not given.
        progress: called in this thread at least ten times a second.
        cancel: set it to end the run early; its requests are aborted, the status is "cancelled".
        on_start: called with the announced record (status "running") before the first request.

    Returns:
        The record; ``status`` "failed" with ``error`` if the engine died, with everything measured until then.

    Raises:
        WorkloadError, ConfigError, CapacityError, EngineDeadError: before anything was run.
    """
    definition = with_slo(get_workload(workload), slo)
    plan = make_plan(loop, definition, seed, label=label, kind=kind, run_id=run_id or uuid.uuid4().hex)
    previous = current_values(loop, changes or {})
    if changes:
        loop.reconfigure(changes)
    try:
        with energy_meter(loop.snapshot.device, telemetry) as energy:
            return RunInProgress(loop, plan, energy, progress, cancel or threading.Event()).measure(on_start)
    finally:
        if changes:
            restore(loop, previous)


def make_plan(loop: EngineLoop, workload: Workload, seed: int, **filing: Any) -> RunPlan:
    """What a run will send; ``filing`` are the remaining fields of :class:`RunPlan`.

    Raises:
        WorkloadError: if a request is longer than the engine takes.
    """
    tokenizer = loop.snapshot.tokenizer
    requests = expand(workload, tokenizer, seed)
    limit = loop.snapshot.max_model_len
    longest = max(len(request.prompt_token_ids) + request.params.max_tokens for request in requests)
    if longest > limit:
        raise WorkloadError(
            f"its longest request has {longest} tokens, the engine takes {limit}.",
            field="workload",
            remedy="Shorten prompt_tokens or output_tokens, or load the model with a larger max_model_len.",
        )
    return RunPlan(workload, requests, expand_warmup(workload, tokenizer, seed), seed, **filing)


def with_slo(workload: Workload, slo: Slo | Mapping[str, Any] | None) -> Workload:
    """The workload with these objectives instead of its own, if any are given."""
    if slo is None:
        return workload
    return dataclasses.replace(workload, slo=Slo.from_mapping(slo) if isinstance(slo, Mapping) else slo)


def current_values(loop: EngineLoop, names: Mapping[str, Any]) -> dict[str, Any]:
    """The current values of some knobs, by their full names."""
    config = loop.snapshot.config.to_dict()
    return {knob(name).name: config[name] for name in names}


def restore(loop: EngineLoop, previous: Mapping[str, Any]) -> None:
    """Put the previous values back. A failure here must not hide what was measured: it goes to the event log."""
    if not previous:
        return
    try:
        loop.reconfigure(previous)
    except HeadroomError as error:
        with contextlib.suppress(EngineDeadError):
            loop.add_event("error", f"the previous knobs were not restored: {error}", {"previous": dict(previous)})


class _CancelledError(Exception):
    """The run was asked to end."""


class RunInProgress:
    """One run in progress; used once."""

    def __init__(
        self,
        loop: EngineLoop,
        plan: RunPlan,
        energy: EnergyMeter,
        progress: ProgressCallback | None,
        cancel: threading.Event,
    ) -> None:
        self.loop = loop
        self.plan = plan
        self.energy = energy
        self.progress = progress
        self.cancel = cancel
        self.log = RequestLog(plan.requests)
        self.sampler = Sampler(loop, energy.gpu)
        self.done = 0
        self.start = time.perf_counter()

    def measure(self, on_start: Callable[[RunResult], None] | None) -> RunResult:
        """Warm up, drive, record."""
        result = self._announce()
        if on_start is not None:
            on_start(result)
        status: RunStatus = "completed"
        error: str | None = None
        try:
            self._prepare()
            self.sampler.start()
            self._note_other_traffic()
            result.started_unix_s = time.time()
            self.energy.begin()
            self._drive()
        except (_CancelledError, KeyboardInterrupt):
            status = "cancelled"
        except Exception as exc:  # anything at all: what was measured must not be lost
            status, error = "failed", describe_error(exc)
        self.energy.end()
        self._abort_rest()
        self.sampler.stop()
        return self._finish(result, status, error)

    def _announce(self) -> RunResult:
        plan = self.plan
        provenance = collect_provenance(self.loop.status_now(), plan.workload, workload_hash(plan.requests), plan.seed)
        return RunResult(
            run_id=plan.run_id,
            kind=plan.kind,
            status="running",
            label=plan.label,
            started_unix_s=time.time(),
            duration_s=0.0,
            provenance=provenance,
            metrics={},
            comparison_id=plan.comparison_id,
            arm=plan.arm,
            repeat=plan.repeat,
        )

    def _prepare(self) -> None:
        """Run the warm-up to its end and forget the prefixes that it left."""
        plan = self.plan
        detail = {"run_id": plan.run_id, "workload": plan.workload.name, "arm": plan.arm, "repeat": plan.repeat}
        self.loop.add_event("run", f"run of {plan.workload.name} begins{f' ({plan.arm})' if plan.arm else ''}", detail)
        self.energy.measure_idle(self._wait, lambda: not self._other_requests())
        warmup = RequestLog(plan.warmup)
        self._report("warming up")
        for request in plan.warmup:
            self._submit(request, warmup, time.perf_counter())
        try:
            for _ in plan.warmup:
                while self._next_finished(warmup, _POLL_S) is None:
                    self._check()
        finally:
            self._abort(warmup)
        self.loop.call(lambda engine: engine.reset_prefix_cache())

    def _drive(self) -> None:
        """Submit every request at its time and wait for all of them."""
        waiting = list(reversed(self.plan.requests))
        in_flight = self._submit_burst(waiting)
        while waiting or in_flight:
            self._check()
            now = time.perf_counter()
            while waiting and self._is_due(waiting[-1], now, in_flight):
                request = waiting.pop()
                open_loop = self.plan.workload.arrival.kind == "poisson"
                # late or not, an open-loop request arrived when it was due: else a busy engine would hide its queue
                self._submit(request, self.log, self.start + request.arrival_s if open_loop else now)
                in_flight += 1
            if self._next_finished(self.log, self._patience(waiting)) is not None:
                in_flight -= 1
                self.done += 1
            self._report(f"{self.done} of {len(self.plan.requests)} requests")

    def _submit_burst(self, waiting: list[WorkloadRequest]) -> int:
        """Start the clock; a burst is submitted as one, with the engine held meanwhile."""
        if self.plan.workload.arrival.kind != "all-at-once":
            self.start = time.perf_counter()
            return 0
        with _held(self.loop):
            self.start = time.perf_counter()
            for request in self.plan.requests:
                self._submit(request, self.log, self.start)
        waiting.clear()
        return len(self.plan.requests)

    def _is_due(self, request: WorkloadRequest, now: float, in_flight: int) -> bool:
        concurrency = self.plan.workload.arrival.concurrency
        return in_flight < concurrency if concurrency is not None else now >= self.start + request.arrival_s

    def _patience(self, waiting: Sequence[WorkloadRequest]) -> float:
        if not waiting or self.plan.workload.arrival.kind != "poisson":
            return _POLL_S
        return min(_POLL_S, max(0.0, self.start + waiting[-1].arrival_s - time.perf_counter()))

    def _submit(self, request: WorkloadRequest, log: RequestLog, arrival: float) -> None:
        index = request.index
        log.arrived(index, arrival)
        try:
            log.ids[index] = self.loop.submit(
                request.prompt_token_ids, request.params, on_output=lambda output: log.receive(index, output)
            )
        except (RequestError, CapacityError, QueueFullError) as error:
            log.rejected(index, str(error))

    def _next_finished(self, log: RequestLog, timeout: float) -> int | None:
        try:
            return log.finished.get(timeout=timeout) if timeout > 0 else log.finished.get_nowait()
        except queue.Empty:
            return None

    def _check(self) -> None:
        if not self.loop.alive:
            raise EngineDeadError(f"the engine died during the run: {self.loop.error or 'it was shut down'}.")
        if self.cancel.is_set():
            raise _CancelledError

    def _report(self, detail: str) -> None:
        if self.progress is None:
            return
        total, elapsed = len(self.plan.requests), time.perf_counter() - self.start
        eta = elapsed / self.done * (total - self.done) if self.done else None
        self.progress(RunProgress(self.done, total, elapsed, eta, detail))

    def _wait(self, seconds: float) -> None:
        """Let time pass while the engine is idle."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self._check()
            self._report("measuring idle power")
            time.sleep(min(left, _POLL_S))

    def _other_requests(self) -> int:
        status = self.loop.status_now()
        return status.running + status.waiting

    def _note_other_traffic(self) -> None:
        others = self._other_requests()
        if others:
            summary = f"{others} requests of other clients were in flight at the start"
            self.sampler.events.append(EventRecord(0.0, "run", summary, {"other_requests": others}))

    def _abort(self, log: RequestLog) -> None:
        unfinished = log.unfinished()
        if not unfinished:
            return
        with contextlib.suppress(EngineDeadError):
            for index in unfinished:
                self.loop.abort(log.ids[index])
        deadline = time.monotonic() + _ABORT_TIMEOUT_S
        while log.unfinished() and self.loop.alive and time.monotonic() < deadline:
            time.sleep(0.01)

    def _abort_rest(self) -> None:
        self._abort(self.log)

    def _finish(self, result: RunResult, status: RunStatus, error: str | None) -> RunResult:
        end = self.log.last_end() or time.perf_counter()
        lost = error or (None if self.loop.alive else self.loop.error)
        result.requests = self.log.records(self.start, lost if status == "failed" else None)
        result.duration_s = max(0.0, end - self.start)
        result.samples, result.events = self.sampler.samples, self.sampler.events
        slo = self.plan.workload.slo
        spent = self.energy.report(sum(request.output_tokens for request in result.requests))
        result.metrics = {
            **summarize(result.requests, result.duration_s, slo),
            **self.sampler.metrics(),
            **spent.metrics,
        }
        result.events.append(EventRecord(0.0, "energy", spent.summary, spent.detail))
        result.status, result.error = status, error
        failed = [request for request in result.requests if request.finish_reason == "error"]
        if status == "completed" and failed:
            result.error = f"{len(failed)} of {len(result.requests)} requests failed, first: {failed[0].error}"
            if len(failed) == len(result.requests):
                result.status = "failed"
        return result


@contextlib.contextmanager
def _held(loop: EngineLoop) -> Iterator[None]:
    """The stepping thread waits between two steps while the body runs (bounded, so that it can never hang on us)."""
    reached, release = threading.Event(), threading.Event()

    def hold(_: Any) -> None:
        reached.set()
        release.wait(_HOLD_TIMEOUT_S)

    def call() -> None:
        with contextlib.suppress(EngineDeadError):
            loop.call(hold)

    thread = threading.Thread(target=call, name="run-hold", daemon=True)
    thread.start()
    while not reached.wait(0.05) and thread.is_alive():
        pass
    try:
        yield
    finally:
        release.set()
        thread.join(timeout=_HOLD_TIMEOUT_S)
