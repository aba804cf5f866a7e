"""The engine: schedule → run → sample → commit, with reconfiguration between two steps.

An :class:`Engine` is used from one thread. :class:`engine.worker.loop.EngineLoop` gives it a thread of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from engine import sizing
from engine.attention.backends import get_backend
from engine.batching.admission import Admission
from engine.batching.request import Request, RequestState
from engine.batching.scheduler import Schedule, ScheduledRequest, Scheduler
from engine.cache.block_pool import BlockPool
from engine.cache.kv_cache import KVCache
from engine.config import EngineConfig, Tier, knob
from engine.device import on_device
from engine.errors import CapacityError, ConfigError, RequestError, shown
from engine.execution.executor import Executor
from engine.isolation import Failure, Sampled, compute_apart, sample_apart, why_no_token
from engine.models import load_model
from engine.models.detokenizer import Detokenizer, stream_table
from engine.outputs import (
    CacheOffer,
    EngineEvent,
    EngineStatus,
    FinishReason,
    ReconfigureResult,
    RequestOutput,
    RequestTimes,
    StepStats,
    Transcript,
)
from engine.quantization.registry import WeightChoice
from engine.ring import Ring
from engine.runner import Runner
from engine.sampling.params import NO_TOKEN, SamplingParams, SamplingRow
from engine.sampling.samplers import get_sampler, warm_up_sampler
from engine.speculation.draft_control import DraftControl
from engine.speculation.proposers.base import Proposer
from engine.speculation.proposers.table import make_proposer, needs_new_proposer
from engine.speculation.statistics import DraftStatistics
from engine.speculation.verification import accept_drafts
from kernels.dispatch import Op, cache_unsupported_reason, choose
from kernels.kv_formats import KV_FORMATS

if TYPE_CHECKING:
    from engine.models import LoadedModel, PreparedWeights

STEPS_KEPT = 8192
EVENTS_KEPT = 1024
LEAST_GAIN = 0.01  # of the blocks there are: less is not worth computing running requests again
LONGEST_DRAFT = int(knob("draft_length").maximum or 0)


@dataclasses.dataclass(frozen=True, slots=True)
class PreparedChange:
    """A validated change of knobs, with the work that could be done beside the running engine already done.

    Attributes:
        changes: knob names and values.
        weights: quantized weights ready to be swapped; None if they stay.
        shrinks_cache: the cache gives blocks back for heavier weights.
        prepare_ms: how long the preparation took.
    """

    changes: dict[str, Any]
    weights: PreparedWeights | None
    shrinks_cache: bool
    prepare_ms: float


class Engine:
    """One model, one paged cache, one scheduler.

    Args:
        model: what :func:`engine.models.load_model` gave.
        config: every knob; `weights` is applied if the model is not in that format yet.

    Raises:
        CapacityError: if the cache would not hold a useful number of tokens; the message has the arithmetic.
        ConfigError: if a knob asks for what this machine or model cannot do.
    """

    def __init__(self, model: LoadedModel, config: EngineConfig) -> None:
        self.model = model
        self.tokenizer = model.tokenizer
        self.config = config
        self._attention, self._attention_path = self._make_attention(config)
        self._sample, self._sampling_path = get_sampler(config.sampling, model.device)
        with sizing.Explained(lambda: sizing.swap_shortage(model, config)):
            self._bring_weights(self._weight_choice(config))
        self.envelope = sizing.size_engine(model, config)
        self.admission = self._present_admission()
        self.scheduler = Scheduler(self._new_pool(), sizing.widest_window(model))
        self._use_cache(self._new_cache(config, self.envelope))
        self._executor.check(config, self._attention)
        self._proposer = make_proposer(config)
        self._draft_control = DraftControl()
        self._draft_statistics = DraftStatistics(LONGEST_DRAFT)
        self._stream_table = stream_table(self.tokenizer)
        self._requests: dict[str, Request] = {}
        self._outlets: dict[str, _Outlet] = {}
        self._undrafted: set[str] = set()  # requests for which drafting failed
        self._ended: list[RequestOutput] = []  # last outputs of requests that failed, not handed out yet
        self.fruitless_steps = 0  # in a row: no row of them could be computed
        self.steps: Ring[StepStats] = Ring(STEPS_KEPT)
        self.events: Ring[EngineEvent] = Ring(EVENTS_KEPT)
        self._step_index = 0
        self._event_index = 0
        self.totals = dict.fromkeys(
            (
                "requests",
                "prompt_tokens",
                "output_tokens",
                "preemptions",
                "prefix_hit_tokens",
                "prefix_query_tokens",
                "drafts",
                "draft_tokens",
                "accepted_tokens",
            ),
            0,
        )
        self._executor.configure(config, self._attention)

    def _new_pool(self) -> BlockPool:
        return BlockPool(self.envelope.num_blocks, self.config.block_size)

    def _present_admission(self) -> Admission:
        config = self.config
        return Admission(self.model.decoder.vocab_size, self.envelope, config.max_running + config.max_waiting)

    def _new_cache(self, config: EngineConfig, envelope: sizing.Envelope) -> KVCache:
        with sizing.Explained(lambda: sizing.cache_shortage(self.model, config, envelope)):
            return _make_cache(self.model, config, envelope.num_blocks)

    def _use_cache(self, cache: KVCache) -> None:
        """Make what works on the cache; nothing of what worked on another is left."""
        config, longest = self.config, self.envelope.max_model_len
        self.cache = cache
        self._executor = Executor(
            self.model.decoder,
            cache,
            self.model.device,
            max_tokens=max(config.max_num_batched_tokens, longest),  # unchunked prompts exceed it
            max_num_seqs=config.max_num_seqs,
            max_model_len=longest,
            add_event=self.add_event,
            warm_up_sampler=lambda logits: warm_up_sampler(logits, self._sampling_path),
        )
        self._runner = Runner(self.model, cache, self._executor)

    def close(self) -> None:
        """Stop what runs beside the engine (the preparation of compiled shapes)."""
        self._executor.close()

    @classmethod
    def load(cls, config: EngineConfig, progress: Callable[[str, float], None] | None = None) -> Engine:
        """Load the model that ``config`` names and make an engine around it.

        Args:
            progress: called with a stage ("weights", …) and the fraction done.

        Raises:
            ModelLoadError, CapacityError, ConfigError: naming the field and the remedy.
        """
        if config.threads is not None:
            torch.set_num_threads(config.threads)  # a setting of the process: torch knows no narrower one
        started = time.perf_counter()
        with sizing.Explained(lambda: sizing.load_shortage(config)):
            model = load_model(
                config.model,
                dtype=config.dtype,
                device=config.device,
                progress=progress,
                choose=functools.partial(_choose_weights, config),
            )
        engine = cls(model, config)
        for warning in model.warnings:
            engine.add_event("warning", warning, {"model": model.name})
        seconds = time.perf_counter() - started
        engine.add_event("load", f"loaded {model.name} in {seconds:.1f} s", {"seconds": seconds})
        return engine

    # -- requests ----------------------------------------------------------------------------------------

    def validate_request(self, prompt_token_ids: Sequence[int], params: SamplingParams, priority: int = 0) -> None:
        """Refuse what could never finish under the present knobs; any thread, see :mod:`engine.batching.admission`.

        Raises:
            RequestError: naming the field and the remedy.
        """
        self.admission.check(prompt_token_ids, params, priority)

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
        self.validate_request(prompt_token_ids, params, priority)
        if request_id in self._requests:
            raise RequestError(
                f"{shown(request_id)} is already in flight.", field="request_id", remedy="Use another id."
            )
        self.admission.check_queue(len(self._requests))
        request = Request(
            request_id=request_id,
            token_ids=list(prompt_token_ids),
            num_prompt_tokens=len(prompt_token_ids),
            params=params,
            priority=priority,
            times=RequestTimes(arrival=time.perf_counter() if arrival is None else arrival),
            seed=(secrets.randbits(63) if params.seed is None else params.seed) % 2**64,
            end_token_ids=self._end_tokens(params),
        )
        outlet = self._make_outlet(request)
        self.scheduler.add(request)
        self._requests[request_id], self._outlets[request_id] = request, outlet
        self.totals["requests"] += 1
        self.totals["prompt_tokens"] += len(prompt_token_ids)

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request now and free its blocks; its last output, or None if it is not in flight."""
        request = self._requests.get(request_id)
        if request is None:
            return None
        try:
            return self._end(request, "abort")
        except Exception as error:
            return self._fail(request, Failure.of(error, "ending it"))

    def fail(self, request_id: str, reason: str) -> RequestOutput | None:
        """End a request with an error; its last output, or None if it is not in flight."""
        request = self._requests.get(request_id)
        return None if request is None else self._fail(request, Failure(reason, ""))

    def fail_all(self, message: str) -> list[RequestOutput]:
        """End every request in flight with an error."""
        ended, self._ended = self._ended, []
        return ended + [self._fail(request, Failure(message, "")) for request in list(self._requests.values())]

    def has_unfinished(self) -> bool:
        """True while a request is running or waiting."""
        return bool(self._requests)

    def has_preparation(self) -> bool:
        """True while each :meth:`step` does a piece of what its execution mode prepares, requests or not."""
        return self._executor.has_work

    # -- stepping ------------------------------------------------------------------------------------------

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
        self._propose()
        schedule = self._schedule()
        self._copy_blocks(schedule)
        scheduled = time.perf_counter()
        rows, logits = self._compute(schedule.rows)
        if logits is None:
            return self._nothing_computed()
        computed = time.perf_counter()
        sampled = self._choose(rows, logits)
        tally = _Tally()
        outputs = self._commit(rows, logits, sampled, scheduled, tally)
        self.fruitless_steps = 0 if len(rows) > tally.raised else self.fruitless_steps + 1
        try:
            self._record(schedule, tally, (began, scheduled, computed, time.perf_counter()))
        except Exception as error:  # the outputs are worth more than their statistics
            self._note("the statistics of a step are lost", error)
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
            self._executor.poll()
        except Exception as error:
            self._note(f"execution={self.config.execution} cannot be prepared; eager serves", error)
            self._executor.close()

    def _propose(self) -> None:
        """Draft for every request past its prompt; where that fails the step does without: no token depends on it."""
        if self._proposer is None:
            return
        try:
            self._draft(self._proposer)
        except Exception as error:
            self._note("drafting failed; a step does without", error)
            for request in self.scheduler.running:
                request.draft_token_ids = []

    def _draft(self, proposer: Proposer) -> None:
        """Draft as far as each request's output and context may still grow."""
        config, control = self.config, self._draft_control
        adaptive = config.draft_control == "adaptive"
        decoding = []
        for request in self.scheduler.running:
            request.draft_token_ids = []
            if request.in_decode and request.request_id not in self._undrafted:
                decoding.append(request)
        if adaptive and decoding and not control.should_draft(len(decoding)):
            return
        for request in decoding:
            count = control.length(request.request_id, config.draft_length) if adaptive else config.draft_length
            count = min(count, request.max_total_tokens - request.num_tokens - 1)
            if count > 0:
                try:
                    request.draft_token_ids = proposer.propose(request, count)[:count]
                except Exception as error:
                    self._stop_drafting(request, error)

    def _stop_drafting(self, request: Request, problem: Exception | None) -> None:
        """No drafts for this request any more."""
        self._undrafted.add(request.request_id)
        self._note(f"drafting failed for request {shown(request.request_id)}; it goes on without", problem)

    def _schedule(self) -> Schedule:
        """What to compute. Where that raises, queues and blocks are made again and every request is computed again."""
        for _ in range(2):
            try:
                return self.scheduler.schedule(self.config)
            except Exception as error:
                self._note("scheduling failed; every request is computed again", error)
            self.start_over()
        guilty: list[tuple[Request, Failure]] = []
        for request in self._requests.values():  # whom does it raise for alone?
            self.scheduler.start_over([request], self._new_pool())
            try:
                self.scheduler.schedule(self.config)
            except Exception as error:
                guilty.append((request, Failure.of(error, "scheduling it")))
        self.start_over()
        for request, failure in guilty:
            self._ended.append(self._fail(request, failure))
        while self._requests:
            try:
                return self.scheduler.schedule(self.config)
            except Exception as error:
                failure = Failure.of(error, "scheduling it")
            self.start_over()
            newest = max(self._requests.values(), key=lambda request: request.times.arrival)
            self._ended.append(self._fail(newest, failure))
        return Schedule()

    def start_over(self) -> None:
        """Queues and blocks again, after something was raised in the midst of changing them; no token is lost by it."""
        self.scheduler.start_over(self._requests.values(), self._new_pool())

    def _copy_blocks(self, schedule: Schedule) -> None:
        """Fill the beginnings of blocks whose tokens another block is known to begin with."""
        if not schedule.copies:
            return
        failed: dict[int, Failure] = {}
        try:
            self.cache.copy_blocks(schedule.copies)
        except Exception:  # a copy can be made again: which of them cannot be made at all?
            for copy in schedule.copies:
                try:
                    self.cache.copy_blocks([copy])
                except Exception as error:
                    failed[copy.destination] = Failure.of(error, "copying its prefix")
        finally:
            self.scheduler.copies_done(schedule)
        for row in list(schedule.rows):
            failure = next((failed[block] for block in row.request.block_ids if block in failed), None)
            if failure is not None:
                schedule.rows.remove(row)
                self._ended.append(self._fail(row.request, failure))

    def _compute(self, rows: list[ScheduledRequest]) -> tuple[list[ScheduledRequest], torch.Tensor | None]:
        """Those of the rows that can be computed, and their logits; None if there are none. The others have ended."""
        if not rows:
            return rows, None
        try:
            return rows, self._runner.run(rows, self._attention)
        except Exception as error:
            computed = compute_apart(lambda part: self._runner.run(part, self._attention), rows, error)
        for request in computed.undrafted:
            self._stop_drafting(request, None)
        for request, failure in computed.failed:
            self._ended.append(self._fail(request, failure))
        return computed.rows, computed.logits

    def unsupported(self) -> str | None:
        """Why no request can be computed at all: what a step over a token of the engine's own raises. None if nothing.

        For after steps of which no row could be computed: their requests may have been to blame, or the engine.
        """
        request = Request("", [0], 1, SamplingParams(max_tokens=1), 0, RequestTimes(time.perf_counter()), 0)
        try:
            with on_device(self.model.device), self.scheduler.only(request):
                rows = self.scheduler.schedule(self.config).rows
                if rows:
                    self._sample(self._runner.run(rows, self._attention), _sampling_rows_of(rows[0]))
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        self.fruitless_steps = 0
        return None

    def _choose(self, rows: Sequence[ScheduledRequest], logits: torch.Tensor) -> Sampled:
        """A token for each row of the logits, its log-probabilities, and why it has none where sampling it raises."""
        try:
            return Sampled(*self._sample(logits, self._sampling_rows(rows)))
        except Exception as error:  # a row's own parameters, or its logits: each is asked by itself
            if sizing.is_out_of_memory(error):
                error.__traceback__ = None
                sizing.release_memory()
            return sample_apart(self._sample, logits, rows, lambda row: self._sampling_rows([row]))

    def _sampling_rows(self, rows: Sequence[ScheduledRequest]) -> list[SamplingRow]:
        """One sampling row for each logits row of the runner, in the same order."""
        result: list[SamplingRow] = []
        for row in rows:
            if not row.samples:
                continue
            outlet = self._outlets[row.request.request_id]
            if outlet.plain_row is None:
                result.extend(_sampling_rows_of(row))
            elif row.num_drafts:
                result.extend([outlet.plain_row] * (row.num_drafts + 1))
            else:
                result.append(outlet.plain_row)
        return result

    def _end_tokens(self, params: SamplingParams) -> frozenset[int]:
        """Token ids that end a request. A checkpoint may name one that its own model does not have."""
        vocab = self.model.decoder.vocab_size
        own = () if params.ignore_eos else (token for token in self.model.eos_token_ids if token < vocab)
        return frozenset((*own, *params.stop_token_ids))

    def _make_outlet(self, request: Request) -> _Outlet:
        params = request.params
        detokenizer = Detokenizer(self.tokenizer, params.stop, self._stream_table)
        transcript = Transcript(request.token_ids, request.num_prompt_tokens, detokenizer.pieces)
        plain = params.greedy and params.repetition_penalty == 1.0 and params.min_tokens == 0
        return _Outlet(detokenizer, transcript, SamplingRow(params, request.seed, 0, (), ()) if plain else None)

    def _commit(
        self,
        rows: Sequence[ScheduledRequest],
        logits: torch.Tensor,
        sampled: Sampled,
        scheduled: float,
        tally: _Tally,
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
            end = offset
            try:
                if request.times.first_scheduled is None:
                    request.times.first_scheduled = scheduled
                if not row.samples:
                    self._commit_chunk(row, tally)
                    continue
                if known == 1 and len(request.token_ids) > request.num_prompt_tokens:
                    tally.decode_tokens += 1
                else:
                    tally.prefill_tokens += known
                end += row.num_drafts + 1
                tokens = all_tokens[offset:end]
                if row.num_drafts:
                    tokens = self._verify(row, tokens, tally)
                request.num_computed_tokens = row.start + known + len(tokens) - 1
                if all_chosen or tokens[-1] != NO_TOKEN:
                    output = self._append(request, tokens, now)
                else:
                    place = offset + len(tokens) - 1
                    failure = sampled.failed.get(place) or Failure(why_no_token(logits[place]), "")
                    tally.raised += place in sampled.failed
                    output = self._append(request, tokens[:-1], now, failure)
                outputs.append(output)  # from here on its client has the tokens
                # Asked here, not there: a call for every row that has no new block is a tenth of what a row costs.
                full = request.num_computed_tokens >= (request.num_published + 1) * size
                if full and publishes and request.state is RequestState.RUNNING:
                    self.scheduler.publish_computed(request)
                if request.params.logprobs is not None:
                    reported = sampled.logprobs[offset : offset + len(output.new_token_ids)]
                    output.logprobs = [entry for entry in reported if entry is not None]
                tally.output_tokens += len(output.new_token_ids)
            except Exception as error:
                tally.raised += 1
                has_them = not row.samples or (bool(outputs) and outputs[-1].request_id == request.request_id)
                failure = Failure.of(error, "handing out its next token")
                if request.state is not RequestState.FINISHED:  # else it has had its last output
                    self._ended.append(self._fail(request, failure, None if has_them else row.start + known))
            offset = end
        return outputs

    def _commit_chunk(self, row: ScheduledRequest, tally: _Tally) -> None:
        """Take over a piece in the middle of a prompt."""
        tally.prefill_tokens += row.num_tokens
        row.request.num_computed_tokens = row.start + row.num_tokens
        if self.config.prefix_cache:
            self.scheduler.publish_computed(row.request)

    def _verify(self, row: ScheduledRequest, sampled: list[int], tally: _Tally) -> list[int]:
        """The tokens that a verified draft yields; keeps count of what was accepted."""
        request = row.request
        tokens = accept_drafts(sampled, request.draft_token_ids[: row.num_drafts])
        accepted = len(tokens) - 1
        tally.drafts += 1
        tally.draft_tokens += row.num_drafts
        request.num_draft_tokens += row.num_drafts
        request.num_accepted_tokens += accepted
        tally.accepted_tokens += accepted
        try:
            self._draft_statistics.observe(row.num_drafts, accepted)
            self._draft_control.observe_draft(request.request_id, accepted)
        except Exception as error:
            self._stop_drafting(request, error)
        return tokens

    def _append(self, request: Request, tokens: list[int], now: float, failure: Failure | None = None) -> RequestOutput:
        """Add tokens one by one, so that an end inside accepted drafts cuts off what comes after it.

        Args:
            failure: why the request ends behind them; None if it goes on.
        """
        outlet = self._outlets[request.request_id]
        token_ids, token_times = request.token_ids, request.times.token_times
        params = request.params
        first_that_may_end = request.num_prompt_tokens + params.min_tokens
        reason: FinishReason | None = None
        last_length = request.num_prompt_tokens + params.max_tokens
        for taken, token in enumerate(tokens, start=1):
            token_ids.append(token)
            token_times.append(now)
            length = len(token_ids)
            stop_string = outlet.detokenizer.append(token, may_stop=length >= first_that_may_end)
            if stop_string is not None:
                reason, request.stop_reason = "stop", stop_string
            elif token in request.end_token_ids and length > first_that_may_end:
                reason, request.stop_reason = "stop", token
            elif length >= last_length:
                reason = "length"
            if reason is not None:
                # What was accepted beyond the end is no part of the text: its keys and values are not reusable.
                request.num_computed_tokens -= len(tokens) - taken
                tokens = tokens[:taken]
                break
        if reason is None:
            if failure is None:
                return _output(request, outlet, tokens, outlet.detokenizer.take())
            reason, request.error = "error", failure.reason
            self._report_failure(request, failure)
        return self._end(request, reason, tokens)

    def _end(self, request: Request, reason: FinishReason, tokens: list[int] | None = None) -> RequestOutput:
        """Finish a request: publish what is reusable, free its blocks, give its last output."""
        request.finish_reason = reason
        request.times.end = time.perf_counter()
        if self.config.prefix_cache and request.state is RequestState.RUNNING and reason != "error":
            self.scheduler.publish_computed(request)
        outlet = self._outlets[request.request_id]
        outlet.detokenizer.finish()
        output = _output(request, outlet, tokens or [], outlet.detokenizer.take())
        self._drop(request)
        return output

    def _fail(self, request: Request, failure: Failure, num_known: int | None = None) -> RequestOutput:
        """End a request with an error, whatever state what belongs to it is in; it does not raise.

        Args:
            num_known: tokens, those of the prompt included, that its client knows of if not all: neither the others nor
                any text of theirs is handed out.
        """
        request.finish_reason, request.stop_reason, request.error = "error", None, failure.reason
        request.times.end = time.perf_counter()
        outlet = self._outlets[request.request_id]
        new_text = ""
        if num_known is not None:
            del request.token_ids[num_known:]
            del request.times.token_times[num_known - request.num_prompt_tokens :]
        else:
            with contextlib.suppress(Exception):  # the detokenizer may be what failed; the reason is told
                outlet.detokenizer.finish()
                new_text = outlet.detokenizer.take()
        output = _output(request, outlet, [], new_text)
        self._drop(request)
        if failure.trace:
            self._report_failure(request, failure)
        return output

    def _drop(self, request: Request) -> None:
        """Forget a request and give its blocks back; it does not raise."""
        identifier = request.request_id
        del self._requests[identifier], self._outlets[identifier]
        self._undrafted.discard(identifier)
        try:
            self.scheduler.finish(request)
        except Exception as error:
            self._note("giving blocks back failed; every request is computed again", error)
            request.state = RequestState.FINISHED
            self.start_over()
        try:
            if self._proposer is not None:
                self._proposer.forget(identifier)
            self._draft_control.forget(identifier)
        except Exception as error:
            self._note("the drafts of a finished request could not be forgotten", error)

    def _report_failure(self, request: Request, failure: Failure) -> None:
        summary = f"request {shown(request.request_id)} ended: {failure.reason}"
        self.add_event("error", summary, {"request_id": request.request_id, "traceback": failure.trace})

    def _note(self, summary: str, problem: Exception | None) -> None:
        """Write a failure that ends no request into the event log."""
        if problem is None:
            self.add_event("error", f"{summary}.", {})
            return
        failure = Failure.of(problem, summary)
        self.add_event("error", f"{summary}: {type(problem).__name__}: {problem}", {"traceback": failure.trace})

    def _record(self, schedule: Schedule, tally: _Tally, clock: tuple[float, float, float, float]) -> None:
        began, scheduled, computed, done = clock
        pool = self.scheduler.pool
        step = StepStats(
            index=self._step_index,
            time_unix_s=time.time(),
            duration_ms=(done - began) * 1e3,
            schedule_ms=(scheduled - began) * 1e3,
            model_ms=(computed - scheduled) * 1e3,
            sample_ms=(done - computed) * 1e3,
            num_running=len(self.scheduler.running),
            num_waiting=self.scheduler.num_waiting,
            prefill_tokens=tally.prefill_tokens,
            decode_tokens=tally.decode_tokens,
            draft_tokens=tally.draft_tokens,
            accepted_tokens=tally.accepted_tokens,
            output_tokens=tally.output_tokens,
            preempted=schedule.preempted,
            kv_blocks_used=pool.num_blocks - pool.num_free,
            kv_blocks_cached=pool.num_cached,
            prefix_hit_tokens=schedule.prefix_hit_tokens,
            prefix_query_tokens=schedule.prefix_query_tokens,
            execution=self._executor.last.mode,
        )
        self._step_index += 1
        self.steps.append(step)
        if self._proposer is not None and tally.decode_tokens and not tally.prefill_tokens:
            self._draft_control.observe_step(tally.decode_tokens, tally.draft_tokens, tally.output_tokens, done - began)
        totals = self.totals
        totals["preemptions"] += schedule.preempted
        totals["prefix_hit_tokens"] += schedule.prefix_hit_tokens
        totals["prefix_query_tokens"] += schedule.prefix_query_tokens
        totals["output_tokens"] += tally.output_tokens
        totals["drafts"] += tally.drafts
        totals["draft_tokens"] += tally.draft_tokens
        totals["accepted_tokens"] += tally.accepted_tokens

    # -- reconfiguration -------------------------------------------------------------------------------

    def prepare(self, changes: Mapping[str, Any]) -> PreparedChange:
        """Validate a change and do what can be done beside the running engine. Changes nothing; any thread.

        Raises:
            ConfigError, CapacityError: naming the knob and the remedy.
        """
        began = time.perf_counter()
        target = self.config.with_changes(changes)
        differences = self.config.difference(target)
        fixed = [name for name in differences if knob(name).tier == Tier.RELOAD]
        if fixed:
            raise ConfigError(
                f"is fixed while a model is loaded ({differences[fixed[0]][0]!r} now).",
                field=fixed[0],
                remedy="Load the model again with the new value.",
            )
        attention, _ = self._make_attention(target)
        get_sampler(target.sampling, self.model.device)
        self._executor.check(target, attention)
        weights, shrinks, envelope = None, False, self.envelope
        if "kv_dtype" in differences:
            envelope = sizing.resize_cache(self.model, target, envelope)
        choice = self._weight_choice(target)
        if not choice.same_as(self.model.weights_choice):
            shrinks = sizing.make_room_for_weights(self.model, envelope, target).num_blocks < envelope.num_blocks
            with sizing.Explained(lambda: sizing.swap_shortage(self.model, target)):
                weights = self.model.prepare_weights(
                    choice.weights, choice.group_size, head=choice.head, linear=choice.linear
                )
        return PreparedChange(dict(changes), weights, shrinks, (time.perf_counter() - began) * 1e3)

    def apply(self, prepared: PreparedChange) -> ReconfigureResult:
        """Put a prepared change into force between two steps; all of it or, on an error, none.

        Raises:
            ConfigError, CapacityError: naming the knob and the remedy.
        """
        began = time.perf_counter()
        target = self.config.with_changes(prepared.changes)
        differences = self.config.difference(target)
        attention, attention_path = self._make_attention(target)
        new_proposer = needs_new_proposer(target, differences.keys())
        proposer = make_proposer(target) if new_proposer else self._proposer
        notes: list[str] = []
        if "kv_dtype" in differences or prepared.shrinks_cache:
            room = sizing.resize_cache(self.model, target, self.envelope)
            notes += self._swap_cache(target, room, prepared.weights)
        elif prepared.weights is not None:  # the last thing that can fail
            notes += self._swap_weights(prepared.weights, target)
        if new_proposer:
            self._proposer = proposer
            for request in self.scheduler.running:
                request.draft_token_ids = []
        if differences:
            self._draft_control = DraftControl()  # what was measured may not hold any more
        self._attention, self._attention_path = attention, attention_path
        self._sample, self._sampling_path = get_sampler(target.sampling, self.model.device)
        self.config = target
        self.admission = self._present_admission()
        self._executor.configure(target, attention)
        if prepared.weights is not None and (offer := self.cache_on_offer()) is not None:
            notes.append(
                f"the KV cache could take {offer.gained_bytes / sizing.GIB:.2f} GiB more: {offer.num_blocks:,} blocks "
                f"instead of {self.envelope.num_blocks:,} (resize)"
            )
        pause_ms = (time.perf_counter() - began) * 1e3
        tiers = {knob(name).tier for name in differences}
        tier = "swap" if Tier.SWAP in tiers else ("live" if tiers else "none")
        result = ReconfigureResult(
            changed=differences,
            tier=tier,
            pause_ms=pause_ms,
            prepare_ms=prepared.prepare_ms,
            requests_in_flight=len(self._requests),
            notes=notes,
        )
        if differences:
            self.add_event("reconfigure", _describe_change(result), dataclasses.asdict(result))
        return result

    def reconfigure(self, changes: Mapping[str, Any]) -> ReconfigureResult:
        """Prepare and apply in one go (the stepping thread's own way; a loop prepares in another thread)."""
        return self.apply(self.prepare(changes))

    def reset_prefix_cache(self) -> int:
        """Forget every reusable prefix; requests in flight keep their blocks, which are not offered for reuse again.

        Returns:
            How many blocks were reusable.
        """
        return self.scheduler.pool.reset_prefixes()

    def cache_on_offer(self) -> CacheOffer | None:
        """What :meth:`resize` would give; None where lighter weights have left the cache nothing worth taking."""
        larger = sizing.cache_on_offer(self.model, self.config, self.envelope)
        gained = larger.num_blocks - self.envelope.num_blocks
        if gained < max(1, LEAST_GAIN * self.envelope.num_blocks):
            return None
        return CacheOffer(larger.num_blocks, gained, gained * self.cache.nbytes // self.cache.num_blocks)

    def resize(self) -> ReconfigureResult:
        """Give the KV cache the memory that lighter weights have left, between two steps.

        The blocks are swapped as for another `kv_dtype`: running requests are computed again. Heavier weights take
        the memory back (see :func:`engine.sizing.make_room_for_weights`).

        Raises:
            CapacityError: if the machine does not have the memory after all; then the cache is what it was.
        """
        began, before, notes = time.perf_counter(), self.envelope.num_blocks, []
        if self.cache_on_offer() is not None:
            larger = sizing.cache_on_offer(self.model, self.config, self.envelope)
            notes = self._swap_cache(self.config, larger, None)
            self._executor.configure(self.config, self._attention)
        after = self.envelope.num_blocks
        result = ReconfigureResult(
            changed={} if after == before else {"num_blocks": (before, after)},
            tier="none" if after == before else "swap",
            pause_ms=(time.perf_counter() - began) * 1e3,
            prepare_ms=0.0,
            requests_in_flight=len(self._requests),
            notes=notes or ["the KV cache has all the memory there is for it"],
        )
        if result.changed:
            summary = f"KV cache resized: {before:,} → {after:,} blocks (paused {result.pause_ms:.1f} ms)"
            self.add_event("cache", summary, dataclasses.asdict(result))
        return result

    def _swap_cache(
        self, target: EngineConfig, envelope: sizing.Envelope, weights: PreparedWeights | None
    ) -> list[str]:
        """A cache of another format or size in place of the present one and, with it, other weights.

        Raises:
            CapacityError: if a request in flight could not finish in it, or memory runs out; then there is a cache in
                the previous format and size again, and requests go on.
        """
        previous, room = self.config, self.envelope
        longest = max((request.max_total_tokens for request in self._requests.values()), default=0)
        by = "weights" if target.kv_dtype == previous.kv_dtype else "kv_dtype"
        sizing.check_requests_fit(longest, envelope, target, by)
        count = self.scheduler.vacate()
        self.totals["preemptions"] += count
        notes = [f"the KV cache holds {envelope.num_blocks:,} blocks (before: {room.num_blocks:,})"]
        if count:
            notes.append(f"{count} running requests are computed again, with the tokens they have")
        try:
            self._replace_cache(target, envelope)
            if weights is not None:
                notes += self._swap_weights(weights, target)
        except Exception:
            self._replace_cache(previous, room)
            self._executor.configure(previous, self._attention)
            raise
        return notes

    def _replace_cache(self, config: EngineConfig, envelope: sizing.Envelope) -> None:
        """Another cache and another pool of blocks, of which nobody may hold one now."""
        self._executor.close()
        self._use_cache(self.cache.like(0))  # the old one goes first: there is no memory for both
        try:
            cache = self._new_cache(config, envelope)
        except CapacityError:  # the garbage collector may find some, but takes longer than all the rest
            sizing.release_memory()
            cache = self._new_cache(config, envelope)
        self.envelope = envelope
        self.admission = self._present_admission()
        self._use_cache(cache)
        self.scheduler.swap_pool(BlockPool(envelope.num_blocks, config.block_size))

    def _swap_weights(self, prepared: PreparedWeights, target: EngineConfig) -> list[str]:
        with sizing.Explained(lambda: sizing.swap_shortage(self.model, target)):
            self.model.commit_weights(prepared)
        # Cached keys and values came from the old weights: nobody may take them for the new ones' work.
        self.scheduler.pool.reset_prefixes()
        for request in self.scheduler.running:
            request.publishable = False
        notes = [f"weights now: {self.model.weights_path()}"]
        if self.scheduler.running:
            count = len(self.scheduler.running)
            notes.append(f"{count} running requests keep the keys and values they have; their blocks are not reused")
        return notes

    def _weight_choice(self, config: EngineConfig) -> WeightChoice:
        """The weight formats that a configuration asks for, its `linear` decided for this machine.

        Raises:
            ConfigError: if the kernels it names cannot run here.
        """
        model = self.model
        fallback = None if model.decoder.swaps_weights else model.spec.architecture
        return _choose_weights(config, model.device, model.dtype, fallback)

    def _bring_weights(self, choice: WeightChoice) -> None:
        """Put freshly loaded weights into the chosen formats; a mere change of layout reads nothing again."""
        present = self.model.weights_choice
        if choice.same_as(present):
            return
        as_loaded = present.linear == "torch"
        if as_loaded and choice.same_as(dataclasses.replace(present, linear=choice.linear)):
            self.model.repack_weights(choice.linear)
            return
        prepared = self.model.prepare_weights(choice.weights, choice.group_size, head=choice.head, linear=choice.linear)
        self.model.commit_weights(prepared)

    def _make_attention(self, config: EngineConfig) -> tuple[Any, str]:
        device, head_dim = self.model.device, self.model.decoder.head_dim
        backend, path = get_backend(config.attention, device, self.model.dtype, head_dim)
        unsupported = cache_unsupported_reason(path, config.kv_dtype, device, head_dim)
        if unsupported is not None:
            words = f"{config.kv_dtype!r} cannot be had here: {unsupported.reason}"
            raise ConfigError(words, field="kv_dtype", remedy=unsupported.remedy)
        return backend, path

    # -- looking at it ---------------------------------------------------------------------------------

    def add_event(self, kind: str, summary: str, detail: dict[str, Any]) -> None:
        """Write something into the event log that charts mark."""
        self.events.append(EngineEvent(self._event_index, time.time(), kind, summary, detail))
        self._event_index += 1

    def prompt_logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """float32 [T, vocab]: the model's distribution after each token of a text, beside the serving cache."""
        with on_device(self.model.device):
            return self._runner.prompt_logits(token_ids, self._attention)

    def path(self) -> dict[str, str]:
        """What really runs and why these kernels and not quicker ones, for the record of every run."""
        return {
            "device": str(self.model.device),
            "decoder": self.model.decoder_path(),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "attention": self._attention_path,
            "weights": self.model.weights_path(),
            "kv_cache": sizing.kv_format_name(self.config, self.model.dtype),
            "execution": self._executor.path(),
            "sampling": self._sampling_path,
            "speculation": self.config.speculation,
            "threads": str(torch.get_num_threads()),
            **self._reasons(),
        }

    def _reasons(self) -> dict[str, str]:
        """What the dispatcher says of each choice of kernels in force, by the knob that asked."""
        asked: dict[str, tuple[Op, str]] = {
            "attention": ("paged_attention", self.config.attention),
            "linear": ("linear", self.config.linear if self.model.decoder.swaps_weights else "torch"),
            "sampling": ("sample", self.config.sampling),
        }
        device, dtype, heads = self.model.device, self.model.dtype, {"attention": self.model.decoder.head_dim}
        reasons = {
            f"{name}_reason": choose(op, value, device=device, dtype=dtype, head_dim=heads.get(name)).reason
            for name, (op, value) in asked.items()
        }
        reasons["linear_reason"] = " ".join(filter(None, [self.model.left_to_torch(), reasons["linear_reason"]]))
        return reasons

    def status(self) -> EngineStatus:
        """A consistent picture between two steps."""
        with on_device(self.model.device):
            self._executor.poll()  # an idle engine takes no steps, and what is prepared should show
        return EngineStatus(
            model=sizing.describe_model(self.model, self.config),
            config=self.config.to_dict(),
            config_hash=self.config.hash(),
            path=self.path(),
            memory=sizing.memory_report(self.model, self.envelope, self.cache),
            block_size=self.config.block_size,
            num_blocks=self.envelope.num_blocks,
            max_model_len=self.envelope.max_model_len,
            blocks=self.scheduler.pool.block_states(),
            running=len(self.scheduler.running),
            waiting=self.scheduler.num_waiting,
            totals=dict(self.totals),
            resize=None if (offer := self.cache_on_offer()) is None else dataclasses.asdict(offer),
            execution=self._executor.status(),
            speculation=self._draft_statistics.to_dict() | {"control": self._draft_control.to_dict()},
        )

    def check_invariants(self) -> None:
        """Recompute queues, block tables, reference counts, hashes and free list from scratch.

        Raises:
            AssertionError: naming what does not agree.
        """
        self.scheduler.check()
        queued = {r.request_id for r in (*self.scheduler.running, *self.scheduler.waiting)}
        assert queued == self._requests.keys() == self._outlets.keys(), "a request is lost or left over"


@dataclasses.dataclass(slots=True)
class _Outlet:
    """The way of one request's tokens to its client.

    Attributes:
        plain_row: its sampling row if that is the same at every position: greedy, with nothing to be looked up.
    """

    detokenizer: Detokenizer
    transcript: Transcript
    plain_row: SamplingRow | None


@dataclasses.dataclass(slots=True)
class _Tally:
    """Composition of a step, counted while its results are committed."""

    prefill_tokens: int = 0
    decode_tokens: int = 0
    drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    output_tokens: int = 0
    raised: int = 0  # rows of which something raised


def _choose_weights(
    config: EngineConfig, device: torch.device, dtype: torch.dtype, fallback: str | None
) -> WeightChoice:
    """As :meth:`Engine._weight_choice`, for a model that may not be loaded yet.

    Args:
        fallback: name of a model whose layers transformers computes, which keeps its weights as they are; else None.
    """
    linear = config.linear
    if fallback is not None:
        if linear in ("native", "triton"):
            raise ConfigError(
                f"{linear!r} is not available for {fallback}, which runs through transformers.",
                field="linear",
                remedy="Choose auto or torch.",
            )
        linear = "torch"
    choice = choose("linear", linear, device=device, dtype=dtype)
    if choice.path is None:
        raise ConfigError(f"{linear!r} cannot run here: {choice.reason}", field="linear", remedy=choice.remedy)
    wanted = sizing.wanted_formats(config, choice.path.partition(" ")[0])
    if fallback is not None and wanted.label != "model":
        raise ConfigError(
            f"{wanted.label!r} is not available for {fallback}, which runs through transformers.",
            field="weights",
            remedy="Choose model.",
        )
    return wanted


def _output(request: Request, outlet: _Outlet, tokens: list[int], new_text: str) -> RequestOutput:
    """News of a request: its new tokens, and the text that became certain by them."""
    return RequestOutput(
        request.request_id,
        tokens,
        new_text,
        outlet.transcript,
        len(request.token_ids) - request.num_prompt_tokens,
        len(outlet.transcript.pieces),
        request.finish_reason is not None,
        request.finish_reason,
        request.stop_reason,
        request.error,
        None if request.params.logprobs is None else [],
        request.times,
        request.num_cached_tokens,
        request.num_preemptions,
        request.num_draft_tokens,
        request.num_accepted_tokens,
    )


def _sampling_rows_of(row: ScheduledRequest) -> list[SamplingRow]:
    """The sampling rows of a request's newest token and its drafts."""
    request, params = row.request, row.request.params
    drafts = request.draft_token_ids[: row.num_drafts]
    result = []
    for ahead in range(row.num_drafts + 1):
        position = request.num_output_tokens + ahead
        history = [*request.token_ids, *drafts[:ahead]] if params.repetition_penalty != 1.0 else ()
        forbidden = tuple(request.end_token_ids) if position < params.min_tokens else ()
        result.append(SamplingRow(params, request.seed, position, history, forbidden))
    return result


def _make_cache(model: LoadedModel, config: EngineConfig, num_blocks: int) -> KVCache:
    decoder = model.decoder
    # CUDA graphs write their padding into a block behind those of the pool.
    scratch = int(model.device.type == "cuda")
    return KVCache(
        num_layers=decoder.num_layers,
        num_blocks=num_blocks + scratch,
        block_size=config.block_size,
        num_kv_heads=decoder.num_kv_heads,
        head_dim=decoder.head_dim,
        dtype=model.dtype,
        device=model.device,
        format=KV_FORMATS[config.kv_dtype],
    )


def _describe_change(result: ReconfigureResult) -> str:
    parts = [f"{name}: {_show(old)} → {_show(new)}" for name, (old, new) in result.changed.items()]
    pause = f" (paused {result.pause_ms:.1f} ms)" if result.tier == "swap" else ""
    return ", ".join(parts) + pause


def _show(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "auto" if value is None else str(value)
