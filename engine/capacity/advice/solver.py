"""From a goal to a deployment: GPU type, number, parallelism and precision of least cost that keeps the objectives."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator

from engine.capacity.advice.deployment import slots_of
from engine.capacity.advice.money import Cost, cost_of
from engine.capacity.hardware import Gpu
from engine.capacity.memory.parallel import MAX_GPUS, possible_tp
from engine.capacity.memory.request import CompleteRequest, PlanRequest, complete
from engine.capacity.speed.operating_point import OperatingPoint
from engine.capacity.speed.roofline import has_speeds
from engine.capacity.speed.serving import serving
from engine.capacity.speed.workload import (
    MAX_RATE,
    Objectives,
    PlannedWorkload,
    check_number,
    check_objectives,
    check_workload,
)
from engine.errors import HeadroomError

#: Tensor-parallel GPUs are in one machine.
_MOST_TP = 8


@dataclasses.dataclass(frozen=True, slots=True)
class Goal:
    """What is wanted, and what may be chosen to reach it.

    Attributes:
        request: model, context and engine; its GPU, parallelism and precisions are replaced.
        workload, objectives, rate: the load.
        gpus: GPU types that may be used.
        weights, kv_dtypes: formats that may be used, the ones to prefer first.
        prices: ``(GPU name, US dollars an hour)`` in place of the catalog's figures.
    """

    request: PlanRequest
    workload: PlannedWorkload
    objectives: Objectives
    rate: float
    gpus: tuple[Gpu, ...]
    weights: tuple[str, ...] = ("auto", "fp8")
    kv_dtypes: tuple[str, ...] = ("auto", "fp8")
    prices: tuple[tuple[str, float], ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Solution:
    """A deployment that reaches the goal: ``request.dp`` replicas of ``request.tp`` GPUs."""

    request: CompleteRequest
    point: OperatingPoint
    largest_rate: float
    cost: Cost

    @property
    def gpus(self) -> int:
        """All GPUs."""
        return self.request.gpus


def solve(goal: Goal) -> tuple[Solution, ...]:
    """For each GPU type the deployment of fewest GPUs, cheapest first; those without a price last. () if there is none.

    The search is exhaustive over tensor parallelism (one machine), replicas and the allowed formats.

    >>> from engine.capacity.model.catalog import model_spec
    >>> from engine.capacity.hardware import find_gpu
    >>> h100 = find_gpu("H100 SXM 80GB")
    >>> wanted = Goal(PlanRequest(model_spec("Llama-3.1-8B"), h100, context=2048), PlannedWorkload(1024, 256),
    ...               Objectives(ttft_s=0.5, tpot_s=0.05), 30.0, (h100,), weights=("auto",), kv_dtypes=("auto",))
    >>> [(answer.gpus, answer.request.tp) for answer in solve(wanted)]
    [(2, 1)]

    Raises:
        ConfigError: if the goal itself is not possible.
    """
    check_workload(goal.workload)
    check_objectives(goal.objectives)
    check_number("rate", goal.rate, 1e-6, MAX_RATE, "Give a number of requests a second above 0.")
    found = [best for gpu in goal.gpus if (best := _best(goal, gpu)) is not None]
    return tuple(sorted(found, key=lambda item: (item.cost.per_hour is None, item.cost.per_hour or 0.0, item.gpus)))


def reaches(request: CompleteRequest, goal: Goal) -> OperatingPoint | None:
    """The operating point of a deployment under the goal's load if it keeps the objectives, else None."""
    slots = slots_of(request, goal.workload)
    model = serving(request, goal.workload, slots) if slots else None
    point = model.at_rate(goal.rate) if model else None
    return point if point is not None and point.meets(goal.objectives) else None


def candidates(goal: Goal, gpu: Gpu) -> Iterator[CompleteRequest]:
    """Every single replica that could be used, preferred formats first."""
    sizes = [tp for tp in possible_tp(goal.request.spec, _MOST_TP) if tp & (tp - 1) == 0]
    for weights in goal.weights:
        for kv_dtype in goal.kv_dtypes:
            for tp in sizes:
                changes = {"gpu": gpu, "tp": tp, "pp": 1, "ep": 1, "dp": 1, "weights": weights, "kv_dtype": kv_dtype}
                try:
                    yield complete(dataclasses.replace(goal.request, concurrency=1, **changes))  # type: ignore[arg-type]
                except HeadroomError:
                    continue


def _best(goal: Goal, gpu: Gpu) -> Solution | None:
    """The fewest GPUs of one type; of equal numbers the first candidate."""
    best: Solution | None = None
    if not has_speeds(gpu):
        return None
    for replica in candidates(goal, gpu):
        limit = MAX_GPUS if best is None else best.gpus - 1
        found = _replicated(goal, replica, limit // replica.tp)
        if found is not None:
            best = found
    return best


def _replicated(goal: Goal, replica: CompleteRequest, most: int) -> Solution | None:
    """The fewest replicas, at most ``most``, that reach the goal."""
    slots = slots_of(replica, goal.workload)
    model = serving(replica, goal.workload, slots) if slots and most >= 1 else None
    alone = model.largest_load(goal.objectives) if model else None
    if alone is None:
        return None
    copies = max(1, math.floor(goal.rate / alone.rate))
    while copies <= most:
        request = dataclasses.replace(replica, dp=copies)
        point = reaches(request, goal)
        if point is not None:
            return _fewer(goal, Solution(request, point, alone.rate * copies, _cost(goal, request, point)))
        copies += 1
        if copies > math.ceil(goal.rate / alone.rate * 1.1) + 2:
            return None
    return None


def _fewer(goal: Goal, found: Solution) -> Solution:
    """The search begins near the answer; go down while fewer replicas do."""
    while found.request.dp > 1:
        request = dataclasses.replace(found.request, dp=found.request.dp - 1)
        point = reaches(request, goal)
        if point is None:
            return found
        found = dataclasses.replace(found, request=request, point=point, cost=_cost(goal, request, point))
    return found


def _cost(goal: Goal, request: CompleteRequest, point: OperatingPoint) -> Cost:
    price = dict(goal.prices).get(request.gpu.name, request.gpu.price_usd_hour)
    return cost_of(request.gpus, price, request.gpu.tdp_w, point.output_tokens_s, point.total_tokens_s)


solve_cached = functools.lru_cache(maxsize=64)(solve)
