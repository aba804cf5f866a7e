"""A thread of its own for an engine, and a thread-safe face on it.

    callers ──submit / abort / call──> inbox ──┐  stepping thread
                                               ├── apply inbox → step → deliver outputs → again
    callers <──on_output (quick!)──────────────┘

Everything that touches the engine happens in the stepping thread, between two steps. Work that can be done beside it
(quantizing new weights) happens in the caller's thread first.

Whatever is posted is answered: what it raises, and that the engine has stopped before its turn came, goes to whoever
posted it. Nothing that is posted, and no callback, ends the thread.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from engine.core import Engine
from engine.errors import EngineDeadError, HeadroomError
from engine.outputs import EngineEvent, EngineStatus, ReconfigureResult, RequestOutput, RequestTimes, StepStats
from engine.sampling.params import SamplingParams

T = TypeVar("T")
OutputCallback = Callable[[RequestOutput], None]

# After so many steps in a row of which nothing could be computed the engine is asked whether it can step at all.
FAILURES_IN_A_ROW = 3


@dataclasses.dataclass(frozen=True, slots=True)
class _Action:
    """Something to be done in the stepping thread.

    Attributes:
        run: does it.
        answer: told what it raised, or that it will not be run any more.
        submits: it queues a request.
    """

    run: Callable[[], None]
    answer: Callable[[BaseException], None]
    submits: bool = False


class EngineLoop:
    """Owns the stepping thread of one engine.

    Args:
        engine: not to be touched by anybody else from :meth:`start` on, except for reading ``model``, ``config`` and
            ``admission``, which are replaced as a whole.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.error: str | None = None
        self._inbox: list[_Action] = []
        self._submitted = 0  # requests among it
        self._wake = threading.Condition()
        self._callbacks: dict[str, OutputCallback] = {}
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine-step", daemon=True)
        self._reconfiguring = threading.Lock()
        self._status: tuple[float, EngineStatus] | None = None
        self._tried_anew = False
        self._failures = 0  # in a row: steps that raised as a whole, tried again too
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
            The request's id. If it cannot be queued after all, because knobs were changed meanwhile, its callback gets
            one output, finished, with finish_reason "error" and what would have been raised as ``refusal``.

        Raises:
            RequestError: if the request is malformed or could never finish.
            QueueFullError: if as many requests as the engine takes are running or waiting.
            EngineDeadError: if the engine has stopped.
        """
        arrival = time.perf_counter()
        self.engine.validate_request(prompt_token_ids, params, priority)
        identifier = request_id or uuid.uuid4().hex

        def add() -> None:
            self.engine.add_request(identifier, prompt_token_ids, params, priority, arrival)
            self._callbacks[identifier] = on_output

        def refuse(problem: BaseException) -> None:
            times = RequestTimes(arrival=arrival, end=time.perf_counter())
            on_output(RequestOutput.refused(identifier, prompt_token_ids, times, problem))

        if request_id is None:
            self._post(_Action(add, refuse, submits=True))
        else:  # the caller chose the id, so it may be taken: find out before returning
            self.call(lambda _: add())
        return identifier

    def abort(self, request_id: str) -> None:
        """End a request; its callback gets a last output with finish_reason "abort". Unknown ids are ignored."""

        def drop() -> None:
            output = self.engine.abort(request_id)
            if output is not None:
                self._deliver([output])

        with contextlib.suppress(EngineDeadError):  # then it has ended
            self._post(_Action(drop, _report))

    def reconfigure(self, changes: Mapping[str, Any]) -> ReconfigureResult:
        """Change knobs while requests are in flight: prepared here, applied between two steps.

        Raises:
            ConfigError, CapacityError: naming the knob and the remedy; then nothing has changed.
            EngineDeadError: if the engine has stopped.
        """
        with self._reconfiguring:  # two changes prepared at once could each undo the other
            prepared = self.engine.prepare(changes)
            return self.change(lambda engine: engine.apply(prepared))

    def resize(self) -> ReconfigureResult:
        """Give the KV cache the memory that lighter weights have left; running requests are computed again.

        Raises:
            CapacityError: if the machine does not have the memory after all; then nothing has changed.
            EngineDeadError: if the engine has stopped.
        """
        with self._reconfiguring:
            return self.change(Engine.resize)

    def change(self, function: Callable[[Engine], T]) -> T:
        """As :meth:`call`; whoever asks for the status afterwards is not shown the picture from before it."""

        def run(engine: Engine) -> T:
            result = function(engine)
            self._take_status(engine)
            return result

        return self.call(run)

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

        def answer(problem: BaseException) -> None:
            if not future.done() and (future.running() or future.set_running_or_notify_cancel()):
                future.set_exception(problem)

        self._post(_Action(run, answer))
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
        self._post(_Action(lambda: self.engine.add_event(kind, summary, detail), _report))

    # -- the stepping thread ---------------------------------------------------------------------------

    def _take_status(self, engine: Engine) -> EngineStatus:
        status = engine.status()
        self._status = (time.monotonic(), status)
        return status

    def _post(self, action: _Action) -> None:
        with self._wake:
            if not self.alive:
                raise self._dead()
            if action.submits:
                self.engine.admission.check_queue(len(self._callbacks) + self._submitted)
                self._submitted += 1
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
        except BaseException as error:
            self.error = f"{type(error).__name__}: {error}"
            traceback.print_exc()
        finally:
            self._end()

    def _end(self) -> None:
        """Answer everybody, whatever state the engine is in."""
        with self._wake:
            self._stopping = True
            actions, self._inbox = self._inbox, []
        reason = self.error or "the engine was shut down"
        for action in actions:
            _answer(action, self._dead())
        try:
            self._deliver(self.engine.fail_all(reason))
        except BaseException as error:
            _report(error)
        for identifier, callback in list(self._callbacks.items()):  # whom a broken engine does not know any more
            times = RequestTimes(arrival=time.perf_counter())
            _call(callback, RequestOutput.refused(identifier, [], times, self._dead()))
        self._callbacks.clear()
        try:
            self.engine.close()
        except BaseException as error:
            _report(error)

    def _apply_inbox(self) -> bool:
        """Wait until there is something to do, run what callers posted; False once the loop is to end."""
        with self._wake:
            while not (self._inbox or self._stopping or self._has_work()):
                self._wake.wait()
            actions, self._inbox = self._inbox, []
            stopping = self._stopping
        for action in actions:
            try:
                action.run()
            except BaseException as error:
                _answer(action, error)
            if action.submits:
                with self._wake:
                    self._submitted -= 1
        return not stopping

    def _has_work(self) -> bool:
        return self.engine.has_unfinished() or self.engine.has_preparation()

    def _step(self) -> None:
        try:
            outputs = self.engine.step()
            self._tried_anew, self._failures = False, 0
        except Exception as error:  # not of a row, which would have ended alone
            outputs = self._go_on_after(error)
        self._deliver(outputs)
        if self.engine.fruitless_steps >= FAILURES_IN_A_ROW:
            unsupported = self.engine.unsupported()
            if unsupported is not None:
                raise EngineDeadError(f"no request can be computed any more: {unsupported}")

    def _go_on_after(self, problem: Exception) -> list[RequestOutput]:
        """A step raised as a whole: it is tried again once, then its requests are given up; at last the engine is."""
        traceback.print_exc()
        message = f"a step failed: {type(problem).__name__}: {problem}"
        self.engine.add_event("error", message, {"traceback": traceback.format_exc()})
        self._tried_anew = not self._tried_anew
        if self._tried_anew:
            self.engine.start_over()
            return []
        self._failures += 1
        if self._failures >= FAILURES_IN_A_ROW:
            raise problem
        return self.engine.fail_all(message)

    def _deliver(self, outputs: Sequence[RequestOutput]) -> None:
        for output in outputs:
            self._hand_out(output)

    def _hand_out(self, output: RequestOutput) -> None:
        """Give an output to its client, and end the request of a client that cannot take it."""
        callback = self._callbacks.get(output.request_id)
        error = _call(callback, output)
        if error is not None and not output.finished:
            reason = f"its output could not be delivered: {type(error).__name__}: {error}"
            last = self.engine.fail(output.request_id, reason)
            if last is not None:
                output = last
                _call(callback, output)
        if output.finished:
            self._callbacks.pop(output.request_id, None)
            _call(self.on_finished, output)


def _call(listener: OutputCallback | None, output: RequestOutput) -> BaseException | None:
    """Tell somebody of an output; what that raised, if anything: a client's trouble is not the engine's."""
    if listener is None:
        return None
    try:
        listener(output)
    except BaseException as error:
        _report(error)
        return error
    return None


def _answer(action: _Action, problem: BaseException) -> None:
    try:
        action.answer(problem)
    except BaseException as another:
        _report(another)


def _report(problem: BaseException) -> None:
    """For what nobody waits for: a bug's traceback goes to standard error."""
    if not isinstance(problem, HeadroomError):
        traceback.print_exception(problem)
