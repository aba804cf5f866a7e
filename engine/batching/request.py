"""A request and the states it moves through.

WAITING ──admitted──> RUNNING ──last token──> FINISHED
   ^                     │
   └──── PREEMPTED <─────┘   blocks taken away; recomputed when it is admitted again
"""

from __future__ import annotations

import dataclasses
import enum

from engine.cache.block_pool import chain_digest
from engine.outputs import FinishReason, RequestTimes
from engine.sampling.params import SamplingParams


class RequestState(enum.IntEnum):
    """Ordered: everything up to PREEMPTED waits for admission; nothing leaves FINISHED."""

    WAITING = 0
    PREEMPTED = 1
    RUNNING = 2
    FINISHED = 3

    @property
    def is_waiting(self) -> bool:
        """True before (re-)admission."""
        return self <= RequestState.PREEMPTED


@dataclasses.dataclass(slots=True, eq=False)
class Request:
    """Everything the engine knows of one request.

    Attributes:
        token_ids: prompt and output so far; ``num_prompt_tokens`` splits them.
        num_computed_tokens: tokens whose keys and values are in the cache. Prefill and decode are the same thing:
            a request is computed until this catches up with ``num_tokens``.
        block_ids: its block table.
        num_freed: blocks at the head of the table that every layer's window has left behind and that were given back;
            their entries repeat a block that it still holds, so that a kernel may load, never use, what they name.
        draft_token_ids: guessed continuation, verified in the next step; never part of ``token_ids`` before that.
        digests: chained digests of its full blocks, grown on demand.
        publishable: False after weights were swapped under it: its keys and values come from two models.
        num_published: full blocks already offered to the prefix index.
        end_token_ids: tokens that end its output.
        admission_index: order of admission: the latest is preempted first.
    """

    request_id: str
    token_ids: list[int]
    num_prompt_tokens: int
    params: SamplingParams
    priority: int
    times: RequestTimes
    seed: int
    end_token_ids: frozenset[int] = frozenset()
    state: RequestState = RequestState.WAITING
    num_computed_tokens: int = 0
    block_ids: list[int] = dataclasses.field(default_factory=list)
    num_freed: int = 0
    draft_token_ids: list[int] = dataclasses.field(default_factory=list)
    digests: list[bytes] = dataclasses.field(default_factory=list)
    publishable: bool = True
    num_published: int = 0
    admission_index: int = -1
    last_scheduled_step: int = -1
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    error: str | None = None
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens known so far."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Output tokens known so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def prompt_token_ids(self) -> list[int]:
        """The prompt."""
        return self.token_ids[: self.num_prompt_tokens]

    @property
    def output_token_ids(self) -> list[int]:
        """The output so far."""
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def max_total_tokens(self) -> int:
        """Tokens it may grow to."""
        return self.num_prompt_tokens + self.params.max_tokens

    @property
    def held_blocks(self) -> list[int]:
        """The blocks of its table that are its own."""
        return self.block_ids[self.num_freed :] if self.num_freed else self.block_ids

    @property
    def in_decode(self) -> bool:
        """True once only its newest token lacks keys and values."""
        return self.num_computed_tokens >= self.num_tokens - 1 and self.num_output_tokens > 0

    def full_block_digests(self, block_size: int, count: int) -> list[bytes]:
        """Chained digests of the first ``count`` full blocks of ``token_ids``."""
        while len(self.digests) < count:
            start = len(self.digests) * block_size
            parent = self.digests[-1] if self.digests else b""
            self.digests.append(chain_digest(parent, self.token_ids[start : start + block_size]))
        return self.digests[:count]
