"""One shared, incremental reading of the engine's status and series, whatever the number of open pages."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from engine.outputs import EngineEvent, EngineStatus, MemoryReport, StepStats

#: Steps kept for the charts: about half an hour of a busy CPU engine.
_KEPT_STEPS = 65536
_KEPT_EVENTS = 512
_KEPT_SAMPLES = 1800  # a quarter of an hour, as the worker keeps them
_FIRST_PATIENCE_S = 3.0


class SeriesSource(Protocol):
    """The part of :class:`engine.worker.client.EngineClient` that the feed reads."""

    def status(self) -> Mapping[str, Any]: ...

    def series(self, *, steps_since: int = -1, events_since: int = -1) -> Mapping[str, Any]: ...

    def telemetry(self, *, since: int = -1) -> Mapping[str, Any]: ...


@dataclasses.dataclass(frozen=True, slots=True)
class Snapshot:
    """What the pages draw from.

    Attributes:
        engine: the engine's status, None while nothing is loaded or reachable.
        worker: the worker's own facts (pid, uptime_s, load …), empty if unreachable.
        telemetry: memory and device readings, as the worker gives them.
        steps, events, samples: oldest first; samples are the telemetry of the last quarter of an hour.
        begun_unix_s, taken_unix_s: when the reading was begun and when it was there.
        error: why the last reading failed, None if it did not.
    """

    engine: EngineStatus | None
    worker: Mapping[str, Any]
    telemetry: Mapping[str, Any]
    steps: tuple[StepStats, ...]
    events: tuple[EngineEvent, ...]
    begun_unix_s: float
    taken_unix_s: float
    error: str | None = None
    samples: tuple[Mapping[str, Any], ...] = ()

    @property
    def version(self) -> tuple[Any, ...]:
        """What a page that stands still is drawn again for: it changes with every event and with busy or idle."""
        last_event = self.events[-1] if self.events else None
        hash_now = self.engine.config_hash if self.engine is not None else None
        return (self.busy, hash_now, last_event.time_unix_s if last_event else None)

    @property
    def busy(self) -> bool:
        """True while the engine has requests, so that the pages poll fast."""
        return self.engine is not None and (self.engine.running + self.engine.waiting) > 0


class Feed:
    """Reads the worker no oftener than it is asked to, one reading at a time, and keeps the recent steps and events.

    Thread-safe: many pages (sessions) share one feed. A worker that was restarted numbers its steps from 0 again; the
    feed notices by the process id and starts over, keeping the events for the charts' marks.

    Args:
        source: gives the client of the worker that runs now.
    """

    def __init__(self, source: Callable[[], SeriesSource]) -> None:
        self._source = source
        self._lock = threading.Lock()
        self._pool = concurrent.futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="feed")
        self._reading: concurrent.futures.Future[None] | None = None
        self._steps: collections.deque[StepStats] = collections.deque(maxlen=_KEPT_STEPS)
        self._events: collections.deque[EngineEvent] = collections.deque(maxlen=_KEPT_EVENTS)
        self._last_step = -1
        self._last_event = -1
        self._samples: collections.deque[Mapping[str, Any]] = collections.deque(maxlen=_KEPT_SAMPLES)
        self._last_sample = -1
        self._pid: int | None = None
        self._snapshot = Snapshot(None, {}, {}, (), (), 0.0, 0.0)

    def latest(self) -> Snapshot:
        """The last reading, without touching the worker."""
        return self._snapshot

    def read(self, max_age_s: float = 0.4, patience_s: float = 0.25, *, samples: bool = True) -> Snapshot:
        """A reading at most ``max_age_s`` old if there is one within ``patience_s``, else the last one.

        The worker answers between two steps, and a page must not stand still for a long step: the reading goes on
        meanwhile and is there the next time. Never raises: ``Snapshot.error`` says what went wrong. Without ``samples``
        it does not ask for the telemetry, which has something new every time; whoever asks next gets what was missed.
        """
        with self._lock:
            lacks = samples and not self._snapshot.samples  # whoever read it last did not ask for any
            if time.time() - self._snapshot.taken_unix_s < max_age_s and not lacks:
                return self._snapshot
            if self._reading is None or self._reading.done():
                self._reading = self._pool.submit(self._refresh, samples)
            reading = self._reading
        first = self._snapshot.taken_unix_s == 0.0
        concurrent.futures.wait([reading], timeout=max(patience_s, _FIRST_PATIENCE_S if first else 0.0))
        return self._snapshot

    def _refresh(self, samples: bool) -> None:
        try:
            self._snapshot = self._fetch(samples)
        except Exception as error:  # the worker may be loading, dying or dead: the pages say so, they go on
            self._snapshot = dataclasses.replace(
                self._snapshot, engine=None, error=str(error) or type(error).__name__, taken_unix_s=time.time()
            )

    def _fetch(self, samples: bool) -> Snapshot:
        begun_unix_s = time.time()
        source = self._source()
        status = source.status()
        worker = status.get("worker") or {}
        if worker.get("pid") != self._pid:
            self._pid, self._last_step, self._last_event, self._last_sample = worker.get("pid"), -1, -1, -1
        engine = engine_status(status.get("engine"))
        if samples:
            telemetry = source.telemetry(since=self._last_sample)
            self._samples.extend(telemetry["samples"])
            self._last_sample = int(telemetry["last_index"])
        if engine is not None and self._is_behind(worker):
            self._extend(source.series(steps_since=self._last_step, events_since=self._last_event))
        return Snapshot(
            engine=engine,
            worker=worker,
            telemetry=status.get("telemetry") or {},
            steps=tuple(self._steps),
            events=tuple(self._events),
            samples=tuple(self._samples),
            begun_unix_s=begun_unix_s,
            taken_unix_s=time.time(),
        )

    def _is_behind(self, worker: Mapping[str, Any]) -> bool:
        """True if there are steps or events that were not read yet, or if the worker does not say."""
        newest = self._events[-1].time_unix_s if self._events else None
        moved = worker.get("last_event_unix_s") != newest
        if moved and worker.get("last_event") == self._last_event:
            self._last_step, self._last_event = -1, -1  # another engine in the same process: read it whole
        return moved or (worker.get("last_step"), worker.get("last_event")) != (self._last_step, self._last_event)

    def _extend(self, series: Mapping[str, Any]) -> None:
        last_step, last_event = int(series.get("last_step", -1)), int(series.get("last_event", -1))
        if last_step < self._last_step or last_event < self._last_event:
            # Another model was loaded in the same process: its engine counts from 0; read it whole next time.
            self._last_step, self._last_event = -1, -1
            return
        self._steps.extend(item if isinstance(item, StepStats) else StepStats(**item) for item in series["steps"])
        self._events.extend(item if isinstance(item, EngineEvent) else EngineEvent(**item) for item in series["events"])
        self._last_step, self._last_event = last_step, last_event


def engine_status(document: EngineStatus | Mapping[str, Any] | None) -> EngineStatus | None:
    """The engine's status from its JSON form."""
    if document is None or isinstance(document, EngineStatus):
        return document
    values = dict(document)
    values["memory"] = MemoryReport(**values["memory"])
    return EngineStatus(**values)
