"""The step of the engine: schedule → run → sample → commit.

An :class:`Engine` is used from one thread. :class:`engine.worker.loop.EngineLoop` gives it a thread of its own;
:mod:`engine.reconfigure` changes its knobs between two steps; :mod:`engine.status` tells what really runs.
"""

from __future__ import annotations

import functools
import logging
import secrets
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from engine import parts
from engine.batching.drafting import Drafting
from engine.batching.request import Request, RequestState
from engine.batching.scheduler import Schedule, ScheduledRequest
from engine.batching.step_log import StepClock, StepCounters, StepLog
from engine.config import EngineConfig
from engine.delivery import Delivery, OutputStream, rows_of, sampling_rows
from engine.device import on_device
from engine.errors import RequestError, shown
from engine.isolation import (
    Failure,
    Failures,
    Sampled,
    compute_apart,
    copy_blocks,
    find_unschedulable,
    sample_rows,
    why_no_token,
)
from engine.outputs import FinishReason, RequestOutput, RequestTimes
from engine.ring import EventLog
from engine.sampling.params import NO_TOKEN, SamplingParams

if TYPE_CHECKING:
    from engine.models import LoadedModel

logger = logging.getLogger(__name__)


class Engine:
    """One model, one paged cache, one scheduler.

    Args:
        model: what :func:`engine.models.load_model` gave.
        config: every knob; `weights` is applied if the model is not in that format yet.

    Attributes:
        model, config: what it was made of; the configuration is replaced as a whole.
        kernels, envelope, admission: what that comes to for this model on this machine; replaced as wholes, too.
        cache, executor, runner: what a forward pass runs on, see :class:`engine.parts.CacheParts`.
        scheduler: queues and block tables.
        drafting: who drafts, and what came of it.
        streams: requests in flight by id, each with its way out.
        steps, events: numbered logs, see :class:`engine.ring.Ring`; totals: see :class:`engine.outputs.EngineStatus`.
        fruitless_steps: in a row: steps of which no row could be computed.

    Raises:
        CapacityError: if the cache would not hold a useful number of tokens; the message has the arithmetic.
        ConfigError: if a knob asks for what this machine or model cannot do.
    """

    def __init__(self, model: LoadedModel, config: EngineConfig) -> None:
        self.model, self.tokenizer, self.config = model, model.tokenizer, config
        self.kernels = parts.choose_kernels(model, config)
        self.envelope = parts.bring_into_shape(model, config)
        self.admission = parts.make_admission(model, config, self.envelope)
        self.scheduler = parts.make_scheduler(model, config, self.envelope)
        self.events = EventLog()
        self.add_event = self.events.add
        self.hooks = parts.Hooks(self.add_event, lambda logits: self.kernels.warm_up_sampler(logits))
        cache = parts.make_cache(model, config, self.envelope)
        self.use(parts.work_on(cache, model, config, self.envelope, self.hooks))
        self.executor.check(config, self.kernels.attention)
        self.drafting = Drafting(config, self._note)
        self.streams: dict[str, OutputStream] = {}
        self._sampling_rows = functools.partial(sampling_rows, self.streams)
        self._delivery = Delivery(model)
        self._log = StepLog()
        self.steps, self.totals = self._log.steps, self._log.totals
        self.fruitless_steps = 0
        self._ended: list[RequestOutput] = []  # last outputs of requests that failed, not handed out yet
        self.executor.configure(config, self.kernels.attention)

    @classmethod
    def load(cls, config: EngineConfig, progress: Callable[[str, float], None] | None = None) -> Engine:
        """Load the model that ``config`` names and make an engine around it.

        Args:
            progress: called with a stage ("weights", …) and the fraction done.

        Raises:
            ModelLoadError, CapacityError, ConfigError: naming the field and the remedy.
        """
        started = time.perf_counter()
        model = parts.load_weights(config, progress)
        engine = cls(model, config)
        for warning in model.warnings:
            engine.add_event("warning", warning, {"model": model.name})
        seconds = time.perf_counter() - started
        engine.add_event("load", f"loaded {model.name} in {seconds:.1f} s", {"seconds": seconds})
        logger.info("loaded %s in %.1f s: %s", model.name, seconds, parts.describe_memory(model, engine.cache))
        return engine

    def use(self, made: parts.CacheParts) -> None:
        """Work on a cache from now on; nothing of what worked on another is left."""
        self.cache, self.executor, self.runner = made.cache, made.executor, made.runner

    def close(self) -> None:
        """Stop what runs alongside the engine (the preparation of compiled shapes)."""
        self.executor.close()

    # -- requests ----------------------------------------------------------------------------------------

    @property
    def requests(self) -> list[Request]:
        """The requests in flight, running or waiting, in the order in which they came."""
        return [stream.request for stream in self.streams.values()]

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        priority: int = 0,
        arrival: float | None = None,
    ) -> None:
        """Queue a request.

        Args:
            request_id: unique among unfinished requests.
            priority: lower runs first and is preempted last.
            arrival: ``time.perf_counter()`` when the client asked; now if not given.

        Raises:
            RequestError: if it is malformed, a duplicate, or could never finish.
            QueueFullError: if as many as the engine takes are in flight.
        """
        self.admission.check(prompt_token_ids, params, priority)
        if request_id in self.streams:
            raise RequestError(
                f"{shown(request_id)} is already in flight.", field="request_id", remedy="Use another id."
            )
        self.admission.check_queue(len(self.streams))
        request = Request(
            request_id=request_id,
            token_ids=list(prompt_token_ids),
            num_prompt_tokens=len(prompt_token_ids),
            params=params,
            priority=priority,
            times=RequestTimes(arrival=time.perf_counter() if arrival is None else arrival),
            seed=(secrets.randbits(63) if params.seed is None else params.seed) % 2**64,
            end_token_ids=self._delivery.end_tokens(params),
        )
        stream = self._delivery.open(request)
        self.scheduler.add(request)
        self.streams[request_id] = stream
        self._log.count_request(len(prompt_token_ids))

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request now and free its blocks; its last output, or None if it is not in flight."""
        stream = self.streams.get(request_id)
        if stream is None:
            return None
        try:
            return self._end(stream, "abort", [])
        except Exception as error:
            return self._fail(stream.request, Failure.of(error, "ending it"))

    def fail(self, request_id: str, reason: str) -> RequestOutput | None:
        """End a request with an error; its last output, or None if it is not in flight."""
        stream = self.streams.get(request_id)
        return None if stream is None else self._fail(stream.request, Failure(reason, ""))

    def fail_all(self, message: str) -> list[RequestOutput]:
        """End every request in flight with an error."""
        return self._take_ended() + [self._fail(request, Failure(message, "")) for request in self.requests]

    def has_unfinished(self) -> bool:
        """True while a request is running or waiting."""
        return bool(self.streams)

    def has_preparation(self) -> bool:
        """True while each :meth:`step` does a piece of what its execution mode prepares, requests or not."""
        return self.executor.has_work

    def reset_prefix_cache(self) -> int:
        """Forget every reusable prefix; requests in flight keep their blocks, which are not offered for reuse again.

        Returns:
            How many blocks were reusable.
        """
        return self.scheduler.pool.reset_prefixes()

    # -- stepping ----------------------------------------------------------------------------------------

    def step(self) -> list[RequestOutput]:
        """Compute one step: schedule → run → sample → commit. Without requests, a piece of preparation is all it does.

        Returns:
            News of every request that got tokens or ended.
        """
        with on_device(self.model.device):
            return self._step()

    def _step(self) -> list[RequestOutput]:
        began = time.perf_counter()
        self._poll()
        self.drafting.propose(self.scheduler.running, self.config)
        schedule = self._schedule()
        self._copy_blocks(schedule)
        scheduled = time.perf_counter()
        rows, logits = self._compute(schedule.rows)
        if logits is None:
            return self._nothing_computed()
        computed = time.perf_counter()
        sampled = sample_rows(self.kernels.sample, logits, rows, self._sampling_rows)
        counters = StepCounters()
        outputs = self._commit(rows, logits, sampled, scheduled, counters)
        self.fruitless_steps = 0 if len(rows) > counters.raised else self.fruitless_steps + 1
        self._record(schedule, counters, StepClock(began, scheduled, computed, time.perf_counter()))
        return outputs + self._take_ended() if self._ended else outputs

    def _nothing_computed(self) -> list[RequestOutput]:
        """There was nothing to do, or none of it could be done."""
        self.fruitless_steps += bool(self._ended)
        return self._take_ended()

    def _take_ended(self) -> list[RequestOutput]:
        ended, self._ended = self._ended, []
        return ended

    def _poll(self) -> None:
        try:
            self.executor.poll()
        except Exception as error:
            self._note(f"execution={self.config.execution} cannot be prepared; eager serves", error)
            self.executor.close()

    def _schedule(self) -> Schedule:
        """What to compute. Where that raises, queues and blocks are made again and every request is computed again."""
        for _ in range(2):
            try:
                return self.scheduler.schedule(self.config)
            except Exception as error:
                self._note("scheduling failed; every request is computed again", error)
            self.start_over()
        make_pool = functools.partial(parts.make_pool, self.config, self.envelope)
        unschedulable = find_unschedulable(self.scheduler, self.requests, self.config, make_pool)
        self.start_over()
        self._give_up(unschedulable)
        while self.streams:
            try:
                return self.scheduler.schedule(self.config)
            except Exception as error:
                failure = Failure.of(error, "scheduling it")
            self.start_over()
            newest = max(self.requests, key=lambda request: request.times.arrival)
            self._give_up([(newest, failure)])
        return Schedule()

    def start_over(self) -> None:
        """Queues and blocks again, after something was raised in the midst of changing them; no token is lost by it."""
        self.scheduler.start_over(self.requests, parts.make_pool(self.config, self.envelope))

    def _copy_blocks(self, schedule: Schedule) -> None:
        """Fill the beginnings of blocks whose tokens another block is known to begin with."""
        if not schedule.copies:
            return
        try:
            failed = copy_blocks(self.cache, schedule.copies)
        finally:
            self.scheduler.copies_done(schedule)
        for row in list(schedule.rows) if failed else ():
            failure = next((failed[block] for block in row.request.block_ids if block in failed), None)
            if failure is not None:
                schedule.rows.remove(row)
                self._give_up([(row.request, failure)])

    def _compute(self, rows: list[ScheduledRequest]) -> tuple[list[ScheduledRequest], torch.Tensor | None]:
        """Those of the rows that can be computed, and their logits; None if there are none. The others have ended."""
        if not rows:
            return rows, None
        attention = self.kernels.attention
        try:
            return rows, self.runner.run(rows, attention)
        except Exception as error:
            computed = compute_apart(lambda part: self.runner.run(part, attention), rows, error)
        for request in computed.undrafted:
            self.drafting.stop(request, None)
        self._give_up(computed.failed)
        return computed.rows, computed.logits

    def why_nothing_computes(self) -> str | None:
        """Why no request can be computed at all: what a step over a token of the engine's own raises. None if nothing.

        For after steps of which no row could be computed: their requests may have been to blame, or the engine.
        """
        request = Request("", [0], 1, SamplingParams(max_tokens=1), 0, RequestTimes(time.perf_counter()), 0)
        try:
            with on_device(self.model.device), self.scheduler.only(request):
                rows = self.scheduler.schedule(self.config).rows
                if rows:
                    self.kernels.sample(self.runner.run(rows, self.kernels.attention), rows_of(rows[0]))
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        self.fruitless_steps = 0
        return None

    def _commit(
        self,
        rows: Sequence[ScheduledRequest],
        logits: torch.Tensor,
        sampled: Sampled,
        scheduled: float,
        counters: StepCounters,
    ) -> list[RequestOutput]:
        """Take over what was computed: tokens, computed counts, finished requests, reusable blocks.

        What raises for a row ends that row, with the tokens that its client knows of.
        """
        outputs: list[RequestOutput] = []
        now = time.perf_counter()
        publishes, size = self.config.prefix_cache, self.config.block_size
        all_tokens, all_chosen = sampled.tokens, NO_TOKEN not in sampled.tokens
        offset = 0
        for row in rows:
            request = row.request
            known = row.num_tokens - row.num_drafts
            end = offset + row.num_drafts + 1 if row.samples else offset
            try:
                if request.times.first_scheduled is None:
                    request.times.first_scheduled = scheduled
                if not row.samples:
                    self._commit_chunk(row, counters)
                    continue
                if known == 1 and len(request.token_ids) > request.num_prompt_tokens:
                    counters.decode_tokens += 1
                else:
                    counters.prefill_tokens += known
                tokens = all_tokens[offset:end]
                if row.num_drafts:
                    tokens = self._verify(row, tokens, counters)
                request.num_computed_tokens = row.start + known + len(tokens) - 1
                stream, failure = self.streams[request.request_id], None
                if not all_chosen and tokens[-1] == NO_TOKEN:
                    failure = _why_failed(sampled, logits, offset + len(tokens) - 1, counters)
                    tokens = tokens[:-1]
                tokens, reason = stream.append(tokens, now)
                if reason is None and failure is None:
                    output = stream.output(tokens)
                else:
                    output = self._end(stream, reason or "error", tokens, None if reason else failure)
                outputs.append(output)  # from here on its client has the tokens
                # Asked here, not there: a call for every row that has no new block is a tenth of what a row costs.
                full = request.num_computed_tokens >= (request.num_published + 1) * size
                if full and publishes and request.state is RequestState.RUNNING:
                    self.scheduler.publish_computed(request)
                if request.params.logprobs is not None:
                    reported = sampled.logprobs[offset : offset + len(output.new_token_ids)]
                    output.logprobs = [entry for entry in reported if entry is not None]
                counters.output_tokens += len(output.new_token_ids)
            except Exception as error:
                counters.raised += 1
                self._fail_row(row, Failure.of(error, "handing out its next token"), outputs)
            offset = end
        return outputs

    def _commit_chunk(self, row: ScheduledRequest, counters: StepCounters) -> None:
        """Take over a piece in the middle of a prompt."""
        counters.prefill_tokens += row.num_tokens
        row.request.num_computed_tokens = row.start + row.num_tokens
        if self.config.prefix_cache:
            self.scheduler.publish_computed(row.request)

    def _verify(self, row: ScheduledRequest, sampled: list[int], counters: StepCounters) -> list[int]:
        """The tokens that a verified draft yields; keeps count of what was accepted."""
        tokens = self.drafting.verify(row, sampled)
        counters.drafts += 1
        counters.draft_tokens += row.num_drafts
        counters.accepted_tokens += len(tokens) - 1
        return tokens

    def _record(self, schedule: Schedule, counters: StepCounters, clock: StepClock) -> None:
        try:
            self._log.record(clock, counters, schedule, self.scheduler, self.executor.last.mode)
            if counters.decode_tokens and not counters.prefill_tokens:
                seconds = clock.done - clock.began
                self.drafting.observe_step(
                    counters.decode_tokens, counters.draft_tokens, counters.output_tokens, seconds
                )
        except Exception as error:  # the outputs are worth more than their statistics
            self._note("the statistics of a step are lost", error)

    # -- ends --------------------------------------------------------------------------------------------

    def _end(
        self, stream: OutputStream, reason: FinishReason, tokens: list[int], failure: Failure | None = None
    ) -> RequestOutput:
        """Finish a request: publish what is reusable, free its blocks, give its last output."""
        request = stream.request
        if failure is not None:
            request.error = failure.reason
            self._report_failure(request, failure)
        request.finish_reason = reason
        request.times.end = time.perf_counter()
        if self.config.prefix_cache and request.state is RequestState.RUNNING and reason != "error":
            self.scheduler.publish_computed(request)
        output = stream.last_output(tokens)
        self._drop(request)
        return output

    def _fail(self, request: Request, failure: Failure, num_known: int | None = None) -> RequestOutput:
        """End a request with an error, whatever state what belongs to it is in; it does not raise.

        Args:
            num_known: see :meth:`engine.delivery.OutputStream.failed_output`.
        """
        request.finish_reason, request.stop_reason, request.error = "error", None, failure.reason
        request.times.end = time.perf_counter()
        output = self.streams[request.request_id].failed_output(num_known)
        self._drop(request)
        if failure.trace:
            self._report_failure(request, failure)
        return output

    def _fail_row(self, row: ScheduledRequest, failure: Failure, outputs: Sequence[RequestOutput]) -> None:
        """End the request of a row whose commit has raised, with the tokens that its client knows of."""
        request = row.request
        if request.state is RequestState.FINISHED:  # it has had its last output
            return
        has_them = not row.samples or (bool(outputs) and outputs[-1].request_id == request.request_id)
        num_known = None if has_them else row.start + row.num_tokens - row.num_drafts
        self._ended.append(self._fail(request, failure, num_known))

    def _give_up(self, failed: Failures) -> None:
        for request, failure in failed:
            self._ended.append(self._fail(request, failure))

    def _drop(self, request: Request) -> None:
        """Forget a request and give its blocks back; it does not raise."""
        del self.streams[request.request_id]
        try:
            self.scheduler.finish(request)
        except Exception as error:
            self._note("giving blocks back failed; every request is computed again", error)
            request.state = RequestState.FINISHED
            self.start_over()
        self.drafting.forget(request.request_id)

    def _report_failure(self, request: Request, failure: Failure) -> None:
        summary = f"request {shown(request.request_id)} ended: {failure.reason}"
        self.add_event("error", summary, {"request_id": request.request_id, "traceback": failure.trace})
        logger.error("%s", summary)

    def _note(self, summary: str, error: Exception | None) -> None:
        """Write a failure that ends no request into the event log."""
        if error is None:
            self.add_event("error", f"{summary}.", {})
            return
        failure = Failure.of(error, summary)
        self.add_event("error", f"{summary}: {type(error).__name__}: {error}", {"traceback": failure.trace})
        logger.warning("%s: %s: %s", summary, type(error).__name__, error)

    # -- looking at it -----------------------------------------------------------------------------------

    def prompt_logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """float32 [T, vocab]: the model's distribution after each token of a text, apart from the serving cache."""
        with on_device(self.model.device):
            return self.runner.prompt_logits(token_ids, self.kernels.attention)

    def check_invariants(self) -> None:
        """Recompute queues, block tables, reference counts, hashes and free list from scratch.

        Raises:
            AssertionError: naming what does not agree.
        """
        self.scheduler.check()
        queued = {r.request_id for r in (*self.scheduler.running, *self.scheduler.waiting)}
        assert queued == self.streams.keys(), "a request is lost or left over"


def _why_failed(sampled: Sampled, logits: torch.Tensor, place: int, counters: StepCounters) -> Failure:
    """Why there is no token at a place of the logits [R, vocab]."""
    failure = sampled.failed.get(place)
    counters.raised += failure is not None
    return failure or Failure(why_no_token(logits[place]), "")
