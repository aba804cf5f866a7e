"""What a plan is asked for, checked and completed with the defaults of model and engine."""

from __future__ import annotations

import dataclasses

from engine.capacity.formats import dtype_name, kv_format, weight_format
from engine.capacity.hardware import Gpu
from engine.capacity.parallel import check_parallel
from engine.capacity.profiles import Profile, find_profile
from engine.capacity.spec import ModelSpec
from engine.capacity.words import shown
from engine.errors import ConfigError

MAX_SEQUENCES = 1_000_000
MAX_BLOCK_SIZE = 4096


@dataclasses.dataclass(frozen=True, slots=True)
class PlanRequest:
    """What is asked. None stands for the default that the engine profile or the model gives.

    Attributes:
        spec: the model.
        gpu: each of the GPUs.
        tp, pp: tensor- and pipeline-parallel GPUs; tp · pp in all.
        dtype: compute dtype; None: the checkpoint's.
        weights: weight format; None: ``dtype``.
        kv_dtype: KV cache format; "auto": ``dtype``.
        context: tokens of one sequence, prompt and output; None: the model's own context length.
        concurrency: sequences of that length at once, the goal.
        max_num_seqs: largest batch that the engine reserves activations for; None: the profile's default, at least
            ``concurrency``.
        token_budget: tokens of the largest step; None: the profile's default.
        utilization: share of the GPU's memory that the engine may use, 0 … 1; None: the profile's default.
        block_size: tokens of a KV block; None: the profile's default.
        profile: the engine, see :mod:`engine.capacity.profiles`.
    """

    spec: ModelSpec
    gpu: Gpu
    tp: int = 1
    pp: int = 1
    dtype: str | None = None
    weights: str | None = None
    kv_dtype: str = "auto"
    context: int | None = None
    concurrency: int = 1
    max_num_seqs: int | None = None
    token_budget: int | None = None
    utilization: float | None = None
    block_size: int | None = None
    profile: str = "vllm-0.19"


@dataclasses.dataclass(frozen=True, slots=True)
class CompleteRequest:
    """A checked :class:`PlanRequest`: nothing is left open. The attributes mean what they mean there."""

    spec: ModelSpec
    gpu: Gpu
    tp: int
    pp: int
    dtype: str
    weights: str
    kv_dtype: str
    context: int
    concurrency: int
    max_num_seqs: int
    token_budget: int | None
    utilization: float
    block_size: int
    profile: Profile


def complete(request: PlanRequest) -> CompleteRequest:
    """The request with its defaults filled in and every value checked.

    Raises:
        ConfigError: naming the input at fault and what would work.
    """
    spec, profile = request.spec, find_profile(request.profile)
    check_parallel(spec, request.tp, request.pp)
    dtype = dtype_name(request.dtype or spec.torch_dtype)
    weights = weight_format(dtype if request.weights in (None, "auto", "model") else str(request.weights))
    context = _whole("context", spec.max_position if request.context is None else request.context, 1)
    if context > spec.max_position:
        raise ConfigError(
            f"{context:,} tokens are more than the {spec.max_position:,} that {spec.name} was made for.",
            field="context",
            remedy=f"Give at most {spec.max_position:,}.",
        )
    concurrency = _whole("concurrency", request.concurrency, 1, MAX_SEQUENCES)
    most = request.max_num_seqs
    if profile.batch_is_concurrency:
        most = concurrency
    most = _whole("max_num_seqs", max(profile.max_num_seqs, concurrency) if most is None else most, 1, MAX_SEQUENCES)
    if most < concurrency:
        raise ConfigError(
            f"{most:,} sequences at once are fewer than the concurrency of {concurrency:,} that is planned for.",
            field="max_num_seqs",
            remedy=f"Give at least {concurrency:,}, or lower the concurrency.",
        )
    budget = request.token_budget
    utilization = _utilization(profile.utilization if request.utilization is None else request.utilization)
    block_size = profile.block_size if request.block_size is None else request.block_size
    return CompleteRequest(
        spec=spec,
        gpu=request.gpu,
        tp=request.tp,
        pp=request.pp,
        dtype=dtype,
        weights=weights.name,
        kv_dtype=kv_format(request.kv_dtype, dtype).name,
        context=context,
        concurrency=concurrency,
        max_num_seqs=most,
        token_budget=profile.token_budget if budget is None else _whole("token_budget", budget, 1),
        utilization=utilization,
        block_size=_whole("block_size", block_size, 1, MAX_BLOCK_SIZE),
        profile=profile,
    )


def _whole(field: str, value: object, minimum: int, maximum: int = 2**31) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
        raise ConfigError(
            f"{shown(value)} is not possible.",
            field=field,
            remedy=f"Give a whole number from {minimum:,} to {maximum:,}.",
        )
    return value


def _utilization(value: object) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < float(value) <= 1:  # type: ignore[arg-type]
        raise ConfigError(
            f"{shown(value)} is not a share of the memory.",
            field="utilization",
            remedy="Give a number above 0 and up to 1, e.g. 0.9.",
        )
    return float(value)  # type: ignore[arg-type]
