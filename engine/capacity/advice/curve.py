"""How many requests fit as their context grows: the points of the Plan page's chart."""

from __future__ import annotations

import dataclasses

from engine.capacity.memory.kv import CacheLayout
from engine.capacity.memory.kv_formula import compare_kv_formulas
from engine.capacity.memory.plan import plan
from engine.capacity.memory.request import PlanRequest, complete

_SHORTEST = 256


@dataclasses.dataclass(frozen=True, slots=True)
class CurvePoint:
    """One context length.

    Attributes:
        context: tokens of each request.
        max_concurrency: requests of it that fit at once.
        published: how many the commonly published formula promises for the same KV memory.
    """

    context: int
    max_concurrency: int
    published: int


def concurrency_curve(request: PlanRequest) -> tuple[CurvePoint, ...]:
    """Points from short contexts to the model's own length: every power of two, the planned context, and the longest.

    >>> from engine.capacity.model.catalog import model_spec
    >>> from engine.capacity.hardware import find_gpu
    >>> points = concurrency_curve(PlanRequest(model_spec("Llama-3.1-8B"), find_gpu("H100 SXM 80GB"), context=8192))
    >>> [(point.context, point.max_concurrency, point.published) for point in points][5:7]
    [(8192, 55, 13), (16384, 27, 6)]

    Raises:
        ConfigError: if the request is not possible.
    """
    full = complete(request)
    longest = full.spec.max_position
    shortest = max(_SHORTEST, full.shared_prefix + 1)  # a prefix that all share leaves something of each
    powers = [2**n for n in range(longest.bit_length()) if shortest <= 2**n <= longest]
    contexts = sorted({*powers, full.context, longest})
    return tuple(_point(request, context) for context in contexts)


def _point(request: PlanRequest, context: int) -> CurvePoint:
    answer = plan(dataclasses.replace(request, context=context))
    full = answer.request
    both = compare_kv_formulas(full.spec, CacheLayout(full.kv_dtype, full.block_size), context, full.tp)
    # The published form knows no sharding: its bytes are of one request on all GPUs together.
    pool = answer.memory.kv * full.gpus
    return CurvePoint(context, answer.max_concurrency, pool // both.published.bytes)
