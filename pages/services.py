"""What the dashboard process owns once, whatever the number of open tabs: the worker, its feed, the recorder."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

from engine.config import DEFAULT_MODEL, Knob, Tier
from pages.background.feed import Feed
from pages.background.recorder import Job, RunRecorder

logger = logging.getLogger(__name__)

WorkerPhase = Literal["loading", "ready", "failed", "dead"]


class WorkerProcess(Protocol):
    """The part of :class:`engine.worker.supervisor.Worker` that the dashboard uses."""

    def poll(self) -> Any: ...

    def restart(self) -> Any: ...

    def stop(self) -> Any: ...


@dataclasses.dataclass(frozen=True, slots=True)
class WorkerView:
    """State of the worker for people.

    Attributes:
        phase: "loading", "ready", "failed" (alive, but the model could not be loaded) or "dead".
        model: what it serves or loads.
        stage, progress: of a load; progress from 0 to 1, None if unknown.
        error, remedy: of a failed load; also while the previous model keeps serving ("ready").
        ending: how it died, e.g. "killed by signal 9 (SIGKILL)".
        log: its last lines.
    """

    phase: WorkerPhase
    model: str = ""
    stage: str = ""
    progress: float | None = None
    error: str | None = None
    remedy: str | None = None
    ending: str | None = None
    log: Sequence[str] = ()


class Services:
    """The dashboard's side of the engine.

    Args:
        worker: the supervised process.
        client: gives the client of the process that runs now (a restart may move it to another port).
        open_store: gives the store, for the recorder and the pages.
        model: the model it was started with.
    """

    def __init__(
        self, worker: WorkerProcess, client: Callable[[], Any], open_store: Callable[[], Any], model: str
    ) -> None:
        self.worker = worker
        self.model = model
        self._client = client
        self.store = open_store
        self.feed = Feed(client)
        self.recorder = RunRecorder(client, open_store, self.death_notice, self.describe)
        self._pool = concurrent.futures.ThreadPoolExecutor(max_workers=4, thread_name_prefix="change")
        self._lock = threading.Lock()
        self._restart_lock = threading.Lock()
        self._restarted_unix_s = 0.0
        self._knobs: list[Knob] = []
        self._workloads: list[Mapping[str, Any]] = []
        self._health: tuple[float, Mapping[str, Any]] = (0.0, {})

    @property
    def client(self) -> Any:
        """The :class:`engine.worker.client.EngineClient` of the worker that runs now."""
        return self._client()

    def view(self, max_age_s: float = 0.4) -> WorkerView:
        """The worker's state; asks a living worker's ``/health`` at most once per ``max_age_s``. Never raises."""
        process = self.worker.poll()
        log = tuple(getattr(process, "log", ()) or ())
        if process.state == "dead":
            return WorkerView("dead", model=self.model, ending=describe_exit(process.exit_code), log=log)
        health = self._read_health(max_age_s)
        phase = health.get("status") or "loading"
        error = health.get("error")
        detail = error if isinstance(error, Mapping) else {"message": error}
        if phase == "dead":  # the process lives, its stepping thread has given up
            return WorkerView("dead", model=self.model, ending=detail.get("message") or "unknown reason", log=log)
        return WorkerView(
            phase=phase,  # type: ignore[arg-type]
            model=str(health.get("model") or self.model),
            stage=str(health.get("stage") or "starting the engine process"),
            progress=health.get("progress"),
            error=detail.get("message"),
            remedy=detail.get("remedy"),
            log=log,
        )

    def death_notice(self) -> str | None:
        """How the worker process died, None while it lives."""
        process = self.worker.poll()
        return describe_exit(process.exit_code) if process.state == "dead" else None

    def lost_jobs(self) -> list[Job]:
        """Jobs that the last death of the worker has ended."""
        since = self._restarted_unix_s
        return [job for job in self.recorder.jobs() if job.state == "failed" and job.started_unix_s >= since]

    def describe(self) -> dict[str, Any]:
        """Facts for the announcement of a run, from the last status."""
        engine = self.feed.latest().engine
        if engine is None:
            return {"model": self.model}
        return {
            "model": engine.model.get("name", self.model),
            "fingerprint": engine.model.get("fingerprint", ""),
            "config": engine.config,
            "config_hash": engine.config_hash,
            "path": engine.path,
        }

    def knobs(self) -> list[Knob]:
        """The knobs as the worker publishes them (read once)."""
        if not self._knobs:
            self._knobs = [knob_from_json(item) for item in self.client.config()["knobs"]]
        return self._knobs

    def workloads(self) -> list[Mapping[str, Any]]:
        """The worker's named workloads (read once)."""
        if not self._workloads:
            answer = self.client.workloads()
            self._workloads = list(answer["workloads"] if isinstance(answer, Mapping) else answer)
        return self._workloads

    def change(self, changes: Mapping[str, Any], *, force: bool = False) -> concurrent.futures.Future[Any]:
        """Reconfigure the engine in the background; the future gives the ReconfigureResult or the error.

        Args:
            force: also while a run is being recorded, which is then marked as disturbed.
        """
        options = {"force": True} if force else {}
        return self._pool.submit(lambda: self.client.patch_config(dict(changes), **options))

    def load(self, config: Mapping[str, Any], *, force: bool = False) -> None:
        """Load a model (in the worker's background).

        Args:
            force: also while a run is being recorded, which this ends or marks as disturbed.

        Raises:
            HeadroomError: if the worker refuses the knobs.
        """
        self.client.load(dict(config), **({"force": True} if force else {}))
        self._forget_health()

    def restart(self) -> None:
        """Start the worker again if it died (another tab may have done so already)."""
        with self._restart_lock:
            if self.view(max_age_s=0.0).phase == "dead":
                logger.info("the engine worker is started again")
                self.worker.restart()
                self._restarted_unix_s = time.time()
                self._forget_health()

    def close(self) -> None:
        """Stop the worker (at the end of the dashboard process)."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self.worker.stop()

    def _read_health(self, max_age_s: float) -> Mapping[str, Any]:
        with self._lock:
            read_at, health = self._health
            if time.monotonic() - read_at < max_age_s:
                return health
        try:
            health = self.client.health()
        except Exception:  # not listening yet, or dying: the supervisor knows which at its next poll
            health = {"status": "loading"}
        with self._lock:
            self._health = (time.monotonic(), health)
        return health

    def _forget_health(self) -> None:
        with self._lock:
            self._health = (0.0, {})


def knob_from_json(item: Mapping[str, Any]) -> Knob:
    """A knob from the schema that ``GET /admin/config`` publishes."""
    depends = item.get("depends_on")
    values = {
        **item,
        "tier": Tier(item["tier"]),
        "choices": tuple(item["choices"]),
        "depends_on": tuple(depends) if depends else None,
    }
    return Knob(**values)


def describe_exit(exit_code: int | None) -> str:
    """An exit code in words.

    >>> describe_exit(-9)
    'killed by signal 9 (SIGKILL)'
    >>> describe_exit(1)
    'exit code 1'
    """
    if exit_code is None:
        return "it could not be started"
    if exit_code < 0:
        try:
            name = signal.Signals(-exit_code).name
        except ValueError:
            name = "unknown"
        return f"killed by signal {-exit_code} ({name})"
    return f"exit code {exit_code}"


_services: Services | None = None
_services_lock = threading.Lock()


def get_services() -> Services:
    """The services of this process; the first call starts the worker."""
    global _services
    with _services_lock:
        if _services is None:
            _services = create_services()
        return _services


def close_services() -> None:
    """Stop the worker, at the end of the process."""
    global _services
    with _services_lock:
        if _services is not None:
            _services.close()
            _services = None


def create_services() -> Services:
    """Start the worker with ``HEADROOM_MODEL`` and wire everything to it."""
    from engine.config import EngineConfig
    from engine.worker.supervisor import Worker
    from pages.shared.store import get_store

    model = os.environ.get("HEADROOM_MODEL") or DEFAULT_MODEL
    worker = Worker(model, EngineConfig())
    worker.start()
    return Services(worker, lambda: worker.client, get_store, model)
