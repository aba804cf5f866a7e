"""Which engine is being served: loading in the background, replacing it, and saying what state it is in."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable
from typing import Literal

from engine.config import EngineConfig
from engine.core import Engine
from engine.errors import ConfigError, HeadroomError
from engine.models import resolve
from engine.models.loader import resolve_device
from engine.outputs import RequestOutput
from engine.sizing import release_memory
from engine.status import EngineSnapshot
from engine.telemetry.gpu import gpu_uuid
from engine.telemetry.sampler import TelemetrySampler
from engine.worker.loop import EngineLoop
from kernels.cpu.build import build

logger = logging.getLogger(__name__)

Phase = Literal["loading", "ready", "failed", "dead"]


class NotReadyError(HeadroomError):
    """No model is loaded (yet, or any more)."""


@dataclasses.dataclass(frozen=True, slots=True)
class LoadState:
    """How far a load is.

    Attributes:
        phase: "loading", "ready", "failed" (no model is loaded) or "dead" (the stepping thread has given up).
        model: what is loaded or being loaded.
        stage, progress: what is being done, and the fraction of the whole, from 0 to 1.
        error: ``{"message", "field", "remedy"}`` of the last load that failed, also if the previous model serves on.
    """

    phase: Phase
    model: str
    stage: str
    progress: float | None
    error: dict[str, str | None] | None


class EngineHost:
    """Holds the engine that requests go to.

    A load is refused before anything is given up if the new model cannot be resolved. Then the previous engine is
    stopped (its memory is needed) and, should the new one fail after all, loaded again.

    Args:
        on_finished: sees the last output of every request.
        telemetry: is told which GPU the model is on, and closed with the host.
        on_ready: is told of every engine before it serves.
        before_load: called in the thread that loads, before each load.
    """

    def __init__(
        self,
        on_finished: Callable[[RequestOutput], None] | None = None,
        telemetry: TelemetrySampler | None = None,
        on_ready: Callable[[EngineSnapshot], None] | None = None,
        before_load: Callable[[], None] | None = None,
    ) -> None:
        self._before_load = before_load
        self._on_finished = on_finished
        self._on_ready = on_ready
        self._telemetry = telemetry
        self._loop: EngineLoop | None = None
        self._lock = threading.Lock()
        self._loading = False
        self._state = LoadState("loading", "", "starting", 0.0, None)
        self.started_unix_s = time.time()

    @property
    def loop(self) -> EngineLoop:
        """The engine in service.

        Raises:
            NotReadyError: while none is loaded.
        """
        loop, state = self._loop, self.state()
        if loop is not None and state.phase == "ready":
            return loop
        if state.phase == "loading":
            raise NotReadyError(f"{state.model} is still loading ({state.stage}).", remedy="Try again in a moment.")
        reason = (state.error or {}).get("message") or "no model is loaded"
        remedy = "Load a model." if state.phase == "failed" else "Restart the worker."
        raise NotReadyError(f"the engine is not serving: {reason}", remedy=remedy)

    def state(self) -> LoadState:
        """What is loaded or loading now."""
        state, loop = self._state, self._loop
        if state.phase != "ready" or loop is None or loop.alive:
            return state
        if state is not self._state:  # it was stopped to be replaced, and the state said so first
            return self._state
        error = {"message": loop.error or "it was shut down", "field": None, "remedy": "Restart the worker."}
        return dataclasses.replace(state, phase="dead", error=error)

    def load(self, config: EngineConfig) -> None:
        """Start loading in the background and return.

        Raises:
            ConfigError: if a load is in progress.
        """
        with self._lock:
            if self._loading:
                raise ConfigError("a model is being loaded.", field="model", remedy="Wait until it is ready.")
            self._loading = True
        self._report(config.model)("starting", 0.0)
        threading.Thread(target=self._load, args=(config,), name="load-model", daemon=True).start()

    def close(self, timeout: float = 10.0) -> bool:
        """Stop serving; requests in flight are answered with an error.

        Args:
            timeout: seconds to wait for the step in progress.

        Returns:
            False if a thread is still at work: a load in progress, or a step that takes longer.
        """
        loop = self._loop
        if loop is not None:
            loop.stop(timeout)
        if self._telemetry is not None:
            self._telemetry.close()
        return not self._loading and (loop is None or not loop.running)

    def _load(self, config: EngineConfig) -> None:
        previous = self._loop.snapshot.config if self._loop is not None else None
        error: dict[str, str | None] | None = None
        try:
            if self._before_load is not None:
                self._before_load()
            resolve(config.model, self._report(config.model))  # a wrong name must not cost the model that serves
            self._unload(config.model)
            self._start(config)
        except HeadroomError as exc:  # of the checkpoint or the configuration: the message has all that is known
            logger.error("loading %s failed: %s", config.model, exc)
            error = _describe(exc)
        except Exception as exc:
            logger.exception("loading %s failed", config.model)
            error = _describe(exc)
        try:
            if error is not None:  # only now: the exception held on to what had been loaded of the new model
                release_memory()
                self._recover(previous, error)
        finally:
            with self._lock:
                self._loading = False

    def _start(self, config: EngineConfig, error: dict[str, str | None] | None = None) -> None:
        """Load a model and serve it; ``error`` is what the load before it failed of, to be read while this serves."""
        report = self._report(config.model)
        build_ahead(config, report)
        loop = EngineLoop(Engine.load(config, report))
        if self._on_ready is not None:
            self._on_ready(loop.snapshot)
        loop.on_finished = self._on_finished
        loop.start()
        self._loop = loop
        self._tell_telemetry(gpu_uuid(loop.snapshot.device))
        self._state = LoadState("ready", config.model, "ready", 1.0, error)

    def _tell_telemetry(self, gpu: str | None) -> None:
        if self._telemetry is not None:
            self._telemetry.engine_gpu = gpu

    def _unload(self, successor: str) -> None:
        if self._loop is not None:
            # First of all: an engine that is stopped to be replaced is not one that has died.
            self._state = LoadState("loading", successor, "stopping the previous model", 0.0, None)
            self._loop.stop()
            self._loop = None
            self._tell_telemetry(None)
            release_memory()

    def _recover(self, previous: EngineConfig | None, error: dict[str, str | None]) -> None:
        """Go on with the previous model if there was one; keep the error for people to read either way."""
        if self._loop is not None and self._loop.alive and previous is not None:
            self._state = LoadState("ready", previous.model, "ready", 1.0, error)
            return
        failed = LoadState("failed", self._state.model, "failed", None, error)
        if previous is None:
            self._state = failed
            return
        try:
            self._start(previous, error)
        except Exception:
            logger.exception("the previous model could not be loaded again")
            self._state = failed

    def _report(self, model: str) -> Callable[[str, float], None]:
        def report(stage: str, fraction: float) -> None:
            if self._loop is None or not self._loop.alive:
                self._state = LoadState("loading", model, stage, fraction, None)
            else:  # the previous model serves on meanwhile
                self._state = dataclasses.replace(self._state, stage=f"loading {model}: {stage}", progress=fraction)

        return report


def build_ahead(config: EngineConfig, report: Callable[[str, float], None]) -> None:
    """Build the C++ kernels, where this configuration uses them, while the state says so.

    The engine would build them by itself at their first use, between two stages of its loading. Where they cannot be
    built nothing is said here: the engine says it, along with what it runs instead.
    """
    on_cpu = resolve_device(config.device).type == "cpu"
    if on_cpu and {config.attention, config.linear, config.execution} & {"auto", "native"}:
        build(lambda fraction: report(f"building CPU kernels, once: {fraction:.0%}".replace("%", " %"), fraction))


def _describe(error: Exception) -> dict[str, str | None]:
    if isinstance(error, HeadroomError):
        return error.to_dict()
    return {"message": f"{type(error).__name__}: {error}", "field": None, "remedy": "See the worker's log."}
