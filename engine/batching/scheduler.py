"""Who computes what in the next step.

There are no prefill and decode phases: every step spends a token budget on requests until each one's computed tokens
catch up with its known tokens (the idea of vLLM's V1 scheduler). A prompt chunk, a decode token and a draft under
verification are all "some tokens of a request" and share a batch.

    continuous   running requests first, in order of admission; then waiting ones while budget, blocks and
                 `max_running` last. If blocks run out, the request admitted last (lowest priority first) is preempted.
    static       a batch of up to `max_running` requests is formed when the previous one is done, and nobody else is
                 admitted until its longest member has finished: the baseline that continuous batching replaced.

Where every layer has a window, blocks that all windows have left behind go back to the pool before a step is planned:
a running request holds its window, whatever its length (Mistral, arXiv 2310.06825, section 2: the rolling buffer).

No dead-lock: a request that could not run alone in an empty cache is refused when it is submitted, and the oldest
request of the highest priority is never preempted in favour of another, so it always gets on.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
from collections.abc import Iterable, Iterator

from engine.batching.request import Request, RequestState
from engine.cache.block_pool import BlockPool
from engine.cache.kv_cache import BlockCopy
from engine.config import EngineConfig

# Share of the blocks kept free at admission while others run, so that a newcomer is not preempted in the next step.
ADMISSION_WATERMARK = 0.01


@dataclasses.dataclass(slots=True)
class ScheduledRequest:
    """One row of the step's ragged batch.

    Attributes:
        request: who.
        start: first position computed; equals ``request.num_computed_tokens``.
        num_tokens: tokens computed now, drafts included.
        num_drafts: how many of them, the last ones, are drafts.
        samples: True if the row reaches the newest known token, so that a next token can be chosen.
    """

    request: Request
    start: int
    num_tokens: int
    num_drafts: int
    samples: bool = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.samples = self.start + self.num_tokens - self.num_drafts == len(self.request.token_ids)


@dataclasses.dataclass(slots=True)
class Schedule:
    """What one step computes, and what was decided on the way.

    Attributes:
        copies: to be carried out on the cache before the step runs, then :meth:`Scheduler.copies_done`.
    """

    rows: list[ScheduledRequest] = dataclasses.field(default_factory=list)
    copies: list[BlockCopy] = dataclasses.field(default_factory=list)
    preempted: int = 0
    prefix_hit_tokens: int = 0
    prefix_query_tokens: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class PrefixMatch:
    """What the cache knows of the beginning of a text.

    Attributes:
        blocks: whole blocks, to be shared.
        num_tokens: known tokens, those of ``source`` included.
        source: a block that goes on with the text for a while, to be copied; None if there is none.
    """

    blocks: list[int]
    num_tokens: int
    source: int | None = None


NO_MATCH = PrefixMatch([], 0)


class Scheduler:
    """Queues, admission, preemption. It owns the block tables; it never touches a tensor.

    Args:
        pool: the block pool, shared with nobody else.
        window: positions that a query sees at most in any layer, itself included; None where a layer sees all.
    """

    def __init__(self, pool: BlockPool, window: int | None = None) -> None:
        self.pool = pool
        self.window = window
        self.running: list[Request] = []
        self._waiting: list[Request] = []
        self._static_batch: set[str] = set()
        self._admissions = 0
        self._step = 0
        self._releases = 0
        self._blocked: tuple[Request, EngineConfig, int] | None = None

    @property
    def waiting(self) -> tuple[Request, ...]:
        """Requests not in the batch, in the order in which they will be admitted."""
        return tuple(self._waiting)

    @property
    def num_waiting(self) -> int:
        """How many requests are not in the batch."""
        return len(self._waiting)

    def add(self, request: Request) -> None:
        """Queue a request: by priority (lower runs first), then by arrival."""
        bisect.insort(self._waiting, request, key=_queue_order)

    def finish(self, request: Request) -> None:
        """Take a request out, wherever it is, and give its blocks back."""
        if request.state is RequestState.RUNNING:
            self.running.remove(request)
        elif request.state.is_waiting:
            self._waiting.remove(request)
        self._release_blocks(request)
        self._static_batch.discard(request.request_id)
        request.state = RequestState.FINISHED

    def vacate(self) -> int:
        """Put every running request back into the queue, to be computed again from its first token; how many."""
        schedule, count = Schedule(), len(self.running)
        for request in list(self.running):
            self._preempt(request, schedule)
        return count

    def swap_pool(self, pool: BlockPool) -> None:
        """Go on with other blocks, of the same size; nobody may hold one of the old ones (see :meth:`vacate`)."""
        assert not self.running, "a running request holds blocks of the old pool"
        assert pool.block_size == self.pool.block_size, "digests of prefixes are those of the old block size"
        self.pool = pool
        self._releases += 1

    def start_over(self, requests: Iterable[Request], pool: BlockPool) -> None:
        """Queue these requests, to be computed again with the tokens they have, whatever state all of it was in.

        For when something was raised in the midst of a change: blocks and queues are those of nobody then.

        Args:
            requests: unfinished ones.
            pool: a fresh one, of the same block size.
        """
        self.pool = pool
        self.running, self._waiting, self._static_batch, self._blocked = [], [], set(), None
        self._releases += 1
        for request in requests:
            begun = request.times.first_scheduled is not None
            if begun and request.state is RequestState.RUNNING:
                request.num_preemptions += 1
            request.state = RequestState.PREEMPTED if begun else RequestState.WAITING
            request.draft_token_ids = []
            request.block_ids = []
            request.num_computed_tokens = request.num_published = request.num_freed = 0
            request.publishable = True
            self.add(request)

    @contextlib.contextmanager
    def only(self, request: Request) -> Iterator[None]:
        """Inside the block nothing but this request, which ends with it, is queued; all others keep their blocks."""
        others = self.running, self._waiting, self._static_batch
        self.running, self._waiting, self._static_batch = [], [request], set()
        try:
            yield
        finally:
            self.finish(request)
            self.running, self._waiting, self._static_batch = others

    def schedule(self, config: EngineConfig) -> Schedule:
        """Decide the next step under the knobs as they are now."""
        self._step += 1
        schedule = Schedule()
        budget = self._schedule_running(schedule, config)
        if schedule.preempted == 0:  # whoever was just put back must not return in the same step
            self._admit(schedule, budget, config)
        return schedule

    def copies_done(self, schedule: Schedule) -> None:
        """Let go of the blocks that were copied from: nobody could take them before the copy was made."""
        if schedule.copies:
            self.pool.release([copy.source for copy in schedule.copies])
            schedule.copies = []
            self._releases += 1

    def publish_computed(self, request: Request) -> None:
        """Offer the request's newly completed blocks to the prefix index."""
        size = self.pool.block_size
        if request.num_computed_tokens < (request.num_published + 1) * size or not request.publishable:
            return
        full = request.num_computed_tokens // size
        digests = request.full_block_digests(size, full)
        # A block that has left the window is somebody else's by now.
        for position in range(max(request.num_published, request.num_freed), full):
            parent = digests[position - 1] if position else b""
            tokens = request.token_ids[position * size : (position + 1) * size]
            self.pool.publish(request.block_ids[position], parent, digests[position], tokens)
        request.num_published = full

    def check(self) -> None:
        """Assert the invariants of queues, block tables and pool."""
        tables = {request.request_id: request.held_blocks for request in self.running}
        self.pool.check(tables)
        for request in self.running:
            assert request.state == RequestState.RUNNING, f"{request.request_id} runs but is {request.state!r}"
            room = len(request.block_ids) * self.pool.block_size
            assert request.num_computed_tokens <= room, f"{request.request_id} computed more than its blocks hold"
            assert request.num_computed_tokens <= request.num_tokens, f"{request.request_id} computed unknown tokens"
            left = max(0, request.num_computed_tokens - (self.window or request.num_tokens) + 1)
            assert request.num_freed * self.pool.block_size <= left, (
                f"{request.request_id} gave back what it still sees"
            )
        for request in self._waiting:
            assert request.state.is_waiting, f"{request.request_id} waits but is {request.state!r}"
            assert not request.block_ids, f"{request.request_id} waits but holds blocks"
            assert request.num_computed_tokens == 0, f"{request.request_id} waits but claims computed tokens"
        keys = [_queue_order(request) for request in self._waiting]
        assert keys == sorted(keys), "the waiting queue is out of order"

    # -- running requests ------------------------------------------------------------------------------

    def _schedule_running(self, schedule: Schedule, config: EngineConfig) -> int:
        """Give every running request its tokens while the budget lasts; returns what is left of it."""
        budget, size = config.token_budget, self.pool.block_size
        order = list(self.running)
        if self.window is not None:
            for request in order:
                self._free_behind_window(request, self.window)
        if len(order) > budget:  # not all can have a token: whoever waited longest goes first
            order.sort(key=lambda request: request.last_scheduled_step)
        for request in order:
            if budget <= 0:
                break
            if request.state is not RequestState.RUNNING:  # preempted for one of the rows before
                continue
            row = _row(request, budget, config)
            missing = -(-(row.start + row.num_tokens) // size) - len(request.block_ids)
            if missing > 0:
                budget += self._make_room(request, missing, schedule)
                if request.state is not RequestState.RUNNING:
                    continue
            request.last_scheduled_step = self._step
            schedule.rows.append(row)
            budget -= row.num_tokens
        return budget

    def _free_behind_window(self, request: Request, window: int) -> None:
        """Give back the blocks that no query to come can see: the next one is at ``num_computed_tokens``."""
        dead = max(0, request.num_computed_tokens - window + 1) // self.pool.block_size
        dead = min(dead, len(request.block_ids) - 1)  # the table goes on naming one that is its own
        if dead > request.num_freed:
            self.pool.release(request.block_ids[request.num_freed : dead])
            self._releases += 1
            held = request.block_ids[dead:]
            # Another list, since block tables of the step before are known by theirs (`BlockTables`).
            request.block_ids = [held[0]] * dead + held
            request.num_freed = dead

    def _make_room(self, request: Request, missing: int, schedule: Schedule) -> int:
        """Allocate blocks, preempting others (or the request itself) if need be; returns budget set free by that."""
        freed = 0
        while missing > self.pool.num_free:
            victim = max(self.running, key=_preemption_order)
            freed += self._preempt(victim, schedule)
            if victim is request:
                return freed
        request.block_ids.extend(self.pool.allocate(missing))
        return freed

    def _preempt(self, victim: Request, schedule: Schedule) -> int:
        """Put a request back into the queue; returns the tokens it had been given in this step."""
        given = sum(row.num_tokens for row in schedule.rows if row.request is victim)
        schedule.rows = [row for row in schedule.rows if row.request is not victim]
        schedule.preempted += 1
        self.running.remove(victim)
        self._release_blocks(victim)
        victim.state = RequestState.PREEMPTED
        victim.num_preemptions += 1
        victim.draft_token_ids = []
        self.add(victim)
        return given

    def _release_blocks(self, request: Request) -> None:
        self.pool.release(request.held_blocks)
        self._releases += 1
        request.block_ids = []
        request.num_freed = 0
        request.num_computed_tokens = 0
        request.num_published = 0
        # What it computes from now on comes from one model only, whatever was swapped under it before.
        request.publishable = True

    # -- admission ---------------------------------------------------------------------------------------

    def _admit(self, schedule: Schedule, budget: int, config: EngineConfig) -> None:
        """Move waiting requests into the batch while budget, blocks and `max_running` last."""
        room = config.max_running - len(self.running)
        if room <= 0 or budget <= 0 or not self._waiting:
            return
        for request in self._admissible(room, config):
            if budget <= 0 or self._is_blocked(request, config):
                return
            match = self._known_prefix(request) if config.prefix_cache else NO_MATCH
            row = self._first_row(request, match, budget, schedule, config)
            if row is None:
                return
            if not self._fits(row, match, config) and match.source is not None:
                # The copy needs a block more than the blocks it starts from; without it the request may yet fit.
                match = PrefixMatch(match.blocks, len(match.blocks) * self.pool.block_size)
                row = self._first_row(request, match, budget, schedule, config)
            if row is None or not self._fits(row, match, config):
                self._blocked = (request, config, self._releases)
                return  # strictly in order: nobody overtakes, so nobody starves
            self._start(row, match, schedule, config)
            budget -= row.num_tokens

    def _admissible(self, room: int, config: EngineConfig) -> list[Request]:
        """The next requests, at most ``room``."""
        if config.batching == "continuous":
            self._static_batch.clear()
            return self._waiting[:room]
        if not self._static_batch:
            members = self.running or self._waiting[: config.max_running]
            self._static_batch = {request.request_id for request in members}
        return [request for request in self._waiting if request.request_id in self._static_batch][:room]

    def _is_blocked(self, request: Request, config: EngineConfig) -> bool:
        """True if it did not fit and no block has been given back since: do not look its prefix up at every step."""
        blocked = self._blocked
        return (
            blocked is not None
            and blocked[0] is request
            and blocked[1] is config
            and blocked[2] == self._releases
            and bool(self.running)
        )

    def _known_prefix(self, request: Request) -> PrefixMatch:
        """The longest known prefix. The last token is never part of it: its logits are needed."""
        size, tokens = self.pool.block_size, request.token_ids
        most = len(tokens) - 1
        digests = request.full_block_digests(size, most // size)
        blocks = self.pool.lookup(digests, tokens)
        start = len(blocks) * size
        parent = digests[len(blocks) - 1] if blocks else b""
        partial = self.pool.longest_partial(parent, tokens[start : min(start + size, most)])
        if partial is None:
            return PrefixMatch(blocks, start)
        source, count = partial
        return PrefixMatch(blocks, start + count, source)

    def _first_row(
        self, request: Request, match: PrefixMatch, budget: int, schedule: Schedule, config: EngineConfig
    ) -> ScheduledRequest | None:
        tokens = request.num_tokens - match.num_tokens
        if tokens > budget and not config.chunked_prefill:
            if any(row.num_tokens - row.num_drafts > 1 for row in schedule.rows):
                return None  # a whole prompt may exceed the budget next to running decodes, not next to another prompt
            budget = _envelope_left(budget, config)
        return ScheduledRequest(request, match.num_tokens, min(tokens, budget), 0)

    def _fits(self, row: ScheduledRequest, match: PrefixMatch, config: EngineConfig) -> bool:
        """True if the row's blocks are there without taking what others were promised."""
        request = row.request
        if config.preemption:
            end = row.start + row.num_tokens
            reserve = int(ADMISSION_WATERMARK * self.pool.num_blocks) if self.running else 0
        else:
            end = max(row.start + row.num_tokens, self._most_held(request, config))
            reserve = sum(
                max(0, self._blocks_for(self._most_held(r, config)) - len(r.held_blocks)) for r in self.running
            )
        wanted = self._blocks_for(end) - len(match.blocks) + self.pool.count_free(match.blocks)
        if match.source is not None:  # kept out of the free list until it has been copied
            wanted += self.pool.count_free([match.source])
        return wanted + reserve <= self.pool.num_free

    def _start(self, row: ScheduledRequest, match: PrefixMatch, schedule: Schedule, config: EngineConfig) -> None:
        request, size = row.request, self.pool.block_size
        self._waiting.remove(request)
        self.pool.share(match.blocks)
        if match.source is not None:
            self.pool.share([match.source])
        fresh = self.pool.allocate(self._blocks_for(row.start + row.num_tokens) - len(match.blocks))
        if match.source is not None:
            schedule.copies.append(BlockCopy(match.source, fresh[0], match.num_tokens - len(match.blocks) * size))
        request.block_ids = [*match.blocks, *fresh]
        request.num_computed_tokens = row.start
        request.num_published = len(match.blocks)
        if request.state is RequestState.WAITING:
            request.num_cached_tokens = row.start
        request.state = RequestState.RUNNING
        self._admissions += 1
        request.admission_index = self._admissions
        self.running.append(request)
        if config.prefix_cache:
            schedule.prefix_query_tokens += request.num_tokens
            schedule.prefix_hit_tokens += row.start
        request.last_scheduled_step = self._step
        schedule.rows.append(row)

    def _most_held(self, request: Request, config: EngineConfig) -> int:
        """Tokens whose blocks a request may hold at once from its second step on: its window and the step's own."""
        if self.window is None:
            return request.max_total_tokens
        around = self.window + config.max_num_batched_tokens + self.pool.block_size
        return min(request.max_total_tokens, around)

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.pool.block_size)


def _row(request: Request, budget: int, config: EngineConfig) -> ScheduledRequest:
    """The next tokens of a running request, drafts last; cut to the budget unless a prompt must stay whole."""
    start = request.num_computed_tokens
    known = len(request.token_ids) - start
    if known > budget:
        if not config.chunked_prefill:
            budget = _envelope_left(budget, config)
        return ScheduledRequest(request, start, min(known, budget), 0)
    drafts = min(len(request.draft_token_ids), budget - known)
    return ScheduledRequest(request, start, known + drafts, drafts)


def _envelope_left(budget: int, config: EngineConfig) -> int:
    """Tokens a prompt that should stay whole may have: what memory was reserved for, less what is taken already."""
    return config.max_num_batched_tokens - (config.token_budget - budget)


def _queue_order(request: Request) -> tuple[int, float]:
    return request.priority, request.times.arrival


def _preemption_order(request: Request) -> tuple[int, int]:
    """Largest is preempted first: lowest priority, then admitted last."""
    return request.priority, request.admission_index
