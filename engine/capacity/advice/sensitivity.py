"""Which assumption moves the answer most: each is varied alone, and the largest load is planned again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from engine.capacity.advice.deployment import Deployment, slots_of
from engine.capacity.memory.request import PlanRequest, complete
from engine.capacity.speed.serving import serving
from engine.capacity.speed.workload import PlannedWorkload
from engine.errors import HeadroomError

_STEP = 0.2


@dataclasses.dataclass(frozen=True, slots=True)
class Swing:
    """One assumption: the largest rate (requests a second within the objectives) when it is lower, and higher."""

    name: str
    low_label: str
    high_label: str
    low: float
    high: float

    @property
    def width(self) -> float:
        """By how much the answer moves between the two."""
        return abs(self.high - self.low)


def sensitivity(answer: Deployment) -> tuple[Swing, ...]:
    """Swings of the largest load within the objectives, widest first. () where there is none to vary.

    >>> from engine.capacity import PlanRequest, find_gpu, model_spec
    >>> from engine.capacity.advice.deployment import deploy
    >>> wanted = PlanRequest(model_spec("Llama-3.1-8B"), find_gpu("H100 SXM 80GB"), context=2048)
    >>> swings = sensitivity(deploy(wanted, PlannedWorkload(1024, 256)))
    >>> swings[0].name in ("prompt length", "arithmetic efficiency", "output length")
    True
    """
    if answer.best is None:
        return ()
    request, work = answer.plan.request.as_request(), answer.workload
    swings = []
    for name, low_label, low, high_label, high in _variations(request, work):
        rates = [_largest_rate(answer, *changed) for changed in (low, high)]
        if rates[0] != rates[1]:
            swings.append(Swing(name, low_label, high_label, *rates))
    return tuple(sorted(swings, key=lambda swing: -swing.width))


def _largest_rate(answer: Deployment, request: PlanRequest, work: PlannedWorkload) -> float:
    try:
        full = complete(request)
        slots = slots_of(full, work)
    except HeadroomError:
        return 0.0
    model = serving(full, work, slots) if slots else None
    best = model.largest_load(answer.objectives) if model else None
    return best.rate if best else 0.0


_Changed = tuple[PlanRequest, PlannedWorkload]


def _variations(request: PlanRequest, work: PlannedWorkload) -> Iterator[tuple[str, str, _Changed, str, _Changed]]:
    def of_gpu(**changes: Any) -> _Changed:
        return dataclasses.replace(request, gpu=dataclasses.replace(request.gpu, **changes)), work

    def of_work(**changes: Any) -> _Changed:
        changed = dataclasses.replace(work, **changes)
        needed = int(changed.input_tokens + changed.output_tokens) + 1
        longest = min(max(request.context or 1, needed), request.spec.max_position)
        return dataclasses.replace(request, context=longest), changed

    def both(name: str, value: float, change: Callable[[float], _Changed], most: float, shown: str) -> Any:
        low, high = value * (1 - _STEP), min(value * (1 + _STEP), most)
        return name, shown.format(low), change(low), shown.format(high), change(high)

    gpu = request.gpu
    huge = 1e12
    yield both("prompt length", work.input_tokens, lambda value: of_work(input_tokens=value), huge, "{:,.0f} tokens")
    yield both("output length", work.output_tokens, lambda value: of_work(output_tokens=value), huge, "{:,.0f} tokens")
    yield both(
        "memory bandwidth reached", gpu.bandwidth_efficiency, lambda v: of_gpu(bandwidth_efficiency=v), 1.0, "{:.0%}"
    )
    yield both("arithmetic efficiency", gpu.flops_efficiency, lambda v: of_gpu(flops_efficiency=v), 1.0, "{:.0%}")
    yield both("usable memory", gpu.usable_gib, lambda value: of_gpu(usable_gib=value), huge, "{:,.1f} GiB")
    if request.tp > 1 and gpu.link_gb_s:
        yield both("link between GPUs", gpu.link_gb_s, lambda value: of_gpu(link_gb_s=value), huge, "{:,.0f} GB/s")
    if work.draft_length:
        yield both("acceptance of drafts", work.acceptance, lambda value: of_work(acceptance=value), 1.0, "{:.0%}")
    hit = work.prefix_hit_rate
    low, high = max(0.0, hit - _STEP), min(0.95, hit + _STEP)
    yield (
        "prefix cache hits",
        f"{low:.0%}",
        of_work(prefix_hit_rate=low),
        f"{high:.0%}",
        of_work(prefix_hit_rate=high),
    )
    yield "burstiness", "1", of_work(burstiness=1.0), "4", of_work(burstiness=4.0)
