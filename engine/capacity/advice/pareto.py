"""Throughput a GPU against speed a user: what each parallelism can reach, and what no other beats."""

from __future__ import annotations

import dataclasses
import functools

from engine.capacity.advice.deployment import slots_of
from engine.capacity.memory.parallel import possible_tp
from engine.capacity.memory.request import PlanRequest, complete
from engine.capacity.speed.serving import serving
from engine.capacity.speed.workload import PlannedWorkload
from engine.errors import HeadroomError

_MOST_TP = 8
_POINTS = 9


@dataclasses.dataclass(frozen=True, slots=True)
class ParetoPoint:
    """One load on one parallelism.

    Attributes:
        tp: tensor-parallel GPUs; users: at once, on one replica.
        tokens_s_per_user: 1 / TPOT; tokens_s_per_gpu: output throughput over GPUs.
        best: no other point is better in both.
    """

    tp: int
    users: float
    tokens_s_per_user: float
    tokens_s_per_gpu: float
    best: bool = False


@functools.lru_cache(maxsize=256)
def pareto(request: PlanRequest, workload: PlannedWorkload) -> tuple[ParetoPoint, ...]:
    """Points of every tensor parallelism of one machine, from one user to all slots. () if the speeds are unknown.

    >>> from engine.capacity import find_gpu, model_spec
    >>> wanted = PlanRequest(model_spec("Llama-3.1-8B"), find_gpu("H100 SXM 80GB"), context=2048)
    >>> points = pareto(wanted, PlannedWorkload(1024, 256))
    >>> fastest = max(points, key=lambda point: point.tokens_s_per_user)  # one user on all GPUs of a machine
    >>> fastest.tp, fastest.users, fastest.best
    (8, 1.0, True)
    """
    points: list[ParetoPoint] = []
    for tp in possible_tp(request.spec, _MOST_TP):
        if tp & (tp - 1) == 0:
            points += _of(dataclasses.replace(request, tp=tp, ep=1, dp=1, concurrency=1), workload)
    return tuple(dataclasses.replace(point, best=_unbeaten(point, points)) for point in points)


def _of(request: PlanRequest, workload: PlannedWorkload) -> list[ParetoPoint]:
    try:
        full = complete(request)
        slots = slots_of(full, workload)
    except HeadroomError:
        return []
    model = serving(full, workload, slots) if slots else None
    if model is None:
        return []
    sweep = model.sweep(_POINTS)
    users = sorted({max(1, round(slots ** (index / (_POINTS - 1)))) for index in range(_POINTS)})
    return [
        ParetoPoint(full.tp, float(count), 1.0 / point.tpot_s, point.output_tokens_s / full.gpus)
        for count, point in zip(users, sweep, strict=True)
    ]


def _unbeaten(point: ParetoPoint, points: list[ParetoPoint]) -> bool:
    return not any(
        other.tokens_s_per_user > point.tokens_s_per_user and other.tokens_s_per_gpu > point.tokens_s_per_gpu
        for other in points
    )
