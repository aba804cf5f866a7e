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
from engine.capacity.speed.operating_point import OperatingPoint
from engine.capacity.speed.queueing import Moments, slot_wait
from engine.capacity.speed.roofline import Batch, Operator, StepModel, has_speeds, step_model
from engine.capacity.speed.speculation import expected_tokens
from engine.capacity.speed.steady_state import SteadyState, end_to_end
from engine.capacity.speed.workload import Objectives, PlannedWorkload

_HALVINGS = 40
#: How far a request's mean step duration follows the fluctuation of the number of running requests: a time average
#: over its own lifetime, where that number forgets its past within one lifetime.
_FLUCTUATION = 0.7


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
        state = self._steady_state(running, closed)
        ttft, budget_load = state.ttft()
        growth, fluctuation, follows = (0.0, 0.0, 0.0) if closed else self._fluctuation(running, state.step)
        if not closed:
            felt = (0.5 + min(state.load, 1.0) + state.prompt_chunks) * growth
            ttft = Moments(ttft.mean, ttft.variance + felt**2 * fluctuation, ttft.least)
            ttft = ttft.plus(self._slot_wait(running, state.step))
        tpot = state.tpot(follows * growth**2 * fluctuation)
        return self._point(state, ttft, tpot, end_to_end(self.workload, ttft, tpot), budget_load)

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

    def _steady_state(self, running: float, closed: bool) -> SteadyState:
        base, slope, room = self._line(running)
        return SteadyState(
            workload=self.workload,
            pp=self.request.pp,
            tokens_a_step=self.tokens_a_step,
            running=running,
            rate=self.rate_at(running, closed),
            base=base,
            slope=slope,
            room=room,
            step=self.step_s(running, closed),
        )

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
        state = SteadyState(
            workload=self.workload,
            pp=self.request.pp,
            tokens_a_step=self.tokens_a_step,
            running=batch,
            rate=batch / cycle,
            base=step,
            slope=0.0,
            room=math.inf,
            step=step,
        )
        point = self._point(state, Moments(prefill, 0.0), Moments(step, 0.0), Moments(cycle, 0.0), 0.0)
        return dataclasses.replace(point, prefill_share=prefill / cycle, in_system=batch * self.request.dp)

    def _point(
        self, state: SteadyState, ttft: Moments, tpot: Moments, e2e: Moments, budget_load: float
    ) -> OperatingPoint:
        running, rate, base, step = state.running, state.rate, state.base, state.step
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
