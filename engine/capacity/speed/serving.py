"""A deployment under load: TTFT, TPOT, throughput and their percentiles against concurrency and arrival rate.

Continuous batching in steady state. n sequences decode; every step also takes prompt tokens, so that

    S(n) = a(n) + b · p      duration of a step: decoding n sequences, and p prompt tokens
    λ    = n · τ / (O · S)   each step yields τ tokens a sequence (1, or what speculation yields), O a request
    p    = λ · I · S         prompt tokens that arrive during a step of I a request

With a token budget, a step takes no more than budget - n prompt tokens: a longer prompt takes several steps.
"""

from __future__ import annotations

import dataclasses
import functools
import math

from engine.capacity.memory.request import CompleteRequest, complete
from engine.capacity.speed.queueing import Moments, mg1_wait, slot_wait
from engine.capacity.speed.roofline import Batch, Operator, StepModel, has_speeds, step_model
from engine.capacity.speed.speculation import expected_tokens
from engine.capacity.speed.workload import Objectives, PlannedWorkload

_HALVINGS = 40
#: How far a request's mean step duration follows the fluctuation of the number of running requests: a time average
#: over its own lifetime, where that number forgets its past within one lifetime.
_FLUCTUATION = 0.7


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


class Serving:
    """One deployment with one workload.

    Args:
        request: the deployment.
        workload: what it serves.
        slots: sequences of this workload that a replica can run at once (memory, largest batch); at least 1.
    """

    def __init__(self, request: CompleteRequest, workload: PlannedWorkload, slots: int) -> None:
        self.request, self.workload, self.slots = request, workload, max(1, slots)
        self.model: StepModel = step_model(request)
        self.tokens_a_step = (
            expected_tokens(workload.acceptance, workload.draft_length) if workload.draft_length else 1.0
        )
        self._draft = _draft_model(request, workload)

    # -- steps -------------------------------------------------------------------------------------------------

    def decode_step_s(self, running: float) -> float:
        """A step that decodes ``running`` sequences of this workload and nothing else, drafting included."""
        work = self.workload
        each = running / self.request.pp
        plain = Batch(each, work.mean_context, tokens_each=work.draft_length + 1.0)
        return self.model.seconds(plain) + work.draft_length * self._draft_step_s(each)

    def mixed_step_s(self, running: float, prefill: float) -> float:
        """A step that also takes ``prefill`` prompt tokens."""
        if prefill <= 0:
            return self.decode_step_s(running)
        work, each = self.workload, running / self.request.pp
        past = work.cached_tokens + max(0.0, work.prefill_tokens - prefill) / 2.0
        batch = Batch(each, work.mean_context, prefill, past, tokens_each=work.draft_length + 1.0)
        return self.model.seconds(batch) + work.draft_length * self._draft_step_s(each)

    def operators(self, running: float, prefill: float = 0.0) -> tuple[Operator, ...]:
        """The operators of such a step."""
        work = self.workload
        batch = Batch(
            running / self.request.pp, work.mean_context, prefill, work.cached_tokens, work.draft_length + 1.0
        )
        return self.model.operators(batch)

    def _draft_step_s(self, running: float) -> float:
        work = self.workload
        if work.draft_cost is not None:
            return work.draft_cost * self.model.seconds(Batch(running, work.mean_context))
        return self._draft.seconds(Batch(running, work.mean_context)) if self._draft else 0.0

    def room_for_prompts(self, running: float) -> float:
        """Prompt tokens that a step can take besides ``running`` sequences."""
        budget = self.request.token_budget or 2.0**31
        return max(1.0, budget - running * (self.workload.draft_length + 1.0))

    def _line(self, running: float) -> tuple[float, float, float]:
        """(a, b, room): a step takes a + b · prompt tokens, of which it can take ``room``."""
        work, room = self.workload, self.room_for_prompts(running)
        # Prompts of a step that takes any: the first tokens cost little next to the weights that are read anyway, so
        # the slope must be taken at the size that such steps really have.
        prompts = running * self.tokens_a_step / work.output_tokens / self.request.pp
        together = prompts / -math.expm1(-prompts) if prompts > 1e-9 else 1.0
        chunk = min(work.prefill_tokens * together, room)
        base = self.decode_step_s(running)
        return base, max(self.mixed_step_s(running, chunk) - base, 0.0) / chunk, room

    def step_s(self, running: float, closed: bool = False) -> float:
        """Mean duration, seen by a request, of a step in steady state with ``running`` sequences decoding.

        Where arrivals come from outside, a request sees itself besides the average number of others.
        """
        if self.request.profile.batch_is_concurrency:
            return self.decode_step_s(running)
        base, slope, _ = self._line(running if closed else min(running + 1.0, max(running, float(self.slots))))
        return base + slope * self._prompts_a_step(running)

    def _prompts_a_step(self, running: float) -> float:
        work = self.workload
        return running * self.tokens_a_step * work.prefill_tokens / work.output_tokens / self.request.pp

    def rate_at(self, running: float, closed: bool = False) -> float:
        """Requests a second of one replica in steady state with ``running`` sequences decoding."""
        work = self.workload
        if self.request.profile.batch_is_concurrency:
            return running / self._static_cycle_s(running)
        return running * self.tokens_a_step / (work.output_tokens * self.step_s(running, closed))

    def most_running(self) -> float:
        """Sequences that can decode at once in steady state: all slots, or where the token budget is used up."""
        work = self.workload
        if self.request.profile.batch_is_concurrency or self.request.token_budget is None:
            return float(self.slots)
        prompts = self.tokens_a_step * work.prefill_tokens / work.output_tokens / self.request.pp
        each = (work.draft_length + 1.0) / self.request.pp
        return min(float(self.slots), max(0.999 * self.request.token_budget / (each + prompts), 0.01))

    # -- operating points --------------------------------------------------------------------------------------

    def at_running(self, running: float, closed: bool = False) -> OperatingPoint:
        """The steady state in which ``running`` sequences decode on each replica.

        Args:
            closed: a fixed number of users, each with one request at a time; else arrivals come from outside.
        """
        if self.request.profile.batch_is_concurrency:
            return self._static(running)
        work = self.workload
        base, slope, room = self._line(running)
        rate = self.rate_at(running, closed)
        load = rate * work.prefill_tokens * slope / self.request.pp
        step = self.step_s(running, closed)
        steps = _step_moments(work, rate, slope, step, load)
        ttft, budget_load = self._ttft(base, slope, room, rate, steps, load)
        growth, fluctuation, follows = (0.0, 0.0, 0.0) if closed else self._fluctuation(running, step)
        if not closed:
            felt = (0.5 + min(load, 1.0) + max(1.0, math.ceil(work.prefill_tokens / room - 1e-9))) * growth
            ttft = Moments(ttft.mean, ttft.variance + felt**2 * fluctuation, ttft.least)
            ttft = ttft.plus(self._slot_wait(running, step))
        tpot = self._tpot(step, steps[1], follows * growth**2 * fluctuation)
        e2e = _e2e(work, ttft, tpot)
        return self._point(running, rate, base, step, ttft, tpot, e2e, budget_load)

    def at_concurrency(self, users: float) -> OperatingPoint:
        """``users`` users in all, each with one request at a time: Little's law splits them into those that decode and
        those whose prompt is being computed."""
        each = min(users / self.request.dp, float(self.slots))
        most = min(each, self.most_running())
        low, high = 0.0, most
        for _ in range(_HALVINGS):
            middle = (low + high) / 2.0
            fits = middle > 0 and self.at_running(middle, closed=True).in_system > each
            low, high = (low, middle) if fits else (middle, high)
            if high - low < 1e-3 * high:
                break
        return self.at_running(max(high if low == 0.0 else low, 1e-6), closed=True)

    def at_rate(self, rate: float) -> OperatingPoint:
        """Requests arriving at ``rate`` a second in all; the most that can be served where that is too much (``stable``
        is then False)."""
        each = rate / self.request.dp
        most = self.most_running()
        if each >= self.rate_at(most) * 0.9999:
            return dataclasses.replace(
                self.at_running(most), rate=rate, stable=False, **dict.fromkeys(_QUEUED, math.inf)
            )
        low, high = 0.0, most
        for _ in range(_HALVINGS):
            middle = (low + high) / 2.0
            low, high = (low, middle) if self.rate_at(middle) > each else (middle, high)
            if high - low < 1e-4 * high:
                break
        return self.at_running(max((low + high) / 2.0, 1e-6))

    def capacity(self) -> float:
        """Requests a second of all replicas that can be served at all, whatever the latency."""
        return self.request.dp * self.rate_at(self.most_running())

    def largest_load(self, objectives: Objectives) -> OperatingPoint | None:
        """The point of the highest rate that keeps the objectives; None if not even a single request does."""
        most = self.most_running()
        # At the very edge the wait has no bound, so the search ends a little before it.
        low, high = min(0.01, most / 2), 0.98 * most
        if self.at_running(high).meets(objectives):
            return self.at_running(high)
        best = self.at_running(low)
        if not best.meets(objectives):
            return None
        for _ in range(18):
            middle = math.sqrt(low * high)
            point = self.at_running(middle)
            if point.meets(objectives):
                low, best = middle, point
            else:
                high = middle
        return best

    def sweep(self, points: int = 24) -> tuple[OperatingPoint, ...]:
        """Points of growing concurrency of users, one to all slots of all replicas, evenly in the logarithm."""
        most = self.slots * self.request.dp
        counts = sorted({max(1, round(most ** (index / (points - 1)))) for index in range(points)})
        return tuple(self.at_concurrency(float(count)) for count in counts)

    # -- parts -------------------------------------------------------------------------------------------------

    def _ttft(
        self, base: float, slope: float, room: float, rate: float, steps: tuple[float, float, float], load: float
    ) -> tuple[Moments, float]:
        """Time to first token without the wait for a slot, and the load of the token budget.

        An arrival waits for the rest of the running step, then for the one that takes its prompt, together with the
        prompts that arrived during the same step; where the budget is short, for prompts before it.
        """
        work, ca2 = self.workload, self.workload.burstiness
        prompt, prompt2 = work.prefill_tokens, _second_moment(work.prefill_tokens, work.input_cv)
        chunks = max(1.0, math.ceil(prompt / room - 1e-9))
        # The step that an arrival meets is longer than the mean: its length is weighted by itself.
        mean, variance, third = steps
        most = max(base + slope * room, mean)
        met = min((mean**2 + variance) / mean, most)
        met2 = max(min((third + 3.0 * variance * mean + mean**3) / mean, most * met), met**2)
        service, service2 = (
            prompt * (base / room + slope) / self.request.pp,
            prompt2 * ((base / room + slope) / self.request.pp) ** 2,
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

    def _fluctuation(self, running: float, step: float) -> tuple[float, float, float]:
        """How much longer steps get with one more running sequence, the variance of their number, and how far a
        request's average follows it.

        More sequences make steps longer, so that sequences stay longer: with g = d ln S / d ln n the variance of their
        number is not n, as with independent ones, but n / (1 - g).
        """
        more = self.step_s(running * 1.05 + 1e-9)
        growth = max(more - step, 0.0) / (running * 0.05 + 1e-9)
        gain = min(growth * running / step, 0.95) if step else 0.0
        follows = _FLUCTUATION + (1.0 - _FLUCTUATION) * gain
        return growth, running * max(self.workload.burstiness, 0.1) / (1.0 - gain), follows

    def _slot_wait(self, running: float, step: float) -> Moments:
        work = self.workload
        held = work.output_tokens / self.tokens_a_step * step
        return slot_wait(self.slots, running, held, work.output_cv**2, work.burstiness)

    def _tpot(self, step: float, step_variance: float, slow_variance: float) -> Moments:
        work, per_token = self.workload, step / self.tokens_a_step
        steps = max(work.output_tokens / self.tokens_a_step, 1.0)
        variance = (step_variance / steps + slow_variance) / self.tokens_a_step**2
        if work.draft_length:
            # The number of accepted drafts varies: a round yields 1 … k + 1 tokens.
            variance += (per_token * work.draft_length / self.tokens_a_step) ** 2 / 4.0 / steps
        return Moments(per_token, variance)

    def _static_cycle_s(self, batch: float) -> float:
        """A static batch from its first prompt token to the last token of its longest answer."""
        work = self.workload
        longest = work.output_tokens * (1.0 + work.output_cv * math.sqrt(2.0 * math.log(max(batch, 1.0))))
        return self._static_prefill_s(batch) + (longest - 1.0) * self.decode_step_s(batch)

    def _static_prefill_s(self, batch: float) -> float:
        prompt = self.workload.prefill_tokens
        one = self.model.seconds(Batch(prefill=prompt, past=self.workload.cached_tokens))
        return one + (batch - 1.0) * max(one - self.decode_step_s(1.0), 0.0) if batch > 1 else one

    def _static(self, batch: float) -> OperatingPoint:
        cycle, prefill, step = self._static_cycle_s(batch), self._static_prefill_s(batch), self.decode_step_s(batch)
        ttft, tpot = Moments(prefill, 0.0), Moments(step, 0.0)
        point = self._point(batch, batch / cycle, step, step, ttft, tpot, Moments(cycle, 0.0), 0.0)
        return dataclasses.replace(point, prefill_share=prefill / cycle, in_system=batch * self.request.dp)

    def _point(
        self,
        running: float,
        rate: float,
        base: float,
        step: float,
        ttft: Moments,
        tpot: Moments,
        e2e: Moments,
        budget_load: float,
    ) -> OperatingPoint:
        work, dp = self.workload, self.request.dp
        p50, p95, p99 = (e2e.percentile(share) for share in (0.5, 0.95, 0.99))
        return OperatingPoint(
            running=running,
            in_system=running + rate * ttft.mean,
            rate=rate * dp,
            step_s=step,
            decode_step_s=base,
            tpot_s=tpot.mean,
            tpot_p95_s=tpot.percentile(0.95),
            ttft_s=ttft.mean,
            ttft_p50_s=ttft.percentile(0.5),
            ttft_p95_s=ttft.percentile(0.95),
            ttft_p99_s=ttft.percentile(0.99),
            e2e_s=e2e.mean,
            e2e_p50_s=p50,
            e2e_p95_s=p95,
            e2e_p99_s=p99,
            output_tokens_s=rate * work.output_tokens * dp,
            total_tokens_s=rate * (work.output_tokens + work.input_tokens) * dp,
            prefill_share=max(0.0, 1.0 - base / step) if step else 0.0,
            slot_load=running / self.slots,
            budget_load=budget_load,
            stable=True,
        )


_QUEUED = (
    "ttft_s",
    "ttft_p50_s",
    "ttft_p95_s",
    "ttft_p99_s",
    "e2e_s",
    "e2e_p50_s",
    "e2e_p95_s",
    "e2e_p99_s",
    "in_system",
)


def _second_moment(mean: float, cv: float) -> float:
    return mean**2 * (1.0 + cv**2)


def _step_moments(
    work: PlannedWorkload, rate: float, slope: float, step: float, load: float
) -> tuple[float, float, float]:
    """Mean, variance and third central moment of the duration of steps: prompts come or do not come."""
    prompt, prompt2 = work.prefill_tokens, _second_moment(work.prefill_tokens, work.input_cv)
    prompt3 = prompt**3 * (1.0 + work.input_cv**2) * (1.0 + 2.0 * work.input_cv**2)  # of a gamma distribution
    below = min(load, 0.98)
    a_request = slope**2 * (prompt2 - prompt**2 + work.burstiness * prompt**2)
    variance = rate * step * a_request / (1.0 - below**2)
    return step, variance, rate * step * slope**3 * prompt3 * work.burstiness / (1.0 - below**3)


def _arrivals_near(rate: float, seconds: float, burstiness: float) -> float:
    """Other arrivals within ``seconds`` after one, on average: of Poisson arrivals rate · seconds, in bursts more
    (renewal function of gamma-distributed gaps, for short times and in its limit for long ones)."""
    plain = rate * seconds
    if burstiness <= 1.0 or plain <= 0.0:
        return plain
    shape = 1.0 / burstiness
    soon = math.pow(shape * plain, shape) / math.gamma(1.0 + shape)
    return max(plain, min(soon, plain + (burstiness - 1.0) / 2.0))


def _e2e(work: PlannedWorkload, ttft: Moments, tpot: Moments) -> Moments:
    rest = max(work.output_tokens - 1.0, 0.0)
    spread = (work.output_tokens * work.output_cv) ** 2
    variance = rest**2 * tpot.variance + spread * (tpot.mean**2 + tpot.variance)
    return ttft.plus(Moments(rest * tpot.mean, variance))


def _draft_model(request: CompleteRequest, workload: PlannedWorkload) -> StepModel | None:
    if request.draft is None or not workload.draft_length:
        return None
    own = dataclasses.replace(
        request.as_request(),
        spec=request.draft,
        draft=None,
        tp=request.draft_tp,
        pp=1,
        ep=1,
        weights=request.dtype.name,
        context=1,
        concurrency=1,
        lora_adapters=0,
        shared_prefix=0,
        max_num_seqs=None,
    )
    return step_model(complete(own))


@functools.lru_cache(maxsize=2048)
def serving(request: CompleteRequest, workload: PlannedWorkload, slots: int) -> Serving | None:
    """The deployment under that workload; None where the speeds of its GPU are not known."""
    return Serving(request, workload, slots) if has_speeds(request.gpu) else None
