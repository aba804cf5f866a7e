"""A thread of its own for an engine, and a thread-safe face on it.

    callers ──submit / abort / call──> inbox ──┐  stepping thread
                                               ├── apply inbox → step → deliver outputs → again
    callers <──on_output (quick!)──────────────┘

Everything that touches the engine happens in the stepping thread, between two steps. Other threads read what the loop
publishes: an immutable :class:`engine.status.EngineSnapshot`, replaced as a whole before anybody hears that something
has changed, and the numbered logs of steps and events. Work that can be done alongside the engine (quantizing new
weights) happens in the caller's thread first.

Whatever is posted is answered: what it raises, and that the engine has stopped before its turn came, goes to whoever
posted it. Nothing that is posted, and no callback, ends the thread.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import logging
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from engine import reconfigure
from engine.core import Engine
from engine.errors import EngineDeadError, HeadroomError, shown
from engine.outputs import EngineEvent, EngineStatus, ReconfigureResult, RequestOutput, RequestTimes, StepStats
from engine.ring import Ring
from engine.sampling.params import SamplingParams
from engine.status import EngineSnapshot, take_snapshot, take_status

logger = logging.getLogger(__name__)

T = TypeVar("T")
OutputCallback = Callable[[RequestOutput], None]

# After so many steps in a row of which nothing could be computed the engine is asked whether it can step at all.
FAILURES_IN_A_ROW = 3
REQUESTS_NAMED = 20  # of those in flight, in a line of the log


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
        engine: the stepping thread's alone from :meth:`start` on.

    Attributes:
        snapshot: what any thread may know of the engine; up to date between two steps.
        steps, events: its numbered logs, of which any thread may ask what is new.
        error: what has ended the stepping thread; None while nothing has.
        on_finished: sees the last output of every request (metrics).
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.snapshot: EngineSnapshot = take_snapshot(engine)
        self.steps: Ring[StepStats] = engine.steps
        self.events: Ring[EngineEvent] = engine.events
        self.error: str | None = None
        self._inbox: list[_Action] = []
        self._submitted = 0  # requests among it
        self._wake = threading.Condition()
        self._callbacks: dict[str, OutputCallback] = {}
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine-step", daemon=True)
        self._reconfiguring = threading.Lock()
        self._status: tuple[float, EngineStatus] | None = None
        self._tried_again = False
        self._failures = 0  # in a row: steps that raised as a whole, tried again too
        self.on_finished: OutputCallback | None = None

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
        self._publish()
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
        self.snapshot.admission.check(prompt_token_ids, params, priority)
        identifier = request_id or uuid.uuid4().hex

        def add() -> None:
            self.engine.add_request(identifier, prompt_token_ids, params, priority, arrival)
            self._callbacks[identifier] = on_output

        def refuse(error: BaseException) -> None:
            times = RequestTimes(arrival=arrival, end=time.perf_counter())
            on_output(RequestOutput.refused(identifier, prompt_token_ids, times, error))

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
            # Nobody applies a change meanwhile, and preparing only reads what no step changes.
            prepared = reconfigure.prepare(self.engine, changes)
            return self._change(lambda engine: reconfigure.apply(engine, prepared))

    def resize(self) -> ReconfigureResult:
        """Give the KV cache the memory that lighter weights have left; running requests are computed again.

        Raises:
            CapacityError: if the machine does not have the memory after all; then nothing has changed.
            EngineDeadError: if the engine has stopped.
        """
        with self._reconfiguring:
            return self._change(reconfigure.resize)

    def reset_prefix_cache(self) -> int:
        """Forget every reusable prefix; how many blocks were reusable.

        Raises:
            EngineDeadError: if the engine has stopped.
        """

        def reset(engine: Engine) -> int:
            blocks = engine.reset_prefix_cache()
            engine.add_event("cache", f"prefix cache reset: {blocks:,} blocks forgotten", {"blocks": blocks})
            return blocks

        return self._change(reset)

    def call(self, function: Callable[[Engine], T], timeout: float | None = None) -> T:
        """Run ``function`` in the stepping thread between two steps; its result, or the exception it raised.

        What it has changed stands in :attr:`snapshot` when this returns.
        """
        if threading.current_thread() is self._thread:
            return function(self.engine)
        future: concurrent.futures.Future[T] = concurrent.futures.Future()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(self._publishing(function))
                except BaseException as error:
                    future.set_exception(error)

        def answer(error: BaseException) -> None:
            if not future.done() and (future.running() or future.set_running_or_notify_cancel()):
                future.set_exception(error)

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

    def status_now(self) -> EngineStatus:
        """A picture taken for this call, however long the step in the way is.

        Raises:
            EngineDeadError: if the engine has stopped.
        """
        return self.call(self._take_status)

    def add_event(self, kind: str, summary: str, detail: dict[str, Any]) -> None:
        """Write into the event log."""
        self._post(_Action(lambda: self.engine.add_event(kind, summary, detail), _report))

    # -- the stepping thread ---------------------------------------------------------------------------

    def _publish(self) -> None:
        """Have other threads see what is true now."""
        if not self.snapshot.shows(self.engine):
            self.snapshot = take_snapshot(self.engine)

    def _publishing(self, function: Callable[[Engine], T]) -> T:
        try:
            return function(self.engine)
        finally:
            self._publish()

    def _take_status(self, engine: Engine) -> EngineStatus:
        status = take_status(engine)
        self._status = (time.monotonic(), status)
        return status

    def _change(self, function: Callable[[Engine], T]) -> T:
        """As :meth:`call`; whoever asks for the status afterwards is not shown the picture from before it."""

        def run(engine: Engine) -> T:
            result = function(engine)
            self._take_status(engine)
            return result

        return self.call(run)

    def _post(self, action: _Action) -> None:
        with self._wake:
            if not self.alive:
                raise self._dead()
            if action.submits:
                self.snapshot.admission.check_queue(len(self._callbacks) + self._submitted)
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
            logger.critical("the engine stops: %s (%s)", self.error, self._in_flight(), exc_info=error)
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
            self._tried_again, self._failures = False, 0
        except Exception as error:  # not of a row, which would have ended alone
            outputs = self._go_on_after(error)
        self._deliver(outputs)
        if self.engine.fruitless_steps >= FAILURES_IN_A_ROW:
            reason = self.engine.why_nothing_computes()
            if reason is not None:
                raise EngineDeadError(f"no request can be computed any more: {reason}")

    def _go_on_after(self, error: Exception) -> list[RequestOutput]:
        """A step raised as a whole: it is tried again once, then its requests are given up; at last the engine is."""
        message = f"a step failed: {type(error).__name__}: {error}"
        logger.error("%s (%s)", message, self._in_flight(), exc_info=error)
        self.engine.add_event("error", message, {"traceback": "".join(traceback.format_exception(error))})
        self._tried_again = not self._tried_again
        if self._tried_again:
            self.engine.start_over()
            return []
        self._failures += 1
        if self._failures >= FAILURES_IN_A_ROW:
            raise error
        return self.engine.fail_all(message)

    def _in_flight(self) -> str:
        """Whose step it was, for the log."""
        identifiers = list(self._callbacks)
        more = f" and {len(identifiers) - REQUESTS_NAMED:,} more" if len(identifiers) > REQUESTS_NAMED else ""
        return f"requests: {', '.join(map(shown, identifiers[:REQUESTS_NAMED])) or 'none'}{more}"

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


def _answer(action: _Action, error: BaseException) -> None:
    try:
        action.answer(error)
    except BaseException as another:
        _report(another)


def _report(error: BaseException) -> None:
    """For what nobody waits for: a bug's traceback goes to the log."""
    if not isinstance(error, HeadroomError):
        logger.error("%s: %s", type(error).__name__, error, exc_info=error)
