"""Durations that requests see while the number of running sequences stays the same."""

from __future__ import annotations

import dataclasses
import math

from engine.capacity.speed.queueing import Moments, mg1_wait
from engine.capacity.speed.workload import PlannedWorkload


@dataclasses.dataclass(frozen=True, slots=True)
class SteadyState:
    """One replica on which as many requests end as arrive. Durations in seconds.

    Attributes:
        workload: what is served; pp: pipeline stages; tokens_a_step: that a step yields each sequence.
        running: sequences that decode; rate: requests a second.
        base: duration of a step without prompt tokens; slope: what each prompt token adds; room: prompt tokens that a
            step can take.
        step: mean duration of a step.
    """

    workload: PlannedWorkload
    pp: int
    tokens_a_step: float
    running: float
    rate: float
    base: float
    slope: float
    room: float
    step: float

    @property
    def load(self) -> float:
        """Share of the time that is spent on prompts."""
        return self.rate * self.workload.prefill_tokens * self.slope / self.pp

    @property
    def prompt_chunks(self) -> float:
        """Steps that a prompt takes."""
        return max(1.0, math.ceil(self.workload.prefill_tokens / self.room - 1e-9))

    @property
    def step_variance(self) -> float:
        """Variance of the duration of steps: prompts come or do not come."""
        work, below = self.workload, min(self.load, 0.98)
        prompt, prompt2 = work.prefill_tokens, _second_moment(work.prefill_tokens, work.input_cv)
        a_request = self.slope**2 * (prompt2 - prompt**2 + work.burstiness * prompt**2)
        return self.rate * self.step * a_request / (1.0 - below**2)

    @property
    def step_third_moment(self) -> float:
        """Third central moment of the same."""
        work, below = self.workload, min(self.load, 0.98)
        prompt3 = work.prefill_tokens**3 * (1.0 + work.input_cv**2) * (1.0 + 2.0 * work.input_cv**2)  # of a gamma
        return self.rate * self.step * self.slope**3 * prompt3 * work.burstiness / (1.0 - below**3)

    def ttft(self) -> tuple[Moments, float]:
        """Time to first token without the wait for a slot, and the load of the token budget.

        An arrival waits for the rest of the running step, then for the one that takes its prompt, together with the
        prompts that arrived during the same step; where the budget is short, for prompts before it.
        """
        work, ca2 = self.workload, self.workload.burstiness
        prompt, prompt2 = work.prefill_tokens, _second_moment(work.prefill_tokens, work.input_cv)
        chunks = self.prompt_chunks
        # The step that an arrival meets is longer than the mean: its length is weighted by itself.
        base, slope, room, rate, mean = self.base, self.slope, self.room, self.rate, self.step
        variance, third = self.step_variance, self.step_third_moment
        most = max(base + slope * room, mean)
        met = min((mean**2 + variance) / mean, most)
        met2 = max(min((third + 3.0 * variance * mean + mean**3) / mean, most * met), met**2)
        service, service2 = (
            prompt * (base / room + slope) / self.pp,
            prompt2 * ((base / room + slope) / self.pp) ** 2,
        )
        queued = mg1_wait(rate, service, service2, ca2)
        unbounded = mg1_wait(rate, prompt * slope, prompt2 * slope**2, ca2)
        extra = max(0.0, queued - unbounded) if math.isfinite(queued) else math.inf
        others = 2.0 * _arrivals_near(rate, met / 2.0, ca2)
        share = min(slope * prompt * others / met, 2.0) if met else 0.0
        average = (0.5 + share) * met + chunks * base + slope * prompt + extra
        spread = (1 / 3 + share + share**2) * met2 - ((0.5 + share) * met) ** 2
        spread += slope**2 * others * (prompt2 - prompt**2 + ca2 * prompt**2)
        return Moments(average, spread + slope**2 * (prompt2 - prompt**2) + extra**2, base), rate * service

    def tpot(self, slow_variance: float) -> Moments:
        """Time per output token; ``slow_variance``: of the mean step that a request meets over its lifetime."""
        work, per_token = self.workload, self.step / self.tokens_a_step
        steps = max(work.output_tokens / self.tokens_a_step, 1.0)
        variance = (self.step_variance / steps + slow_variance) / self.tokens_a_step**2
        if work.draft_length:
            # The number of accepted drafts varies: a round yields 1 … k + 1 tokens.
            variance += (per_token * work.draft_length / self.tokens_a_step) ** 2 / 4.0 / steps
        return Moments(per_token, variance)


def _second_moment(mean: float, cv: float) -> float:
    return mean**2 * (1.0 + cv**2)


def _arrivals_near(rate: float, seconds: float, burstiness: float) -> float:
    """Other arrivals within ``seconds`` after one, on average: of Poisson arrivals rate · seconds, in bursts more
    (renewal function of gamma-distributed gaps, for short times and in its limit for long ones)."""
    plain = rate * seconds
    if burstiness <= 1.0 or plain <= 0.0:
        return plain
    shape = 1.0 / burstiness
    soon = math.pow(shape * plain, shape) / math.gamma(1.0 + shape)
    return max(plain, min(soon, plain + (burstiness - 1.0) / 2.0))


def end_to_end(work: PlannedWorkload, ttft: Moments, tpot: Moments) -> Moments:
    """From arrival to the last token."""
    rest = max(work.output_tokens - 1.0, 0.0)
    spread = (work.output_tokens * work.output_cv) ** 2
    variance = rest**2 * tpot.variance + spread * (tpot.mean**2 + tpot.variance)
    return ttft.plus(Moments(rest * tpot.mean, variance))
