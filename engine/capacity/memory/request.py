"""What a plan is asked for, checked and completed with the defaults of model and engine."""

from __future__ import annotations

import dataclasses
from typing import Any

from engine.capacity.formats import ComputeDtype, KVPrecision, WeightPrecision, compute_dtype, kv_precision
from engine.capacity.hardware import Gpu, custom_gpu, find_gpu, with_memory
from engine.capacity.memory.activation import LargestStep
from engine.capacity.memory.kv import CacheLayout
from engine.capacity.memory.parallel import check_parallel, possible_tp
from engine.capacity.memory.profiles import Profile, find_profile, profile_weight_precision
from engine.capacity.model.catalog import model_spec
from engine.capacity.model.sharding import Shard, Stage
from engine.capacity.model.spec import ModelSpec
from engine.capacity.text import shown
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
    """A checked :class:`PlanRequest`: nothing is left open, and names of formats have become the formats. The
    attributes mean what they mean there."""

    spec: ModelSpec
    gpu: Gpu
    tp: int
    pp: int
    ep: int
    dp: int
    dtype: ComputeDtype
    weights: WeightPrecision
    kv_dtype: KVPrecision
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

    @property
    def layout(self) -> CacheLayout:
        """How the engine keeps keys and values of this model."""
        frees_windows = self.profile.frees_windows_of(self.spec)
        return CacheLayout(self.kv_dtype, self.block_size, frees_windows, self.profile.groups_layers)

    @property
    def largest_step(self) -> LargestStep:
        """What activations are reserved for."""
        return LargestStep(self.max_num_seqs, self.token_budget, self.context)

    def shard(self, stage: Stage | None = None) -> Shard:
        """The part of the model on one GPU of a stage; None: without regard to stages."""
        return Shard(self.tp, self.ep, stage)

    def names(self) -> dict[str, Any]:
        """The fields by name, models, GPU, engine and formats as their names."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: getattr(value, "name", value) for name, value in fields.items()}

    def as_request(self) -> PlanRequest:
        """The same as a request: what was a default is now stated."""
        return PlanRequest(**{**self.names(), "spec": self.spec, "gpu": self.gpu, "draft": self.draft})


def complete(request: PlanRequest) -> CompleteRequest:
    """The request with its defaults filled in, every value checked, and every name of a format looked up.

    Raises:
        ConfigError: naming the input at fault and what would work.
    """
    spec, profile = request.spec, find_profile(request.profile)
    check_parallel(spec, request.tp, request.pp, request.ep, request.dp)
    dtype = compute_dtype(request.dtype or spec.torch_dtype)
    weights = _weights(request, profile, dtype)
    context = _context(request)
    most = _largest_batch(request, profile)
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
        weights=weights,
        kv_dtype=kv_precision(_kv_dtype(request, profile), dtype),
        context=context,
        concurrency=request.concurrency,
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


def request_from_names(
    model: str,
    gpu: str | None = None,
    *,
    gpu_memory_gib: float | None = None,
    spec: ModelSpec | None = None,
    **options: Any,
) -> PlanRequest:
    """A request from names, as the command line has them.

    Args:
        model: name in the catalog (ignored where ``spec`` is given).
        gpu: name in the catalog; may be left out where ``gpu_memory_gib`` is given.
        gpu_memory_gib: usable memory of each GPU, in place of the catalog's.
        spec: a model that is not in the catalog, read from a ``config.json``.
        options: the other fields of :class:`PlanRequest`.

    Raises:
        ConfigError: naming the input at fault and what would work.
    """
    if gpu is None and gpu_memory_gib is None:
        raise ConfigError(
            "neither a GPU nor its memory is given.", field="gpu", remedy="Give a GPU's name, or gpu_memory_gib."
        )
    if gpu is None:
        device = custom_gpu("GPU", gpu_memory_gib or 0.0)
    elif gpu_memory_gib is None:
        device = find_gpu(gpu)
    else:
        device = _known_or_custom(gpu, gpu_memory_gib)
    return PlanRequest(model_spec(model) if spec is None else spec, device, **options)


def _known_or_custom(name: str, memory_gib: float) -> Gpu:
    # With its memory given, a GPU need not be in the catalog.
    try:
        return with_memory(find_gpu(name), memory_gib)
    except ConfigError as error:
        if error.field != "gpu":
            raise
        return custom_gpu(name, memory_gib)


def _weights(request: PlanRequest, profile: Profile, dtype: ComputeDtype) -> WeightPrecision:
    spec = request.spec
    if request.weights not in (None, "auto", "model"):
        return profile_weight_precision(profile, str(request.weights), spec)
    return spec.quantization or dtype.as_weights


def _context(request: PlanRequest) -> int:
    spec = request.spec
    context = _whole("context", spec.max_position if request.context is None else request.context, 1)
    if context > spec.max_position:
        raise ConfigError(
            f"{context:,} tokens are more than the {spec.max_position:,} that {spec.name} was made for.",
            field="context",
            remedy=f"Give at most {spec.max_position:,}.",
        )
    return context


def _largest_batch(request: PlanRequest, profile: Profile) -> int:
    each = -(-_whole("concurrency", request.concurrency, 1, MAX_SEQUENCES) // request.dp)
    most = each if profile.batch_is_concurrency else request.max_num_seqs
    most = _whole("max_num_seqs", max(profile.max_num_seqs, each) if most is None else most, 1, MAX_SEQUENCES)
    if most < each:
        raise ConfigError(
            f"{most:,} sequences at once are fewer than the concurrency of {each:,} that is planned for.",
            field="max_num_seqs",
            remedy=f"Give at least {each:,}, or lower the concurrency.",
        )
    return most


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
