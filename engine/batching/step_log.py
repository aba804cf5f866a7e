"""What steps did: counted while a step is committed, kept for charts, summed up since the start."""

from __future__ import annotations

import dataclasses
import time
from typing import NamedTuple

from engine.batching.scheduler import Schedule, Scheduler
from engine.outputs import StepStats
from engine.ring import Ring

STEPS_KEPT = 8192
_TOTALS = (
    "requests",
    "prompt_tokens",
    "output_tokens",
    "preemptions",
    "prefix_hit_tokens",
    "prefix_query_tokens",
    "drafts",
    "draft_tokens",
    "accepted_tokens",
)


@dataclasses.dataclass(slots=True)
class StepCounters:
    """Composition of a step, counted while its results are committed.

    Attributes:
        prefill_tokens, decode_tokens, output_tokens: see :class:`engine.outputs.StepStats`.
        drafts: how many were verified; draft_tokens, accepted_tokens: their tokens.
        raised: rows of which something raised.
    """

    prefill_tokens: int = 0
    decode_tokens: int = 0
    drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    output_tokens: int = 0
    raised: int = 0


class StepClock(NamedTuple):
    """``time.perf_counter()`` at the borders of a step's parts."""

    began: float
    scheduled: float
    computed: float
    done: float


class StepLog:
    """The statistics of the last steps, and the totals since the start.

    Attributes:
        steps: the last ones; safe to read from other threads.
        totals: see :class:`engine.outputs.EngineStatus`; of the stepping thread.
    """

    def __init__(self) -> None:
        self.steps: Ring[StepStats] = Ring(STEPS_KEPT)
        self.totals = dict.fromkeys(_TOTALS, 0)
        self._next_index = 0

    def count_request(self, prompt_tokens: int) -> None:
        """A request was queued."""
        self.totals["requests"] += 1
        self.totals["prompt_tokens"] += prompt_tokens

    def record(
        self, clock: StepClock, counters: StepCounters, schedule: Schedule, scheduler: Scheduler, execution: str
    ) -> None:
        """Keep the statistics of a step that is done.

        Args:
            execution: how its forward pass ran.
        """
        pool = scheduler.pool
        self.steps.append(
            StepStats(
                index=self._next_index,
                time_unix_s=time.time(),
                duration_ms=(clock.done - clock.began) * 1e3,
                schedule_ms=(clock.scheduled - clock.began) * 1e3,
                model_ms=(clock.computed - clock.scheduled) * 1e3,
                sample_ms=(clock.done - clock.computed) * 1e3,
                num_running=len(scheduler.running),
                num_waiting=scheduler.num_waiting,
                prefill_tokens=counters.prefill_tokens,
                decode_tokens=counters.decode_tokens,
                draft_tokens=counters.draft_tokens,
                accepted_tokens=counters.accepted_tokens,
                output_tokens=counters.output_tokens,
                preempted=schedule.preempted,
                kv_blocks_used=pool.num_blocks - pool.num_free,
                kv_blocks_cached=pool.num_cached,
                prefix_hit_tokens=schedule.prefix_hit_tokens,
                prefix_query_tokens=schedule.prefix_query_tokens,
                execution=execution,
            )
        )
        self._next_index += 1
        self._add(counters, schedule)

    def _add(self, counters: StepCounters, schedule: Schedule) -> None:
        totals = self.totals
        totals["preemptions"] += schedule.preempted
        totals["prefix_hit_tokens"] += schedule.prefix_hit_tokens
        totals["prefix_query_tokens"] += schedule.prefix_query_tokens
        totals["output_tokens"] += counters.output_tokens
        totals["drafts"] += counters.drafts
        totals["draft_tokens"] += counters.draft_tokens
        totals["accepted_tokens"] += counters.accepted_tokens
