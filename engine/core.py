"""The engine: schedule → run → sample → commit, with reconfiguration between two steps.

An :class:`Engine` is used from one thread. :class:`engine.loop.EngineLoop` gives it a thread of its own.
"""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from engine import sizing
from engine.batching.request import Request, RequestState
from engine.batching.scheduler import Schedule, ScheduledRequest, Scheduler
from engine.cache.block_pool import BlockPool
from engine.cache.kv_cache import KVCache
from engine.config import EngineConfig, Tier, knob
from engine.detokenizer import Detokenizer, token_bytes
from engine.device import on_device
from engine.errors import CapacityError, ConfigError, RequestError
from engine.execution import Executor
from engine.layers.attention import get_backend
from engine.models import load_model
from engine.outputs import (
    EngineEvent,
    EngineStatus,
    FinishReason,
    ReconfigureResult,
    RequestOutput,
    RequestTimes,
    StepStats,
    TokenLogprob,
    Transcript,
)
from engine.quantization.registry import WeightChoice
from engine.ring import Ring
from engine.runner import Runner
from engine.sampling import SamplingParams, SamplingRow, get_sampler, warm_up_sampler
from engine.speculation.draft_control import DraftControl
from engine.speculation.proposers import make_proposer
from engine.speculation.statistics import DraftStatistics
from engine.speculation.verification import accept_drafts
from kernels.dispatch import Op, cache_obstacle, choose
from kernels.kv_formats import KV_FORMATS

if TYPE_CHECKING:
    from engine.models import LoadedModel, PreparedWeights

STEPS_KEPT = 8192
EVENTS_KEPT = 1024
LONGEST_DRAFT = int(knob("draft_length").maximum or 0)


@dataclasses.dataclass(frozen=True, slots=True)
class PreparedChange:
    """A validated change of knobs, with the work that could be done beside the running engine already done.

    Attributes:
        changes: knob names and values.
        weights: quantized weights ready to be exchanged; None if they stay.
        prepare_ms: how long the preparation took.
    """

    changes: dict[str, Any]
    weights: PreparedWeights | None
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
        self.scheduler = Scheduler(BlockPool(self.envelope.num_blocks, config.block_size))
        self._use_cache(self._new_cache(config, self.envelope))
        self._executor.check(config, self._attention)
        self._proposer = make_proposer(config)
        self._draft_control = DraftControl()
        self._draft_statistics = DraftStatistics(LONGEST_DRAFT)
        self._token_bytes = token_bytes(self.tokenizer)
        self._requests: dict[str, Request] = {}
        self._outlets: dict[str, _Outlet] = {}
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
            model = load_model(config.model, dtype=config.dtype, device=config.device, progress=progress)
        engine = cls(model, config)
        seconds = time.perf_counter() - started
        engine.add_event("load", f"loaded {model.name} in {seconds:.1f} s", {"seconds": seconds})
        return engine

    # -- requests ----------------------------------------------------------------------------------------

    def validate_request(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> None:
        """Refuse what could never finish. Reads only what does not change while a model is loaded.

        Raises:
            RequestError: naming the field and the remedy.
        """
        if not prompt_token_ids:
            raise RequestError("the prompt is empty.", field="prompt", remedy="Send at least one token.")
        vocab = self.model.decoder.vocab_size
        for field, token_ids in (("prompt", prompt_token_ids), ("stop_token_ids", params.stop_token_ids)):
            bad = next((t for t in token_ids if not 0 <= t < vocab), None)
            if bad is not None:
                raise RequestError(
                    f"token id {bad} is not in the vocabulary.", field=field, remedy=f"Use ids from 0 to {vocab - 1}."
                )
        longest, length = self.envelope.max_model_len, len(prompt_token_ids)
        if length + 1 > longest:
            raise RequestError(
                f"{length:,} prompt tokens leave no room for output: a request may hold {longest:,} tokens "
                f"({self.envelope.limited_by}).",
                field="prompt",
                remedy=self.envelope.remedy,
            )
        if length + params.max_tokens > longest:
            raise RequestError(
                f"{length:,} prompt tokens and {params.max_tokens:,} output tokens are more than the {longest:,} "
                f"tokens a request may hold ({self.envelope.limited_by}).",
                field="max_tokens",
                remedy=f"Ask for at most {longest - length:,} output tokens. {self.envelope.remedy}",
            )

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
        """
        self.validate_request(prompt_token_ids, params)
        if request_id in self._requests:
            raise RequestError(f"{request_id!r} is already in flight.", field="request_id", remedy="Use another id.")
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
        self._requests[request_id] = request
        self._outlets[request_id] = self._make_outlet(request)
        self.scheduler.add(request)
        self.totals["requests"] += 1
        self.totals["prompt_tokens"] += len(prompt_token_ids)

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request now and free its blocks; its last output, or None if it is not in flight."""
        request = self._requests.get(request_id)
        return None if request is None else self._end(request, "abort")

    def fail_all(self, message: str) -> list[RequestOutput]:
        """End every request in flight with an error."""
        outputs = []
        for request in list(self._requests.values()):
            request.error = message
            outputs.append(self._end(request, "error"))
        return outputs

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
        self._executor.poll()
        self._propose()
        schedule = self.scheduler.schedule(self.config)
        if not schedule.rows:
            return []
        self._copy_blocks(schedule)
        scheduled = time.perf_counter()
        logits = self._runner.run(schedule.rows, self._attention)
        computed = time.perf_counter()
        sampled, logprobs = self._sample(logits, self._sampling_rows(schedule.rows))
        tally = _Tally()
        outputs = self._commit(schedule.rows, sampled, logprobs, scheduled, tally)
        self._record(schedule, tally, (began, scheduled, computed, time.perf_counter()))
        return outputs

    def _propose(self) -> None:
        """Draft for every request past its prompt, as far as its output and context may still grow."""
        if self._proposer is None:
            return
        config, control = self.config, self._draft_control
        adaptive = config.draft_control == "adaptive"
        decoding = []
        for request in self.scheduler.running:
            request.draft_token_ids = []
            if request.in_decode:
                decoding.append(request)
        if adaptive and decoding and not control.should_draft(len(decoding)):
            return
        for request in decoding:
            count = control.length(request.request_id, config.draft_length) if adaptive else config.draft_length
            count = min(count, request.max_total_tokens - request.num_tokens - 1)
            if count > 0:
                request.draft_token_ids = self._proposer.propose(request, count)

    def _copy_blocks(self, schedule: Schedule) -> None:
        """Fill the beginnings of blocks whose tokens another block is known to begin with."""
        if schedule.copies:
            try:
                self.cache.copy_blocks(schedule.copies)
            finally:
                self.scheduler.copies_done(schedule)

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
        """Token ids that end a request."""
        return frozenset(
            params.stop_token_ids if params.ignore_eos else (*self.model.eos_token_ids, *params.stop_token_ids)
        )

    def _make_outlet(self, request: Request) -> _Outlet:
        params = request.params
        detokenizer = Detokenizer(self.tokenizer, params.stop, self._token_bytes)
        transcript = Transcript(request.token_ids, request.num_prompt_tokens, detokenizer.pieces)
        plain = params.greedy and params.repetition_penalty == 1.0 and params.min_tokens == 0
        return _Outlet(detokenizer, transcript, SamplingRow(params, request.seed, 0, (), ()) if plain else None)

    def _commit(
        self,
        rows: Sequence[ScheduledRequest],
        sampled: list[int],
        logprobs: list[TokenLogprob | None],
        scheduled: float,
        tally: _Tally,
    ) -> list[RequestOutput]:
        """Take over what was computed: tokens, computed counts, finished requests, reusable blocks."""
        outputs: list[RequestOutput] = []
        now = time.perf_counter()
        publishes, size = self.config.prefix_cache, self.config.block_size
        offset = 0
        for row in rows:
            request = row.request
            if request.times.first_scheduled is None:
                request.times.first_scheduled = scheduled
            known = row.num_tokens - row.num_drafts
            if not row.samples:
                tally.prefill_tokens += known
                request.num_computed_tokens = row.start + known
                if publishes:
                    self.scheduler.publish_computed(request)
                continue
            if known == 1 and len(request.token_ids) > request.num_prompt_tokens:
                tally.decode_tokens += 1
            else:
                tally.prefill_tokens += known
            end = offset + row.num_drafts + 1
            tokens = sampled[offset:end]
            if row.num_drafts:
                tokens = self._verify(row, tokens, tally)
            request.num_computed_tokens = row.start + known + len(tokens) - 1
            output = self._append(request, tokens, now)
            # Asked here, not there: a call for every row that has no new block is a tenth of what a row costs.
            full = request.num_computed_tokens >= (request.num_published + 1) * size
            if full and publishes and request.state is RequestState.RUNNING:
                self.scheduler.publish_computed(request)
            if request.params.logprobs is not None:
                reported = logprobs[offset : offset + len(output.new_token_ids)]
                output.logprobs = [entry for entry in reported if entry is not None]
            tally.output_tokens += len(output.new_token_ids)
            outputs.append(output)
            offset = end
        return outputs

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
        self._draft_statistics.observe(row.num_drafts, accepted)
        self._draft_control.observe_draft(request.request_id, accepted)
        return tokens

    def _append(self, request: Request, tokens: list[int], now: float) -> RequestOutput:
        """Add tokens one by one, so that an end inside accepted drafts cuts off what comes after it."""
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
        if reason is not None:
            return self._end(request, reason, tokens)
        return _output(request, outlet, tokens)

    def _end(self, request: Request, reason: FinishReason, tokens: list[int] | None = None) -> RequestOutput:
        """Finish a request: publish what is reusable, free its blocks, give its last output."""
        request.finish_reason = reason
        request.times.end = time.perf_counter()
        if self.config.prefix_cache and request.state is RequestState.RUNNING and reason != "error":
            self.scheduler.publish_computed(request)
        self.scheduler.finish(request)
        outlet = self._outlets.pop(request.request_id)
        outlet.detokenizer.finish()
        output = _output(request, outlet, tokens or [])
        del self._requests[request.request_id]
        if self._proposer is not None:
            self._proposer.forget(request.request_id)
        self._draft_control.forget(request.request_id)
        return output

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
        weights, envelope = None, self.envelope
        if "kv_dtype" in differences:
            envelope = sizing.resize_cache(self.model, target, envelope)
        choice = self._weight_choice(target)
        if not choice.same_as(self.model.weights_choice):
            sizing.check_weights_fit(self.model, envelope, target)
            with sizing.Explained(lambda: sizing.swap_shortage(self.model, target)):
                weights = self.model.prepare_weights(
                    choice.weights, choice.group_size, head=choice.head, linear=choice.linear
                )
        return PreparedChange(dict(changes), weights, (time.perf_counter() - began) * 1e3)

    def apply(self, prepared: PreparedChange) -> ReconfigureResult:
        """Put a prepared change into force between two steps; all of it or, on an error, none.

        Raises:
            ConfigError, CapacityError: naming the knob and the remedy.
        """
        began = time.perf_counter()
        target = self.config.with_changes(prepared.changes)
        differences = self.config.difference(target)
        attention, attention_path = self._make_attention(target)
        new_proposer = bool({"speculation", "ngram_min", "ngram_max"} & differences.keys())
        proposer = make_proposer(target) if new_proposer else self._proposer
        notes: list[str] = []
        if "kv_dtype" in differences:
            notes += self._exchange_cache(target, prepared.weights)
        elif prepared.weights is not None:  # the last thing that can fail
            notes += self._exchange_weights(prepared.weights, target)
        if new_proposer:
            self._proposer = proposer
            for request in self.scheduler.running:
                request.draft_token_ids = []
        if differences:
            self._draft_control = DraftControl()  # what was measured may not hold any more
        self._attention, self._attention_path = attention, attention_path
        self._sample, self._sampling_path = get_sampler(target.sampling, self.model.device)
        self.config = target
        self._executor.configure(target, attention)
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

    def _exchange_cache(self, target: EngineConfig, weights: PreparedWeights | None) -> list[str]:
        """A cache in another format in place of the present one and, with it, other weights.

        Raises:
            CapacityError: if a request in flight could not finish in it, or memory runs out; then there is a cache in
                the former format again, and requests go on.
        """
        former, room = self.config, self.envelope
        envelope = sizing.resize_cache(self.model, target, room)
        longest = max((request.max_total_tokens for request in self._requests.values()), default=0)
        sizing.check_requests_fit(longest, envelope, target)
        count = self.scheduler.vacate()
        self.totals["preemptions"] += count
        notes = [f"the KV cache holds {envelope.num_blocks:,} blocks (before: {room.num_blocks:,})"]
        if count:
            notes.append(f"{count} running requests are computed again, with the tokens they have")
        try:
            self._replace_cache(target, envelope)
            if weights is not None:
                notes += self._exchange_weights(weights, target)
        except CapacityError:
            self._replace_cache(former, room)
            self._executor.configure(former, self._attention)
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
        self._use_cache(cache)
        self.scheduler.exchange_pool(BlockPool(envelope.num_blocks, config.block_size))

    def _exchange_weights(self, prepared: PreparedWeights, target: EngineConfig) -> list[str]:
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
        linear = config.linear
        if not self.model.decoder.exchanges_weights:
            if linear in ("native", "triton"):
                raise ConfigError(
                    f"{linear!r} is not available for {self.model.spec.architecture}, which runs through transformers.",
                    field="linear",
                    remedy="Choose auto or torch.",
                )
            linear = "torch"
        choice = choose("linear", linear, device=self.model.device, dtype=self.model.dtype)
        if choice.path is None:
            raise ConfigError(f"{linear!r} cannot run here: {choice.reason}", field="linear", remedy=choice.remedy)
        implementation = choice.path.partition(" ")[0]
        return WeightChoice(config.weights, int(config.group_size), config.head_weights, implementation)

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
        obstacle = cache_obstacle(path, config.kv_dtype, device, head_dim)
        if obstacle is not None:
            words = f"{config.kv_dtype!r} cannot be had here: {obstacle.reason}"
            raise ConfigError(words, field="kv_dtype", remedy=obstacle.remedy)
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
            "linear": ("linear", self.config.linear if self.model.decoder.exchanges_weights else "torch"),
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
            blocks=self.scheduler.pool.letters(),
            running=len(self.scheduler.running),
            waiting=self.scheduler.num_waiting,
            totals=dict(self.totals),
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


def _output(request: Request, outlet: _Outlet, tokens: list[int]) -> RequestOutput:
    """News of a request: its new tokens, and the text that became certain by them."""
    new_text = outlet.detokenizer.take()
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
