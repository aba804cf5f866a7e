"""A deployment in full: memory, latency under the planned load, cost, and what breaks first as the load grows."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

from engine.capacity.advice.money import Cost, cost_of
from engine.capacity.memory.plan import Plan, max_concurrency, plan
from engine.capacity.memory.request import CompleteRequest, PlanRequest
from engine.capacity.speed.operating_point import OperatingPoint
from engine.capacity.speed.serving import Serving, serving
from engine.capacity.speed.workload import (
    MAX_RATE,
    Objectives,
    PlannedWorkload,
    check_number,
    check_objectives,
    check_workload,
)
from engine.errors import ConfigError

_USUAL_OUTPUT = 256
_NEARLY_FULL = 0.9  # of the rate that can be served: as far as the formulas were checked against a simulation


@dataclasses.dataclass(frozen=True, slots=True)
class Deployment:
    """The answer to a goal.

    Attributes:
        plan: memory.
        workload, objectives: as planned for.
        rate: requests a second that were asked for; None: a number of users instead, ``plan.request.concurrency``.
        slots: sequences of the workload that each replica can run at once.
        serving: the model of its load; None where the GPU's speeds are unknown, and then so is what follows.
        point: at the planned load.
        best: at the largest load that keeps the objectives; None if none does.
        cost: at the planned load.
        headroom: share of the largest load that is still free; negative if the goal is above it.
        first_limit: what breaks first as the load grows, as text.
        fits: memory holds the goal and the load is served.
        meets: the objectives are kept, too.
    """

    plan: Plan
    workload: PlannedWorkload
    objectives: Objectives
    rate: float | None
    slots: int
    serving: Serving | None
    point: OperatingPoint | None
    best: OperatingPoint | None
    cost: Cost
    headroom: float | None
    first_limit: str
    fits: bool
    meets: bool


def lengths(context: int, input_tokens: int | None, output_tokens: int | None) -> tuple[int, int]:
    """(input, output) tokens of a request: as given, else of a context filled to its end.

    >>> lengths(8192, None, None), lengths(8192, 1000, None), lengths(64, None, None)
    ((7936, 256), (1000, 256), (48, 16))
    """
    most = max(1, context - input_tokens) if input_tokens else max(1, context // 4)
    output = output_tokens or min(_USUAL_OUTPUT, most)
    return input_tokens or max(1, context - output), output


def deploy(
    request: PlanRequest,
    workload: PlannedWorkload,
    objectives: Objectives | None = None,
    rate: float | None = None,
    price: float | None = None,
) -> Deployment:
    """Plan a deployment for ``rate`` requests a second, or for ``request.concurrency`` users where it is None.

    Args:
        price: US dollars an hour for one GPU; None: the catalog's figure.

    >>> from engine.capacity.model.catalog import model_spec
    >>> from engine.capacity.hardware import find_gpu
    >>> wanted = PlanRequest(model_spec("Llama-3.1-8B"), find_gpu("H100 SXM 80GB"), context=2048, concurrency=64)
    >>> answer = deploy(wanted, PlannedWorkload(1024, 256), Objectives(ttft_s=0.5, tpot_s=0.05))
    >>> answer.fits, answer.meets, round(1e3 * answer.point.tpot_s)
    (True, True, 14)

    Raises:
        ConfigError: naming the input at fault and what would work.
    """
    work, wanted = check_workload(workload), check_objectives(objectives or Objectives())
    if rate is not None:
        check_number("rate", rate, 1e-6, MAX_RATE, "Give a number of requests a second above 0.")
    if price is not None:
        check_number("price", price, 0, 1e6, "Give US dollars an hour for one GPU.")
    _check_lengths(request, work)
    return _deploy(request, work, wanted, rate, price)


@functools.lru_cache(maxsize=1024)
def _deploy(
    request: PlanRequest, work: PlannedWorkload, objectives: Objectives, rate: float | None, price: float | None
) -> Deployment:
    memory = plan(_shared(request, work))
    full = memory.request
    slots = slots_of(full, work)
    model = serving(full, work, slots) if slots else None
    point = best = None
    if model is not None:
        point = model.at_rate(rate) if rate is not None else model.at_concurrency(float(full.concurrency))
        best = model.largest_load(objectives)
    if rate is not None and point is not None and point.stable:
        # What the load holds in memory at once, as far as it is certain to fit.
        held = max(1, min(math.ceil(point.running) * full.dp, memory.max_concurrency))
        memory = plan(dataclasses.replace(_shared(request, work), concurrency=held, max_num_seqs=full.max_num_seqs))
        full = memory.request
    stable = point is None or point.stable
    asked = rate is None or stable
    hourly = full.gpu.price_usd_hour if price is None else price
    output, total = (point.output_tokens_s, point.total_tokens_s) if point is not None and stable else (None, None)
    return Deployment(
        plan=memory,
        workload=work,
        objectives=objectives,
        rate=rate,
        slots=slots,
        serving=model,
        point=point,
        best=best,
        cost=cost_of(full.gpus, hourly, full.gpu.tdp_w, output, total),
        headroom=_headroom(rate, full, best),
        first_limit=_first_limit(memory, model, best, objectives),
        fits=memory.fits and asked,
        meets=memory.fits and point is not None and point.meets(objectives),
    )


def slots_of(request: CompleteRequest, workload: PlannedWorkload) -> int:
    """Sequences of this workload that one replica can run at once: what memory holds, at most the largest batch."""
    context = min(request.context, max(1, math.ceil(workload.input_tokens + workload.output_tokens)))
    shared = min(request.shared_prefix, context - 1)
    fitted = max_concurrency(dataclasses.replace(request, context=context, shared_prefix=shared))
    return fitted if request.profile.batch_is_concurrency else min(fitted, request.max_num_seqs)


def _shared(request: PlanRequest, work: PlannedWorkload) -> PlanRequest:
    """A prefix hit rate is a prefix that is held once."""
    if request.shared_prefix or not work.prefix_hit_rate:
        return request
    tokens = int(work.input_tokens * work.prefix_hit_rate)
    limit = (request.context or request.spec.max_position) - 1
    return dataclasses.replace(request, shared_prefix=max(0, min(tokens, limit)))


def _check_lengths(request: PlanRequest, work: PlannedWorkload) -> None:
    context = request.spec.max_position if request.context is None else request.context
    if isinstance(context, int) and work.input_tokens + work.output_tokens > context >= 1:
        raise ConfigError(
            f"{work.input_tokens:,.0f} prompt and {work.output_tokens:,.0f} output tokens are more than the context of "
            f"{context:,}.",
            field="context",
            remedy=f"Plan a context of at least {math.ceil(work.input_tokens + work.output_tokens):,}, or shorter "
            "requests.",
        )


def _headroom(rate: float | None, full: CompleteRequest, best: OperatingPoint | None) -> float | None:
    if best is None:
        return None
    if rate is not None:
        return 1.0 - rate / best.rate
    return 1.0 - full.concurrency / max(best.in_system * full.dp, 1e-9)


def _first_limit(memory: Plan, model: Serving | None, best: OperatingPoint | None, objectives: Objectives) -> str:
    full = memory.request
    if not memory.fits:
        return "memory"
    if model is None:
        return "unknown: the speeds of this GPU are not known"
    if best is None:
        point = model.at_running(0.01)
        slow = objectives.ttft_s is not None and point.ttft_p95_s > objectives.ttft_s
        return "time to first token, even of a single request" if slow else "time per output token, even of one request"
    most = model.most_running()
    if best.running < 0.97 * most:
        beyond = model.at_running(min(best.running * 1.03, most))
        slow = objectives.ttft_s is not None and beyond.ttft_p95_s > objectives.ttft_s
        return "time to first token" if slow else "time per output token"
    if most < 0.99 * model.slots:
        return "token budget: prompts take all of every step"
    held = full.max_num_seqs if not full.profile.batch_is_concurrency else model.slots + 1
    return "largest batch (max_num_seqs)" if model.slots >= held else "memory for the KV cache"


def deployment_dict(answer: Deployment) -> dict[str, Any]:
    """JSON form, as ``plan --json`` prints it: the memory plan's, with latency and cost. Milliseconds, US dollars."""
    document = answer.plan.to_dict()
    point = answer.point
    document["latency"] = _latency(answer, point)
    document["cost"] = {"currency": "USD", **dataclasses.asdict(answer.cost)}
    document["limits"] |= {
        "max_rate_within_slo": answer.best.rate if answer.best else None,
        "headroom": answer.headroom,
        "first_limit": answer.first_limit,
    }
    document["workload"] = dataclasses.asdict(answer.workload) | {"rate": answer.rate}
    document["slo"] = {
        "ttft_ms": _ms(answer.objectives.ttft_s),
        "tpot_ms": _ms(answer.objectives.tpot_s),
        "met": answer.meets,
    }
    document["fits"] = answer.fits
    document["warnings"] += warnings_of(answer)
    document["assumptions"] += assumptions_of(answer)
    return document


_LATENCIES = {
    "ttft_ms": "ttft_s",
    "tpot_ms": "tpot_s",
    "decode_step_ms": "decode_step_s",
    "step_ms": "step_s",
    "ttft_p50_ms": "ttft_p50_s",
    "ttft_p95_ms": "ttft_p95_s",
    "ttft_p99_ms": "ttft_p99_s",
    "tpot_p95_ms": "tpot_p95_s",
    "e2e_p50_ms": "e2e_p50_s",
    "e2e_p95_ms": "e2e_p95_s",
    "e2e_p99_ms": "e2e_p99_s",
}


def _latency(answer: Deployment, point: OperatingPoint | None) -> dict[str, Any]:
    """Every key, None where it is not known or has no bound."""
    times = {key: None if point is None else _ms(getattr(point, name)) for key, name in _LATENCIES.items()}
    rates = ("output_tokens_s", "total_tokens_s", "running", "rate")
    flows = {name: None if point is None else getattr(point, name) for name in rates}
    return {**times, **flows, "stable": None if point is None else point.stable, "slots": answer.slots}


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None or not math.isfinite(seconds) else 1e3 * seconds


def warnings_of(answer: Deployment) -> list[str]:
    """What an operator should look at, besides memory."""
    full, lines = answer.plan.request, []
    if answer.plan.max_concurrency and answer.serving is None:
        lines.append(f"The speeds of {full.gpu.name} are not known: no latency, throughput or cost a token is given.")
    if answer.point is not None and not answer.point.stable:
        lines.append(
            f"{answer.rate:,.2f} requests a second are more than the {answer.serving.capacity():,.2f} that can be "  # type: ignore[union-attr]
            "served: the queue grows without end."
        )
    elif answer.point is not None and not answer.meets and answer.plan.fits:
        lines.append("An objective is missed at this load (95th percentile).")
    if answer.rate is not None and answer.point is not None and answer.point.stable:
        share = answer.rate / answer.serving.capacity()  # type: ignore[union-attr]
        if share > _NEARLY_FULL:
            lines.append(
                f"This load is {share:.0%} of all that can be served: percentiles so close to saturation may be a "
                "quarter too low, and a busier hour has nowhere to go. Leave headroom."
            )
    if full.tp > 8:
        lines.append(f"{full.tp} tensor-parallel GPUs span machines: the link between machines is slower than planned.")
    return lines


def assumptions_of(answer: Deployment) -> list[str]:
    """What the times and costs rest on."""
    if answer.serving is None:
        return []
    full, work = answer.plan.request, answer.workload
    gpu = full.gpu
    source = "measured on this GPU" if gpu.measured else "usual shares, not measured on this GPU"
    lines = [
        f"{work.input_tokens:,.0f} prompt and {work.output_tokens:,.0f} output tokens a request; "
        f"{'Poisson arrivals' if work.burstiness == 1 else f'arrivals with a burstiness of {work.burstiness:g}'}.",
        f"Roofline with {gpu.flops_efficiency:.0%} of {gpu.bf16_tflops:,.0f} dense 16-bit TFLOP/s and "
        f"{gpu.bandwidth_efficiency:.0%} of {gpu.bandwidth_gb_s:,.0f} GB/s ({source}).",
        "Overhead of 32 µs a layer, 4 µs a request and 126 µs a step, as seen in serving engines.",
    ]
    if full.gpu.price_usd_hour is not None:
        lines.append(f"${answer.cost.price_per_gpu_hour:,.2f} an hour for a GPU: replace it by what you pay.")
    return lines
