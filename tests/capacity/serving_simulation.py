"""A small discrete-event simulation of continuous batching, to check the planner's closed formulas against.

It knows the duration of each single step (the planner's step model) and nothing of queueing theory: requests arrive at
random, wait in order for a slot, are prefilled in chunks under a token budget beside the decoding ones, and decode to
their end.
"""

from __future__ import annotations

import dataclasses
import random
from collections import deque
from collections.abc import Callable

import numpy as np

from engine.capacity.speed.serving import Serving


@dataclasses.dataclass
class Request:
    """One request; times in seconds."""

    arrival: float
    prompt: int
    output: int
    prefilled: int = 0
    produced: int = 0
    first: float = 0.0
    end: float = 0.0


@dataclasses.dataclass(frozen=True)
class Observed:
    """What was seen after warming up: arrays of seconds, one value a request, and tokens a second."""

    ttft: np.ndarray
    tpot: np.ndarray
    e2e: np.ndarray
    output_tokens_s: float

    def percentile(self, name: str, share: float) -> float:
        """Of ``"ttft"``, ``"tpot"`` or ``"e2e"``."""
        return float(np.percentile(getattr(self, name), 100 * share))


def simulate(serving: Serving, rate: float, count: int, seed: int = 0, warmup: float = 0.2) -> Observed:
    """Serve ``count`` requests that arrive at ``rate`` a second (gamma-distributed gaps)."""
    work, source = serving.workload, random.Random(seed)
    shape = 1.0 / work.burstiness
    clock, waiting = 0.0, deque()
    for _ in range(count):
        clock += source.gammavariate(shape, 1.0 / (shape * rate))
        prompt = _length(source, work.prefill_tokens, work.input_cv)
        waiting.append(Request(clock, prompt, _length(source, work.output_tokens, work.output_cv)))
    return _run(serving, waiting, int(warmup * count), None)


def simulate_users(serving: Serving, users: int, count: int) -> Observed:
    """``users`` users, each sending its next request when the last one has ended."""
    work = serving.workload
    fresh = Request(0.0, int(work.prefill_tokens), int(work.output_tokens))
    waiting = deque(dataclasses.replace(fresh, arrival=1e-3 * index) for index in range(users))

    def again(now: float) -> Request:
        return dataclasses.replace(fresh, arrival=now)

    return _run(serving, waiting, int(0.3 * count), again, count)


def _length(source: random.Random, mean: float, cv: float) -> int:
    if cv == 0:
        return max(1, round(mean))
    return max(1, round(source.gammavariate(1 / cv**2, mean * cv**2)))


def _run(
    serving: Serving,
    arrivals: deque[Request],
    skip: int,
    again: Callable[[float], Request] | None,
    count: int | None = None,
) -> Observed:
    budget = serving.request.token_budget or 10**9
    wanted = count or len(arrivals)
    active: list[Request] = []
    done: list[Request] = []
    now = 0.0
    while len(done) < wanted:
        if not active and arrivals and arrivals[0].arrival > now:
            now = arrivals[0].arrival
        while arrivals and arrivals[0].arrival <= now and len(active) < serving.slots:
            active.append(arrivals.popleft())
        decoding = [request for request in active if request.prefilled == request.prompt]
        room, taken = budget - len(decoding), []
        for request in active:
            if room <= 0:
                break
            if request.prefilled < request.prompt:
                chunk = min(room, request.prompt - request.prefilled)
                taken.append((request, chunk))
                room -= chunk
        now += serving.mixed_step_s(float(len(decoding)), float(sum(chunk for _, chunk in taken)))
        for request, chunk in taken:
            request.prefilled += chunk
            if request.prefilled == request.prompt:
                request.produced, request.first = 1, now
        for request in decoding:
            request.produced += 1
        for request in [request for request in active if request.produced >= request.output]:
            request.end = now
            active.remove(request)
            done.append(request)
            if again is not None:
                arrivals.append(again(now))
    return _observed(done[skip:])


def _observed(done: list[Request]) -> Observed:
    span = max(request.end for request in done) - min(request.end for request in done)
    several = [request for request in done if request.output > 1]
    return Observed(
        ttft=np.array([request.first - request.arrival for request in done]),
        tpot=np.array([(request.end - request.first) / (request.output - 1) for request in several]),
        e2e=np.array([request.end - request.arrival for request in done]),
        output_tokens_s=sum(request.output for request in done) / span,
    )
