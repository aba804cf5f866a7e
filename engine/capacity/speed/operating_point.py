"""What a deployment does at one load."""

from __future__ import annotations

import dataclasses

from engine.capacity.speed.workload import Objectives


@dataclasses.dataclass(frozen=True, slots=True)
class OperatingPoint:
    """A deployment at one load. Durations in seconds, rates a second; of all replicas together where they add up.

    Attributes:
        running: sequences that decode at once, mean, of one replica.
        in_system: with those that wait or are prefilled.
        rate: requests a second.
        step_s: mean duration of a step; decode_step_s: of one without prompt tokens.
        tpot_s, tpot_p95_s: time per output token, mean and 95th percentile over requests.
        ttft_s, ttft_p50_s, ttft_p95_s, ttft_p99_s: time to first token, queueing included.
        e2e_s, e2e_p50_s, e2e_p95_s, e2e_p99_s: from arrival to the last token.
        output_tokens_s, total_tokens_s: throughput without and with prompt tokens.
        prefill_share: of the time, spent on prompts.
        slot_load: share of the slots that are busy, budget_load: of the token budget.
        stable: the queue does not grow for ever.
    """

    running: float
    in_system: float
    rate: float
    step_s: float
    decode_step_s: float
    tpot_s: float
    tpot_p95_s: float
    ttft_s: float
    ttft_p50_s: float
    ttft_p95_s: float
    ttft_p99_s: float
    e2e_s: float
    e2e_p50_s: float
    e2e_p95_s: float
    e2e_p99_s: float
    output_tokens_s: float
    total_tokens_s: float
    prefill_share: float
    slot_load: float
    budget_load: float
    stable: bool

    def meets(self, objectives: Objectives) -> bool:
        """True if the 95th percentiles keep the objectives and the load is stable."""
        ttft = objectives.ttft_s is None or self.ttft_p95_s <= objectives.ttft_s
        tpot = objectives.tpot_s is None or self.tpot_p95_s <= objectives.tpot_s
        return self.stable and ttft and tpot
