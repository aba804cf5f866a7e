"""A thread of its own for an engine, and a thread-safe face on it.

    callers ──submit / abort / call──> inbox ──┐  stepping thread
                                               ├── apply inbox → step → deliver outputs → again
    callers <──on_output (quick!)──────────────┘

Everything that touches the engine happens in the stepping thread, between two steps. Work that can be done beside it
(quantizing new weights) happens in the caller's thread first.
"""

from __future__ import annotations

import concurrent.futures
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from engine.core import Engine, PreparedChange
from engine.errors import EngineDeadError
from engine.outputs import EngineEvent, EngineStatus, ReconfigureResult, RequestOutput, StepStats
from engine.sampling import SamplingParams

T = TypeVar("T")
OutputCallback = Callable[[RequestOutput], None]

# A step that fails is answered to its requests and the engine goes on; this many in a row and it gives up.
FAILURES_IN_A_ROW = 3


class EngineLoop:
    """Owns the stepping thread of one engine.

    Args:
        engine: not to be touched by anybody else from :meth:`start` on, except for reading ``model`` and ``config``.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.error: str | None = None
        self._inbox: list[Callable[[], None]] = []
        self._wake = threading.Condition()
        self._callbacks: dict[str, OutputCallback] = {}
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine-step", daemon=True)
        self._reconfiguring = threading.Lock()
        self._status: tuple[float, EngineStatus] | None = None
        self._failures = 0
        self.on_finished: OutputCallback | None = None  # sees the last output of every request (metrics)

    @property
    def alive(self) -> bool:
        """True while requests can be submitted."""
        return self._thread.is_alive() and not self._stopping and self.error is None

    @property
    def running(self) -> bool:
        """True until the stepping thread has ended."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Start stepping."""
        self._thread.start()

    def stop(self, timeout: float = 10.0) -> None:
        """Abort what is in flight and end the thread.

        Args:
            timeout: seconds to wait for the step in progress.
        """
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join(timeout)

    def submit(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        on_output: OutputCallback,
        request_id: str | None = None,
        priority: int = 0,
    ) -> str:
        """Queue a request.

        Args:
            on_output: called in the stepping thread with each :class:`RequestOutput`, the last one ``finished``; it
                must return at once (put the output on a queue).

        Returns:
            The request's id.

        Raises:
            RequestError: if the request is malformed or could never finish.
            EngineDeadError: if the engine has stopped.
        """
        arrival = time.perf_counter()
        self.engine.validate_request(prompt_token_ids, params)
        identifier = request_id or uuid.uuid4().hex

        def add() -> None:
            self.engine.add_request(identifier, prompt_token_ids, params, priority, arrival)
            self._callbacks[identifier] = on_output

        if request_id is None:
            self._post(add)
        else:  # the caller chose the id, so it may be taken: find out before returning
            self.call(lambda _: add())
        return identifier

    def abort(self, request_id: str) -> None:
        """End a request; its callback gets a last output with finish_reason "abort". Unknown ids are ignored."""

        def drop() -> None:
            output = self.engine.abort(request_id)
            if output is not None:
                self._deliver([output])

        if self.alive:
            self._post(drop)

    def reconfigure(self, changes: Mapping[str, Any]) -> ReconfigureResult:
        """Change knobs while requests are in flight: prepared here, applied between two steps.

        Raises:
            ConfigError, CapacityError: naming the knob and the remedy; then nothing has changed.
            EngineDeadError: if the engine has stopped.
        """
        with self._reconfiguring:  # two changes prepared at once could each undo the other
            prepared = self.engine.prepare(changes)
            return self.call(lambda engine: self._apply(engine, prepared))

    def resize(self) -> ReconfigureResult:
        """Give the KV cache the memory that lighter weights have left; running requests are computed again.

        Raises:
            CapacityError: if the machine does not have the memory after all; then nothing has changed.
            EngineDeadError: if the engine has stopped.
        """

        def resize(engine: Engine) -> ReconfigureResult:
            result = engine.resize()
            self._take_status(engine)
            return result

        with self._reconfiguring:
            return self.call(resize)

    def call(self, function: Callable[[Engine], T], timeout: float | None = None) -> T:
        """Run ``function`` in the stepping thread between two steps; its result, or the exception it raised."""
        if threading.current_thread() is self._thread:
            return function(self.engine)
        future: concurrent.futures.Future[T] = concurrent.futures.Future()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function(self.engine))
                except BaseException as problem:
                    future.set_exception(problem)

        self._post(run)
        while True:
            try:
                return future.result(timeout=0.5 if timeout is None else timeout)
            except concurrent.futures.TimeoutError:
                if future.done():
                    raise
                if timeout is not None:
                    future.cancel()
                    raise
                if not self._thread.is_alive():
                    raise self._dead() from None

    def status(self, max_age_s: float = 0.25) -> EngineStatus:
        """A picture of the engine, at most ``max_age_s`` old unless a long step is in the way (then the last one)."""
        now = time.monotonic()
        if self._status is not None and now - self._status[0] < max_age_s:
            return self._status[1]
        try:
            return self.call(self._take_status, timeout=0.5 if self._status else None)
        except (concurrent.futures.TimeoutError, EngineDeadError):
            if self._status is None:
                raise
            return self._status[1]

    def steps_since(self, index: int) -> list[StepStats]:
        """Steps numbered ``index`` or later that are still kept."""
        return self.engine.steps.since(index)

    def events_since(self, index: int) -> list[EngineEvent]:
        """Events numbered ``index`` or later that are still kept."""
        return self.engine.events.since(index)

    def add_event(self, kind: str, summary: str, detail: dict[str, Any]) -> None:
        """Write into the event log."""
        self._post(lambda: self.engine.add_event(kind, summary, detail))

    # -- the stepping thread ---------------------------------------------------------------------------

    def _apply(self, engine: Engine, prepared: PreparedChange) -> ReconfigureResult:
        result = engine.apply(prepared)
        self._take_status(engine)  # whoever asks after a change must not be shown the picture from before it
        return result

    def _take_status(self, engine: Engine) -> EngineStatus:
        status = engine.status()
        self._status = (time.monotonic(), status)
        return status

    def _post(self, action: Callable[[], None]) -> None:
        with self._wake:
            if not self.alive:
                raise self._dead()
            self._inbox.append(action)
            self._wake.notify()

    def _dead(self) -> EngineDeadError:
        return EngineDeadError(
            f"the engine has stopped: {self.error or 'it was shut down'}.", remedy="Restart the worker."
        )

    def _run(self) -> None:
        try:
            while self._apply_inbox():
                if self._has_work():
                    self._step()
        except BaseException as problem:
            self.error = f"{type(problem).__name__}: {problem}"
            traceback.print_exc()
        finally:
            self._stopping = True
            self._deliver(self.engine.fail_all(self.error or "the engine was shut down"))
            self.engine.close()

    def _apply_inbox(self) -> bool:
        """Wait until there is something to do, run what callers posted; False once the loop is to end."""
        with self._wake:
            while not (self._inbox or self._stopping or self._has_work()):
                self._wake.wait()
            actions, self._inbox = self._inbox, []
            stopping = self._stopping
        for action in actions:
            action()
        return not stopping

    def _has_work(self) -> bool:
        return self.engine.has_unfinished() or self.engine.has_preparation()

    def _step(self) -> None:
        try:
            outputs = self.engine.step()
            self._failures = 0
        except Exception as problem:
            traceback.print_exc()
            self._failures += 1
            if self._failures >= FAILURES_IN_A_ROW:
                raise
            message = f"a step failed: {type(problem).__name__}: {problem}"
            self.engine.add_event("error", message, {"traceback": traceback.format_exc()})
            outputs = self.engine.fail_all(message)
        self._deliver(outputs)

    def _deliver(self, outputs: Sequence[RequestOutput]) -> None:
        for output in outputs:
            callback = self._callbacks.get(output.request_id)
            listeners = [callback]
            if output.finished:
                self._callbacks.pop(output.request_id, None)
                listeners.append(self.on_finished)
            for listener in listeners:
                if listener is not None:
                    try:
                        listener(output)
                    except Exception:  # a client's trouble is not the engine's
                        traceback.print_exc()
