"""What the engine tells the outside: outputs of requests, statistics of steps, results of a reconfiguration.

Plain dataclasses of JSON-ready values, so that the server, the run driver and the storage room share them.
All times are ``time.perf_counter()`` seconds of the engine's process unless a name ends in ``_unix_s``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from engine.errors import HeadroomError

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclasses.dataclass(slots=True)
class TokenLogprob:
    """Log-probability of one output position: the chosen token and the most likely alternatives.

    Attributes:
        token_id: the chosen token.
        logprob: its natural-log probability.
        top: ``{token_id: logprob}`` of the most likely tokens, most likely first.
    """

    token_id: int
    logprob: float
    top: dict[int, float]


@dataclasses.dataclass(slots=True)
class RequestTimes:
    """Clock of one request. ``token_times[i]`` is when output token i became known; tokens that one verification
    accepted together share a time."""

    arrival: float
    first_scheduled: float | None = None
    token_times: list[float] = dataclasses.field(default_factory=list)
    end: float | None = None


@dataclasses.dataclass(slots=True)
class Transcript:
    """What is known of a request's text. Every output of the request refers to it; it is only ever appended to.

    Attributes:
        token_ids: prompt, then output.
        num_prompt_tokens: where the output begins.
        pieces: text of the output that has been handed out.
    """

    token_ids: list[int]
    num_prompt_tokens: int
    pieces: list[str]


@dataclasses.dataclass(slots=True)
class RequestOutput:
    """News of one request after a step (one step may bring several tokens under speculation).

    What came before is not copied into each output, which would cost O(n²) over a request: ``prompt_token_ids``,
    ``token_ids`` and ``text`` are cut out of the shared transcript when they are asked for, in any thread, and stay
    what they were at this output.

    Attributes:
        request_id: as submitted.
        new_token_ids: tokens of this step.
        new_text: text that became certain in this step (held back while a stop string or a character may be half done).
        transcript, num_output_tokens, num_pieces: everything so far.
        finished: True once, on the last output.
        finish_reason: "stop" (end of sequence or stop string), "length", "abort" or "error"; None before the end.
        stop_reason: the stop string or token id that ended it, if one did.
        error: what went wrong if finish_reason is "error".
        logprobs: one entry a new token, if asked for.
        times: the request's clock (a reference; it grows).
        num_cached_tokens: prompt tokens whose KV came from the prefix cache.
        num_preemptions: how often the request was put back.
        num_draft_tokens, num_accepted_tokens: speculation totals so far.
        refusal: if the request was refused when it was to be queued (its caller had left by then), what the caller
            would have been raised; such an output is the only one of its request.
    """

    request_id: str
    new_token_ids: list[int]
    new_text: str
    transcript: Transcript
    num_output_tokens: int
    num_pieces: int
    finished: bool
    finish_reason: FinishReason | None
    stop_reason: str | int | None
    error: str | None
    logprobs: list[TokenLogprob] | None
    times: RequestTimes
    num_cached_tokens: int
    num_preemptions: int
    num_draft_tokens: int
    num_accepted_tokens: int
    refusal: HeadroomError | None = None

    @classmethod
    def refused(
        cls, request_id: str, prompt_token_ids: Sequence[int], times: RequestTimes, error: BaseException
    ) -> RequestOutput:
        """The only output of a request that was not queued."""
        return cls(
            request_id=request_id,
            new_token_ids=[],
            new_text="",
            transcript=Transcript(list(prompt_token_ids), len(prompt_token_ids), []),
            num_output_tokens=0,
            num_pieces=0,
            finished=True,
            finish_reason="error",
            stop_reason=None,
            error=str(error) if isinstance(error, HeadroomError) else f"{type(error).__name__}: {error}",
            logprobs=None,
            times=times,
            num_cached_tokens=0,
            num_preemptions=0,
            num_draft_tokens=0,
            num_accepted_tokens=0,
            refusal=error if isinstance(error, HeadroomError) else None,
        )

    @property
    def prompt_token_ids(self) -> list[int]:
        """The whole prompt."""
        return self.transcript.token_ids[: self.transcript.num_prompt_tokens]

    @property
    def token_ids(self) -> list[int]:
        """All output tokens so far."""
        start = self.transcript.num_prompt_tokens
        return self.transcript.token_ids[start : start + self.num_output_tokens]

    @property
    def text(self) -> str:
        """All text so far, without a stop string."""
        return "".join(self.transcript.pieces[: self.num_pieces])


@dataclasses.dataclass(frozen=True, slots=True)
class StepStats:
    """What one step did. A chart of the Live page is a list of these.

    Attributes:
        index: number of the step since the engine was made.
        time_unix_s: wall clock at the end of the step.
        duration_ms: wall time of the whole step.
        schedule_ms, model_ms, sample_ms: its parts: drafting and scheduling; building the tensors and the forward
            pass; sampling and commit.
        num_running, num_waiting: requests after the step.
        prefill_tokens: prompt tokens computed (recomputed ones after a preemption included).
        decode_tokens: one for each sequence past its prompt.
        draft_tokens, accepted_tokens: speculative tokens verified, and how many of them were right.
        output_tokens: tokens handed to clients.
        preempted: requests put back in this step.
        kv_blocks_used: blocks that running requests hold.
        kv_blocks_cached: free blocks that still hold a reusable prefix.
        prefix_hit_tokens, prefix_query_tokens: of the requests admitted in this step.
        execution: how the forward pass ran: "eager", "compiled" or "graphs".
    """

    index: int
    time_unix_s: float
    duration_ms: float
    schedule_ms: float
    model_ms: float
    sample_ms: float
    num_running: int
    num_waiting: int
    prefill_tokens: int
    decode_tokens: int
    draft_tokens: int
    accepted_tokens: int
    output_tokens: int
    preempted: int
    kv_blocks_used: int
    kv_blocks_cached: int
    prefix_hit_tokens: int
    prefix_query_tokens: int
    execution: str = "eager"


@dataclasses.dataclass(frozen=True, slots=True)
class EngineEvent:
    """Something that charts mark: a reconfiguration, a load, a failure.

    Attributes:
        index: running number.
        time_unix_s: wall clock.
        kind: "load" | "reconfigure" | "execution" | "cache" | "run" | "error".
        summary: one line for a person, e.g. "weights: model → int4 (paused 12 ms)".
        detail: JSON-ready particulars.
    """

    index: int
    time_unix_s: float
    kind: str
    summary: str
    detail: dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class ReconfigureResult:
    """Outcome of a change of knobs.

    Attributes:
        changed: ``{knob: [old, new]}``.
        tier: the heaviest tier among the changes ("live", "swap"), "none" if nothing changed.
        pause_ms: how long no step could run because of it.
        prepare_ms: work done alongside the running engine before the pause.
        requests_in_flight: how many requests were running or waiting when it was applied.
        notes: what the operator should know (which path will run, what was recomputed or dropped).
    """

    changed: dict[str, tuple[Any, Any]]
    tier: str
    pause_ms: float
    prepare_ms: float
    requests_in_flight: int
    notes: list[str]


@dataclasses.dataclass(frozen=True, slots=True)
class MemoryReport:
    """Where the bytes are, predicted by `engine.capacity` and as really allocated. Bytes.

    Attributes:
        limit: what the engine was given.
        weights: bytes of parameters now resident (follows the weight format).
        weights_at_load: bytes of weights the KV cache was sized with, at load or at its last swap.
        activations: reserved for activations and logits of the largest step.
        kv_cache: bytes of the KV cache as allocated.
        resident: resident set size of the process (CPU) or device memory in use (GPU), all included.
    """

    limit: int
    weights: int
    weights_at_load: int
    activations: int
    kv_cache: int
    resident: int


@dataclasses.dataclass(frozen=True, slots=True)
class CacheOffer:
    """Memory that lighter weights have left and the KV cache could take (``POST /admin/resize``).

    Attributes:
        num_blocks: what the cache would hold.
        gained_blocks: more than now.
        gained_bytes: more than now.
    """

    num_blocks: int
    gained_blocks: int
    gained_bytes: int


@dataclasses.dataclass(frozen=True, slots=True)
class EngineStatus:
    """A consistent picture of the engine between two steps; cheap enough to be taken several times a second.

    Attributes:
        model: name, family, fingerprint, parameters, layers … for display.
        config, config_hash: the knobs.
        path: what really runs: device, dtype, attention, weights, execution, each with a reason where it is not what
            was asked for.
        memory: see :class:`MemoryReport`.
        block_size, num_blocks, max_model_len: the capacity envelope.
        blocks: the state of each block: "." free, "c" free but holding a reusable prefix, "u" used by one request,
            "s" shared by several.
        running, waiting: requests now.
        totals: counters since the start: prompt_tokens, output_tokens, requests, preemptions, prefix_hit_tokens,
            prefix_query_tokens, drafts (how many were verified), draft_tokens, accepted_tokens.
        resize: a :class:`CacheOffer` as a mapping; None where there is nothing to take.
        speculation: of those drafts, see :meth:`engine.speculation.statistics.DraftStatistics.to_dict`.
        execution: how forward passes run: ``asked`` and ``last`` mode, ``reason`` of the last; ``prepared`` token
            counts ("1", "2–2048"); ``failed``, a list of {tokens, error}; ``preparing``, None or {done, total, current,
            seconds}.
    """

    model: dict[str, Any]
    config: dict[str, Any]
    config_hash: str
    path: dict[str, str]
    memory: MemoryReport
    block_size: int
    num_blocks: int
    max_model_len: int
    blocks: str
    running: int
    waiting: int
    totals: dict[str, int]
    resize: dict[str, int] | None = None
    speculation: dict[str, Any] = dataclasses.field(default_factory=dict)
    execution: dict[str, Any] = dataclasses.field(default_factory=dict)
