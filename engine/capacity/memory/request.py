"""What a plan is asked for, checked and completed with the defaults of model and engine."""

from __future__ import annotations

import dataclasses

from engine.capacity.hardware import Gpu
from engine.capacity.memory.formats import dtype_name, kv_format
from engine.capacity.memory.parallel import check_parallel, possible_tp
from engine.capacity.memory.profiles import Profile, find_profile
from engine.capacity.model.spec import ModelSpec
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
        tp, pp: tensor- and pipeline-parallel GPUs; tp · pp hold the model once.
        ep: GPUs that a mixture's experts are distributed over, whole: 1 or tp.
        dp: copies of the model, each with a share of the requests; tp · pp · dp GPUs in all.
        dtype: compute dtype; None: the checkpoint's.
        weights: weight format; None: the checkpoint's own, ``dtype`` if it is not quantized.
        kv_dtype: KV cache format; "auto": what the checkpoint asks for where the engine follows it (vLLM), else
            ``dtype``.
        context: tokens of one sequence, prompt and output; None: the model's own context length.
        concurrency: sequences of that length at once, the goal; shared evenly by the ``dp`` copies.
        max_num_seqs: largest batch that the engine reserves activations for; None: the profile's default, at least
            ``concurrency``.
        token_budget: tokens of the largest step; None: the profile's default.
        utilization: share of the GPU's memory that the engine may use, 0 … 1; None: the profile's default.
        block_size: tokens of a KV block; None: the profile's default.
        profile: the engine, see :mod:`engine.capacity.memory.profiles`.
        shared_prefix: tokens at the start that all sequences have in common and that the prefix cache holds once.
        lora_rank, lora_adapters: low-rank adapters that are loaded at once, and their rank; 0: none.
        draft: a smaller model that proposes tokens for speculation, on the same GPUs; None: none.
    """

    spec: ModelSpec
    gpu: Gpu
    tp: int = 1
    pp: int = 1
    ep: int = 1
    dp: int = 1
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
    shared_prefix: int = 0
    lora_rank: int = 16
    lora_adapters: int = 0
    draft: ModelSpec | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class CompleteRequest:
    """A checked :class:`PlanRequest`: nothing is left open. The attributes mean what they mean there."""

    spec: ModelSpec
    gpu: Gpu
    tp: int
    pp: int
    ep: int
    dp: int
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
    shared_prefix: int
    lora_rank: int
    lora_adapters: int
    draft: ModelSpec | None

    @property
    def gpus(self) -> int:
        """All GPUs of the deployment."""
        return self.tp * self.pp * self.dp

    @property
    def share(self) -> int:
        """Sequences of the goal that each copy of the model holds."""
        return -(-self.concurrency // self.dp)

    @property
    def draft_tp(self) -> int:
        """GPUs that share the draft model: those of the target where its heads allow it, else each holds all of it."""
        return self.tp if self.draft is not None and self.tp in possible_tp(self.draft, self.tp) else 1

    def as_request(self) -> PlanRequest:
        """The same as a request: what was a default is now stated."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return PlanRequest(**{**values, "profile": self.profile.name})


def complete(request: PlanRequest) -> CompleteRequest:
    """The request with its defaults filled in and every value checked.

    Raises:
        ConfigError: naming the input at fault and what would work.
    """
    spec, profile = request.spec, find_profile(request.profile)
    check_parallel(spec, request.tp, request.pp, request.ep, request.dp)
    dtype = dtype_name(request.dtype or spec.torch_dtype)
    own = spec.checkpoint_format or dtype
    weights = spec.weight_format(own if request.weights in (None, "auto", "model") else str(request.weights))
    context = _whole("context", spec.max_position if request.context is None else request.context, 1)
    if context > spec.max_position:
        raise ConfigError(
            f"{context:,} tokens are more than the {spec.max_position:,} that {spec.name} was made for.",
            field="context",
            remedy=f"Give at most {spec.max_position:,}.",
        )
    concurrency = _whole("concurrency", request.concurrency, 1, MAX_SEQUENCES)
    each = -(-concurrency // request.dp)
    most = each if profile.batch_is_concurrency else request.max_num_seqs
    most = _whole("max_num_seqs", max(profile.max_num_seqs, each) if most is None else most, 1, MAX_SEQUENCES)
    if most < each:
        raise ConfigError(
            f"{most:,} sequences at once are fewer than the concurrency of {each:,} that is planned for.",
            field="max_num_seqs",
            remedy=f"Give at least {each:,}, or lower the concurrency.",
        )
    budget = request.token_budget
    utilization = _utilization(profile.utilization if request.utilization is None else request.utilization)
    block_size = profile.block_size if request.block_size is None else request.block_size
    return CompleteRequest(
        spec=spec,
        gpu=request.gpu,
        tp=request.tp,
        pp=request.pp,
        ep=request.ep,
        dp=request.dp,
        dtype=dtype,
        weights=weights.name,
        kv_dtype=kv_format(_kv_dtype(request, profile), dtype).name,
        context=context,
        concurrency=concurrency,
        max_num_seqs=most,
        token_budget=profile.token_budget if budget is None else _whole("token_budget", budget, 1),
        utilization=utilization,
        block_size=_whole("block_size", block_size, 1, MAX_BLOCK_SIZE),
        profile=profile,
        shared_prefix=_shared_prefix(request, context),
        lora_rank=_whole("lora_rank", request.lora_rank, 1, 4096),
        lora_adapters=_whole("lora_adapters", request.lora_adapters, 0, 10_000),
        draft=_draft(request),
    )


def _kv_dtype(request: PlanRequest, profile: Profile) -> str:
    # vLLM follows a checkpoint that asks for an FP8 cache; the others keep the compute dtype unless told otherwise.
    follows = request.kv_dtype == "auto" and profile.torch_cuda and request.spec.kv_dtype is not None
    return str(request.spec.kv_dtype) if follows else request.kv_dtype


def _shared_prefix(request: PlanRequest, context: int) -> int:
    tokens = _whole("shared_prefix", request.shared_prefix, 0)
    if tokens >= context:
        raise ConfigError(
            f"{tokens:,} shared tokens leave nothing of a context of {context:,}.",
            field="shared_prefix",
            remedy=f"Give at most {context - 1:,}.",
        )
    return tokens


def _draft(request: PlanRequest) -> ModelSpec | None:
    draft = request.draft
    if draft is None:
        return None
    if draft.vocab_size != request.spec.vocab_size and abs(draft.vocab_size - request.spec.vocab_size) > 1024:
        raise ConfigError(
            f"{draft.name} has {draft.vocab_size:,} tokens, {request.spec.name} has {request.spec.vocab_size:,}: a "
            "draft model must speak the same vocabulary.",
            field="draft",
            remedy="Choose a smaller model of the same family.",
        )
    return draft


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
