"""Finding the rows that make a step raise, so that they end alone.

Keys and values are written where they belong whoever else is in the batch, and a draw depends on its own row alone:
the same rows can be computed and sampled again, in any company, and give the same tokens. So a batch that raises is
computed again in halves, down to the rows that raise by themselves; a batch whose sampling raises is sampled position
by position. If no part of it raises again nobody is to blame, as where memory was short for all of them at once.
"""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Callable, Sequence

import torch

from engine.batching.request import Request
from engine.batching.scheduler import ScheduledRequest, Scheduler
from engine.cache.block_pool import BlockPool
from engine.cache.kv_cache import BlockCopy, KVCache
from engine.config import EngineConfig
from engine.outputs import TokenLogprob
from engine.sampling.params import NO_TOKEN, SamplingRow
from engine.sampling.samplers import Sampler
from engine.sizing import is_out_of_memory, release_memory

LONGEST_REASON = 500


@dataclasses.dataclass(frozen=True, slots=True)
class Failure:
    """What was raised, as text: the exception itself would keep the tensors of the failed step alive.

    Attributes:
        reason: for the client.
        trace: for the event log.
    """

    reason: str
    trace: str

    @classmethod
    def of(cls, error: BaseException, doing: str) -> Failure:
        """Describe an exception that was caught.

        Args:
            doing: what failed, e.g. "computing its next token".
        """
        reason = f"{doing} failed: {type(error).__name__}: {error}"[:LONGEST_REASON]
        failure = cls(reason, "".join(traceback.format_exception(error)))
        error.__traceback__ = None
        return failure


Failures = list[tuple[Request, Failure]]
"""Requests that cannot go on, each with the reason."""


def find_unschedulable(
    scheduler: Scheduler, requests: Sequence[Request], config: EngineConfig, make_pool: Callable[[], BlockPool]
) -> Failures:
    """Those of the requests for which scheduling raises even alone. What the scheduler held is lost by looking.

    Args:
        make_pool: gives a fresh pool.
    """
    found: Failures = []
    for request in requests:
        scheduler.start_over([request], make_pool())
        try:
            scheduler.schedule(config)
        except Exception as error:
            found.append((request, Failure.of(error, "scheduling it")))
    return found


def copy_blocks(cache: KVCache, copies: Sequence[BlockCopy]) -> dict[int, Failure]:
    """Make copies in a cache; why one could not be made at all, by the number of the block it should have filled."""
    failed: dict[int, Failure] = {}
    try:
        cache.copy_blocks(copies)
    except Exception:  # a copy can be made again: which of them cannot?
        for copy in copies:
            try:
                cache.copy_blocks([copy])
            except Exception as error:
                failed[copy.destination] = Failure.of(error, "copying its prefix")
    return failed


@dataclasses.dataclass(slots=True)
class Computed:
    """What came of rows that were computed apart.

    Attributes:
        rows: those that could be computed.
        logits: of them, [R, vocab]; None if there are none.
        failed: those that raise by themselves.
        undrafted: requests that could be computed without their drafts only.
    """

    rows: list[ScheduledRequest] = dataclasses.field(default_factory=list)
    logits: torch.Tensor | None = None
    failed: Failures = dataclasses.field(default_factory=list)
    undrafted: list[Request] = dataclasses.field(default_factory=list)


def compute_apart(
    run: Callable[[Sequence[ScheduledRequest]], torch.Tensor], rows: Sequence[ScheduledRequest], error: Exception
) -> Computed:
    """Compute the rows of a step that raised ``error`` as a whole: at most 2 R - 2 runs more for R rows.

    Args:
        run: gives the logits of some rows.
        rows: of the step.
    """
    result = Computed()
    logits: list[torch.Tensor] = []
    parts = _parts(rows, error, result)
    while parts:
        part = parts.pop()
        try:
            logits.append(run(part))
        except Exception as again:
            parts += _parts(part, again, result)
        else:
            result.rows += part
    if logits:
        result.logits = torch.cat(logits)
    return result


def _parts(rows: Sequence[ScheduledRequest], error: Exception, result: Computed) -> list[list[ScheduledRequest]]:
    """What to try instead of rows that raised, the first part last."""
    short = is_out_of_memory(error)
    failure = Failure.of(error, "computing its next token")
    if short:
        release_memory()
    if len(rows) > 1:
        half = len(rows) // 2
        return [list(rows[half:]), list(rows[:half])]
    row = rows[0]
    if row.num_drafts:  # a guess is never worth a request
        result.undrafted.append(row.request)
        return [[ScheduledRequest(row.request, row.start, row.num_tokens - row.num_drafts, 0)]]
    result.failed.append((row.request, failure))
    return []


@dataclasses.dataclass(slots=True)
class Sampled:
    """Tokens and log-probabilities of every position, and why a position has none, by its number."""

    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[TokenLogprob | None] = dataclasses.field(default_factory=list)
    failed: dict[int, Failure] = dataclasses.field(default_factory=dict)


def sample_rows(
    sample: Sampler,
    logits: torch.Tensor,
    rows: Sequence[ScheduledRequest],
    positions_of: Callable[[Sequence[ScheduledRequest]], list[SamplingRow]],
) -> Sampled:
    """A token for each row of the logits; position by position where they cannot be sampled as a whole.

    Args:
        logits: [R, vocab] of ``rows``.
        positions_of: gives the sampling rows of rows, in order.
    """
    try:
        return Sampled(*sample(logits, positions_of(rows)))
    except Exception as error:  # a row's own parameters, or its logits: each is asked by itself
        if is_out_of_memory(error):
            error.__traceback__ = None
            release_memory()
        return _sample_apart(sample, logits, rows, positions_of)


def _sample_apart(
    sample: Sampler,
    logits: torch.Tensor,
    rows: Sequence[ScheduledRequest],
    positions_of: Callable[[Sequence[ScheduledRequest]], list[SamplingRow]],
) -> Sampled:
    result = Sampled()
    for row in rows:
        if not row.samples:
            continue
        end = len(result.tokens) + row.num_drafts + 1
        try:
            for position in positions_of([row]):
                place = len(result.tokens)
                (token,), (entry,) = sample(logits[place : place + 1], [position])
                result.tokens.append(token)
                result.logprobs.append(entry)
        except Exception as error:
            result.failed[len(result.tokens)] = Failure.of(error, "choosing its next token")
        missing = end - len(result.tokens)  # behind a position without a token no other counts
        result.tokens += [NO_TOKEN] * missing
        result.logprobs += [None] * missing
    return result


def why_no_token(logits: torch.Tensor) -> str:
    """The reason of a row, [vocab], that leaves no token to choose. It asks the device: for a row that ends only."""
    if bool(logits.isnan().any()):
        return "the model computed NaN for this request: its next token cannot be chosen."
    if not bool(logits.amax().isfinite()):
        return "the model computed infinity for this request: its next token cannot be chosen."
    return "no token is left to choose: every one is forbidden here, or a penalty made its logit infinite."
