"""Who computes what in the next step.

There are no prefill and decode phases: every step spends a token budget on requests until each one's computed tokens
catch up with its known tokens (the idea of vLLM's V1 scheduler). A prompt chunk, a decode token and a draft under
verification are all "some tokens of a request" and share a batch.

    continuous   running requests first, in order of admission; then waiting ones while budget, blocks and
                 `max_running` last. If blocks run out, the request admitted last (lowest priority first) is preempted.
    static       a batch of up to `max_running` requests is formed when the previous one is done, and nobody else is
                 admitted until its longest member has finished: the baseline that continuous batching replaced.

No dead-lock: a request that could not run alone in an empty cache is refused when it is submitted, and the oldest
request of the highest priority is never preempted in favour of another, so it always gets on.
"""

from __future__ import annotations

import bisect
import dataclasses

from engine.batching.request import Request, RequestState
from engine.cache.block_pool import BlockPool
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
    """

    request: Request
    start: int
    num_tokens: int
    num_drafts: int

    @property
    def samples(self) -> bool:
        """True if the row reaches the newest known token, so that a next token can be chosen."""
        return self.start + self.num_tokens - self.num_drafts == self.request.num_tokens


@dataclasses.dataclass(slots=True)
class Schedule:
    """What one step computes, and what was decided on the way."""

    rows: list[ScheduledRequest] = dataclasses.field(default_factory=list)
    preempted: int = 0
    prefix_hit_tokens: int = 0
    prefix_query_tokens: int = 0


class Scheduler:
    """Queues, admission, preemption. It owns the block tables; it never touches a tensor.

    Args:
        pool: the block pool, shared with nobody else.
    """

    def __init__(self, pool: BlockPool) -> None:
        self.pool = pool
        self.running: list[Request] = []
        self._waiting: list[Request] = []
        self._static_batch: set[str] = set()
        self._admissions = 0
        self._step = 0

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
        if request.state == RequestState.RUNNING:
            self.running.remove(request)
        elif request.state.is_waiting:
            self._waiting.remove(request)
        self._release_blocks(request)
        self._static_batch.discard(request.request_id)
        request.state = RequestState.FINISHED

    def schedule(self, config: EngineConfig) -> Schedule:
        """Decide the next step under the knobs in force now."""
        self._step += 1
        schedule = Schedule()
        budget = self._schedule_running(schedule, config.token_budget, config)
        if schedule.preempted == 0:  # whoever was just put back must not return in the same step
            self._admit(schedule, budget, config)
        return schedule

    def publish_computed(self, request: Request) -> None:
        """Offer the request's newly completed blocks to the prefix index."""
        if not request.publishable:
            return
        full = min(request.num_computed_tokens, request.num_tokens) // self.pool.block_size
        if full <= request.num_published:
            return
        digests = request.full_block_digests(self.pool.block_size, full)
        for position in range(request.num_published, full):
            start = position * self.pool.block_size
            tokens = request.token_ids[start : start + self.pool.block_size]
            self.pool.publish(request.block_ids[position], digests[position], tokens)
        request.num_published = full

    def check(self) -> None:
        """Assert the invariants of queues, block tables and pool."""
        tables = {request.request_id: request.block_ids for request in self.running}
        self.pool.check(tables)
        for request in self.running:
            assert request.state == RequestState.RUNNING, f"{request.request_id} runs but is {request.state!r}"
            room = len(request.block_ids) * self.pool.block_size
            assert request.num_computed_tokens <= room, f"{request.request_id} computed more than its blocks hold"
            assert request.num_computed_tokens <= request.num_tokens, f"{request.request_id} computed unknown tokens"
        for request in self._waiting:
            assert request.state.is_waiting, f"{request.request_id} waits but is {request.state!r}"
            assert not request.block_ids, f"{request.request_id} waits but holds blocks"
            assert request.num_computed_tokens == 0, f"{request.request_id} waits but claims computed tokens"
        keys = [_queue_order(request) for request in self._waiting]
        assert keys == sorted(keys), "the waiting queue is out of order"

    # -- running requests ------------------------------------------------------------------------------

    def _schedule_running(self, schedule: Schedule, budget: int, config: EngineConfig) -> int:
        """Give every running request its tokens while the budget lasts; returns what is left of it."""
        order = list(self.running)
        if len(order) > budget:  # not all can have a token: whoever waited longest goes first
            order.sort(key=lambda request: request.last_scheduled_step)
        for request in order:
            if budget <= 0:
                break
            if request.state != RequestState.RUNNING:  # preempted for one of the rows before
                continue
            row = _row(request, budget, config)
            budget += self._make_room(row, schedule)
            if request.state == RequestState.RUNNING:
                self._take(row, schedule)
                budget -= row.num_tokens
        return budget

    def _make_room(self, row: ScheduledRequest, schedule: Schedule) -> int:
        """Allocate the row's blocks, preempting others (or itself) if need be; returns budget set free by that."""
        request, freed = row.request, 0
        needed = self._blocks_for(row.start + row.num_tokens) - len(request.block_ids)
        while needed > self.pool.num_free:
            victim = max(self.running, key=_preemption_order)
            freed += self._preempt(victim, schedule)
            if victim is request:
                return freed
        if needed > 0:
            request.block_ids.extend(self.pool.allocate(needed))
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
        self.pool.release(request.block_ids)
        request.block_ids = []
        request.num_computed_tokens = 0
        request.num_published = 0
        # What it computes from now on comes from one model only, whatever was swapped under it before.
        request.publishable = True

    def _take(self, row: ScheduledRequest, schedule: Schedule) -> None:
        row.request.last_scheduled_step = self._step
        schedule.rows.append(row)

    # -- admission ---------------------------------------------------------------------------------------

    def _admit(self, schedule: Schedule, budget: int, config: EngineConfig) -> None:
        """Move waiting requests into the batch while budget, blocks and `max_running` last."""
        for request in self._admissible(config):
            if budget <= 0 or len(self.running) >= config.max_running:
                return
            cached = self._cached_prefix(request) if config.prefix_cache else []
            row = self._first_row(request, len(cached) * self.pool.block_size, budget, schedule, config)
            if row is None or not self._fits(row, cached, config):
                return  # strictly in order: nobody overtakes, so nobody starves
            self._start(row, cached, schedule, config)
            budget -= row.num_tokens

    def _admissible(self, config: EngineConfig) -> list[Request]:
        if config.batching == "continuous":
            self._static_batch.clear()
            return list(self._waiting)
        if not self._static_batch:
            members = self.running or self._waiting[: config.max_running]
            self._static_batch = {request.request_id for request in members}
        return [request for request in self._waiting if request.request_id in self._static_batch]

    def _cached_prefix(self, request: Request) -> list[int]:
        """Blocks with the longest known prefix. The last token is never among them: its logits are needed."""
        full = (request.num_tokens - 1) // self.pool.block_size
        digests = request.full_block_digests(self.pool.block_size, full)
        return self.pool.lookup(digests, request.token_ids)

    def _first_row(
        self, request: Request, start: int, budget: int, schedule: Schedule, config: EngineConfig
    ) -> ScheduledRequest | None:
        tokens = request.num_tokens - start
        if config.chunked_prefill:
            tokens = min(tokens, budget)
        elif tokens > budget and any(row.num_tokens - row.num_drafts > 1 for row in schedule.rows):
            return None  # a whole prompt may exceed the budget beside running decodes, not beside another prompt
        return ScheduledRequest(request, start, tokens, 0)

    def _fits(self, row: ScheduledRequest, cached: list[int], config: EngineConfig) -> bool:
        """True if the row's blocks are there without taking what others were promised."""
        request = row.request
        if config.preemption:
            end = row.start + row.num_tokens
            reserve = int(ADMISSION_WATERMARK * self.pool.num_blocks) if self.running else 0
        else:
            end = request.max_total_tokens
            reserve = sum(max(0, self._blocks_for(r.max_total_tokens) - len(r.block_ids)) for r in self.running)
        wanted = self._blocks_for(end) - len(cached) + self.pool.count_free(cached)
        return wanted + reserve <= self.pool.num_free

    def _start(self, row: ScheduledRequest, cached: list[int], schedule: Schedule, config: EngineConfig) -> None:
        request = row.request
        self._waiting.remove(request)
        self.pool.share(cached)
        fresh = self._blocks_for(row.start + row.num_tokens) - len(cached)
        request.block_ids = [*cached, *self.pool.allocate(fresh)]
        request.num_computed_tokens = row.start
        request.num_published = len(cached)
        if request.state == RequestState.WAITING:
            request.num_cached_tokens = row.start
        request.state = RequestState.RUNNING
        self._admissions += 1
        request.admission_index = self._admissions
        self.running.append(request)
        if config.prefix_cache:
            schedule.prefix_query_tokens += request.num_tokens
            schedule.prefix_hit_tokens += row.start
        self._take(row, schedule)

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.pool.block_size)


def _row(request: Request, budget: int, config: EngineConfig) -> ScheduledRequest:
    """The next tokens of a running request, drafts last; cut to the budget unless a prompt must stay whole."""
    start = request.num_computed_tokens
    known = request.num_tokens - start
    if known > budget and config.chunked_prefill:
        return ScheduledRequest(request, start, budget, 0)
    drafts = max(0, min(len(request.draft_token_ids), budget - known))
    return ScheduledRequest(request, start, known + drafts, drafts)


def _queue_order(request: Request) -> tuple[int, float]:
    return request.priority, request.times.arrival


def _preemption_order(request: Request) -> tuple[int, int]:
    """Largest is preempted first: lowest priority, then admitted last."""
    return request.priority, request.admission_index
