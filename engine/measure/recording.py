"""Watching one run: what became of each request, and the engine's state a few times a second.

Callbacks of the stepping thread only keep a reference; everything is computed after the run or in the sampling thread.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from engine.errors import HeadroomError
from engine.measure.metrics import UNSENT
from engine.measure.prompts import WorkloadRequest
from engine.measure.results import EventRecord, RequestRecord, SampleRecord
from engine.outputs import EngineStatus, RequestOutput, StepStats
from engine.telemetry.gpu import GpuReading


class RequestLog:
    """The latest news of every request of a run.

    Args:
        requests: the whole workload, sent or not.
    """

    def __init__(self, requests: Sequence[WorkloadRequest]) -> None:
        self.requests = requests
        self.finished: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.ids: dict[int, str] = {}
        self._arrivals: dict[int, float] = {}
        self._latest: dict[int, RequestOutput] = {}
        self._errors: dict[int, str] = {}

    def arrived(self, index: int, at: float) -> None:
        """The request counts as sent from ``at`` (perf_counter seconds) on."""
        self._arrivals[index] = at

    def rejected(self, index: int, error: str) -> None:
        """The engine did not take the request."""
        self._errors[index] = error
        self.finished.put(index)

    def receive(self, index: int, output: RequestOutput) -> None:
        """An output; called in the stepping thread."""
        self._latest[index] = output
        if output.finished:
            self.finished.put(index)

    def unfinished(self) -> list[int]:
        """Indices of requests that were accepted and have not ended."""
        ended = {index for index, output in list(self._latest.items()) if output.finished}
        return [index for index in self.ids if index not in ended]

    def output_tokens(self) -> int:
        """Output tokens of all requests so far."""
        return sum(len(output.times.token_times) for output in list(self._latest.values()))

    def records(self, start: float, lost: str | None = None) -> list[RequestRecord]:
        """One record for each request of the workload.

        Args:
            start: beginning of the run, perf_counter seconds.
            lost: why requests without a last output have none (the engine died).
        """
        return [self._record(request, start, lost) for request in self.requests]

    def last_end(self) -> float | None:
        """When the last request that ended did so, perf_counter seconds."""
        ends = [output.times.end for output in self._latest.values() if output.times.end is not None]
        tokens = [output.times.token_times[-1] for output in self._latest.values() if output.times.token_times]
        return max([*ends, *tokens], default=None)

    def _record(self, request: WorkloadRequest, start: float, lost: str | None) -> RequestRecord:
        index = request.index
        output, error = self._latest.get(index), self._errors.get(index)
        arrival = self._arrivals.get(index)
        times = list(output.times.token_times) if output else []
        end = output.times.end if output else None
        reason = output.finish_reason if output else None
        if reason is None:
            reason, error = _how_it_ended(sent=arrival is not None, error=error, lost=lost)
        origin = start + request.arrival_s if arrival is None else arrival
        return RequestRecord(
            index=index,
            arrival_s=origin - start,
            prompt_tokens=len(request.prompt_token_ids),
            output_tokens=len(times),
            cached_tokens=output.num_cached_tokens if output else 0,
            ttft_ms=(times[0] - origin) * 1e3 if times else None,
            tpot_ms=(times[-1] - times[0]) * 1e3 / (len(times) - 1) if len(times) > 1 else None,
            e2e_ms=(end - origin) * 1e3 if end is not None else None,
            itl_ms=[(later - earlier) * 1e3 for earlier, later in itertools.pairwise(times)],
            finish_reason=reason,
            preemptions=output.num_preemptions if output else 0,
            draft_tokens=output.num_draft_tokens if output else 0,
            accepted_tokens=output.num_accepted_tokens if output else 0,
            error=error if error is not None else (output.error if output else None),
        )


def _how_it_ended(*, sent: bool, error: str | None, lost: str | None) -> tuple[Any, str | None]:
    """(finish reason, error) of a request that has no last output."""
    if error is not None:
        return "error", error
    if not sent:
        return UNSENT, None
    return ("error", lost) if lost is not None else ("abort", None)


class Sampler:
    """Samples the engine in a thread of its own, so that a long step never delays a request's arrival.

    Args:
        loop: the engine's loop.
        gpu: the newest reading of the engine's GPU, None where there is none.
        interval_s: seconds between two samples.
    """

    def __init__(self, loop: Any, gpu: Callable[[], GpuReading | None], interval_s: float = 0.25) -> None:
        self.samples: list[SampleRecord] = []
        self.events: list[EventRecord] = []
        self._loop = loop
        self._gpu = gpu
        self._interval = interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="run-sampler", daemon=True)
        self._steps = 0
        self._step_time_ms = 0.0
        self._running_sum = 0
        self._peak_blocks = 0
        self._weights_bytes: int | None = None
        self._start = self._last = time.perf_counter()
        self._start_unix = time.time()
        self._next_step = self._next_event = 0

    def start(self) -> None:
        """Begin; what happened before is not looked at.

        Raises:
            EngineDeadError: if the engine has stopped.
        """
        self._weights_bytes = self._loop.status_now().memory.weights
        self._start = self._last = time.perf_counter()
        self._start_unix = time.time()
        self._next_step = _after(self._loop.steps.since(0))
        self._next_event = _after(self._loop.events.since(0))
        self._thread.start()

    def stop(self) -> None:
        """Take the last sample and end."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(timeout=10)

    def metrics(self) -> dict[str, float | None]:
        """The metrics that come from steps and samples, see :data:`engine.measure.metrics.METRICS`."""
        resident = [sample.resident_bytes for sample in self.samples]
        return {
            "step_ms_mean": self._step_time_ms / self._steps if self._steps else None,
            "running_mean": self._running_sum / self._steps if self._steps else None,
            "kv_blocks_used_peak": float(self._peak_blocks) if self._steps else None,
            "weights_bytes": None if self._weights_bytes is None else float(self._weights_bytes),
            "resident_bytes_peak": float(max(resident)) if resident else None,
        }

    def _run(self) -> None:
        while not self._stop.wait(self._interval):
            self._sample()
        self._sample()

    def _sample(self) -> None:
        self._collect_events()
        try:
            status = self._loop.status()
        except Exception:  # dead or dying: the run's own status tells why; the steps are still there to be read
            status = None
        steps = self._loop.steps.since(self._next_step)
        self._next_step = _after(steps, self._next_step)
        now = time.perf_counter()
        self._count(steps)
        if status is not None:
            self.samples.append(self._record(status, steps, now))
        self._last = now

    def _count(self, steps: Sequence[StepStats]) -> None:
        self._steps += len(steps)
        self._step_time_ms += sum(step.duration_ms for step in steps)
        self._running_sum += sum(step.num_running for step in steps)
        self._peak_blocks = max([self._peak_blocks, *(step.kv_blocks_used for step in steps)])

    def _record(self, status: EngineStatus, steps: Sequence[StepStats], now: float) -> SampleRecord:
        seconds = max(now - self._last, 1e-9)
        output = sum(step.output_tokens for step in steps)
        used = status.blocks.count("u") + status.blocks.count("s")
        gpu = self._gpu()
        return SampleRecord(
            t_s=now - self._start,
            output_tokens_s=output / seconds,
            total_tokens_s=(output + sum(step.prefill_tokens for step in steps)) / seconds,
            running=steps[-1].num_running if steps else status.running,
            waiting=steps[-1].num_waiting if steps else status.waiting,
            kv_blocks_used=steps[-1].kv_blocks_used if steps else used,
            kv_blocks_cached=steps[-1].kv_blocks_cached if steps else status.blocks.count("c"),
            step_ms=sum(step.duration_ms for step in steps) / len(steps) if steps else None,
            resident_bytes=status.memory.resident,
            gpu_power_w=gpu and gpu["power_w"],
            gpu_utilization_percent=gpu and gpu["utilization_percent"],
            gpu_memory_bytes=gpu and gpu["memory_used_bytes"],
            gpu_sm_clock_mhz=gpu and gpu["sm_clock_mhz"],
        )

    def _collect_events(self) -> None:
        events = self._loop.events.since(self._next_event)
        self._next_event = _after(events, self._next_event)
        for event in events:
            moment = max(0.0, event.time_unix_s - self._start_unix)
            self.events.append(EventRecord(moment, event.kind, event.summary, event.detail))


def _after(entries: Sequence[Any], otherwise: int = 0) -> int:
    return entries[-1].index + 1 if entries else otherwise


def describe_error(error: BaseException) -> str:
    """The text of an error for a record: a user's error as it is, any other with its type."""
    return str(error) if isinstance(error, HeadroomError) else f"{type(error).__name__}: {error}"
