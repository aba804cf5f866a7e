"""From a model, GPUs and a goal to a memory plan: what is where, what fits, what the limits are."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from engine.capacity.hardware import Gpu, custom_gpu, find_gpu, with_memory
from engine.capacity.memory.budget import whole_blocks
from engine.capacity.memory.formats import DTYPE_BYTES
from engine.capacity.memory.kv import (
    blocks_for,
    kv_bytes_per_block,
    kv_bytes_per_sequence,
    kv_bytes_per_token,
    state_bytes_per_sequence,
)
from engine.capacity.memory.notes import assumptions_of, warnings_of
from engine.capacity.memory.parallel import Stage, pipeline_stages
from engine.capacity.memory.profiles import non_torch_bytes, peak_activation_bytes, resident_weight_bytes
from engine.capacity.memory.request import MAX_SEQUENCES, CompleteRequest, PlanRequest, complete
from engine.capacity.memory.weights import ParameterCount, lora_bytes, parameter_count
from engine.capacity.model.catalog import model_spec
from engine.capacity.model.layers import Attention, CompressedAttention, LatentAttention, share
from engine.capacity.model.spec import ModelSpec
from engine.capacity.words import GIB
from engine.errors import ConfigError


@dataclasses.dataclass(frozen=True, slots=True)
class MemoryBudget:
    """One GPU's memory, bytes.

    weights + adapters + draft + activation + non_torch + kv + unused + reserved = capacity + excess.

    Attributes:
        capacity: all that a process can see.
        reserved: what the engine leaves alone: capacity · (1 - utilization).
        weights, adapters, draft, activation, non_torch, kv: what it takes; weights: an image encoder's included; draft:
            the draft model's weights.
        unused: less than one block, or what the engine has no use for.
        excess: by how much weights, activations and non-torch alone exceed the limit; then kv and unused are 0.
    """

    capacity: int
    reserved: int
    weights: int
    adapters: int
    draft: int
    activation: int
    non_torch: int
    kv: int
    unused: int
    excess: int

    @property
    def limit(self) -> int:
        """What the engine may use."""
        return self.capacity - self.reserved

    @property
    def fixed(self) -> int:
        """What is taken before the KV cache."""
        return self.weights + self.adapters + self.draft + self.activation + self.non_torch


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """The answer. Memory figures are of one GPU: the one that limits, where a pipeline's stages differ.

    Attributes:
        request: with every None replaced by what was assumed.
        stage: the limiting GPU's layers.
        parameters: of the whole model.
        memory: see :class:`MemoryBudget`.
        kv_bytes_per_token, kv_bytes_per_block: of one GPU.
        kv_blocks: of the cache; kv_tokens: kv_blocks · block size.
        kv_bytes_per_sequence: one sequence of the planned context, recurrent state included, shared prefix not.
        kv_bytes_shared: the prefix that all sequences share.
        state_bytes_per_sequence: of kv_bytes_per_sequence, the constant state of recurrent layers.
        kv_bytes_needed: all of the goal.
        max_concurrency: sequences of the planned context that memory holds at once, on all copies; 0 if none.
        max_context: longest context at the planned concurrency, at most the model's own; 0 if none.
        fits: the goal fits.
        shortfall: bytes missing on one GPU; 0 if it fits.
        warnings: what an operator should look at.
        assumptions: what the numbers rest on.
    """

    request: CompleteRequest
    stage: Stage
    parameters: ParameterCount
    memory: MemoryBudget
    kv_bytes_per_token: int
    kv_bytes_per_block: int
    kv_blocks: int
    kv_tokens: int
    kv_bytes_per_sequence: int
    kv_bytes_shared: int
    state_bytes_per_sequence: int
    kv_bytes_needed: int
    max_concurrency: int
    max_context: int
    fits: bool
    shortfall: int
    warnings: tuple[str, ...]
    assumptions: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON form, as ``plan --json`` prints it. GiB are 2^30 bytes; figures of memory are of one GPU."""
        memory, count = self.memory, self.parameters
        return {
            "request": _request_dict(self.request),
            "parameters": {"total": count.total, "active": count.active, "by_part": count.by_part()},
            "memory": {
                "capacity_gib": memory.capacity / GIB,
                "limit_gib": memory.limit / GIB,
                "weights_gib": memory.weights / GIB,
                "encoder_gib": _encoder_bytes(self.request, self.stage) / GIB,
                "adapters_gib": memory.adapters / GIB,
                "draft_gib": memory.draft / GIB,
                "activation_gib": memory.activation / GIB,
                "non_torch_gib": memory.non_torch / GIB,
                "kv_gib": memory.kv / GIB,
                "kv_bytes_per_token": self.kv_bytes_per_token,
                "kv_bytes_per_sequence": self.kv_bytes_per_sequence,
                "kv_bytes_shared": self.kv_bytes_shared,
                "state_bytes_per_sequence": self.state_bytes_per_sequence,
                "kv_tokens": self.kv_tokens,
                "kv_blocks": self.kv_blocks,
                "shortfall_gib": self.shortfall / GIB,
                "bytes": dataclasses.asdict(memory),
            },
            "limits": {"max_concurrency": self.max_concurrency, "max_context": self.max_context},
            "fits": self.fits,
            "warnings": list(self.warnings),
            "assumptions": list(self.assumptions),
        }


def _request_dict(request: CompleteRequest) -> dict[str, Any]:
    values = {field.name: getattr(request, field.name) for field in dataclasses.fields(request)}
    model, gpu, profile = values.pop("spec"), values.pop("gpu"), values.pop("profile")
    draft = values.pop("draft")
    names = {"draft": draft.name if draft else None, "profile": profile.name}
    return {"model": model.name, "gpu": gpu.name, **values, **names}


def plan(request: PlanRequest) -> Plan:
    """Plan the memory of a deployment.

    >>> answer = plan(PlanRequest(model_spec("Llama-3.1-8B"), find_gpu("H100 SXM 80GB"), context=8192,
    ...                           max_num_seqs=1024, utilization=0.95))
    >>> answer.kv_tokens, answer.max_concurrency  # vLLM 0.19 reported 476,016 tokens
    (475888, 58)

    Raises:
        ConfigError: naming the input at fault and what would work.
    """
    full = complete(request)
    stage, memory, blocks = _limiting_stage(full)
    per_sequence, shared = _sequence_bytes(full, stage)
    needed = per_sequence * full.share + shared
    fits = needed <= memory.kv
    most = full.dp * max_concurrency(full)
    return Plan(
        request=full,
        stage=stage,
        parameters=parameter_count(full.spec),
        memory=memory,
        kv_bytes_per_token=kv_bytes_per_token(_cached(full), full.kv_dtype, full.tp, stage=stage),
        kv_bytes_per_block=_block_bytes(full, stage),
        kv_blocks=blocks,
        kv_tokens=blocks * full.block_size,
        kv_bytes_per_sequence=per_sequence,
        kv_bytes_shared=shared,
        state_bytes_per_sequence=state_bytes_per_sequence(full.spec, full.dtype, full.tp, stage=stage),
        kv_bytes_needed=needed,
        max_concurrency=most,
        max_context=max_context(full),
        fits=fits,
        shortfall=0 if fits else max(memory.fixed + needed - memory.limit, needed - memory.kv),
        warnings=warnings_of(full, most),
        assumptions=assumptions_of(full),
    )


def plan_from_names(model: str, gpu: str | None = None, **options: Any) -> Plan:
    """The memory plan of :func:`request_from_names`, with the same arguments.

    >>> plan_from_names("Llama-3.1-70B", "H100 SXM 80GB", tp=4, context=8192).fits
    True
    """
    return plan(request_from_names(model, gpu, **options))


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


def max_concurrency(request: CompleteRequest) -> int:
    """Sequences of the planned context that fit at once on one copy of the model, 0 if not even one does."""
    if not request.profile.batch_is_concurrency:
        return _sequences_that_fit(request)

    def holds(batch: int) -> bool:
        trial = dataclasses.replace(request, concurrency=batch, dp=1, max_num_seqs=batch)
        return _sequences_that_fit(trial) >= batch

    one = dataclasses.replace(request, concurrency=1, max_num_seqs=1)
    return _largest(holds, _sequences_that_fit(one))


def max_context(request: CompleteRequest) -> int:
    """Longest context, tokens, of which the planned concurrency fits; at most the model's own, 0 if there is none."""

    def holds(context: int) -> bool:
        return _sequences_that_fit(dataclasses.replace(request, context=context)) >= request.share

    return _largest(holds, request.spec.max_position)


def _limiting_stage(request: CompleteRequest) -> tuple[Stage, MemoryBudget, int]:
    """The pipeline stage whose GPU can hold the fewest sequences, its budget, and its number of KV blocks."""
    budgets = [(stage, *_budget(request, stage)) for stage in pipeline_stages(request.spec.num_layers, request.pp)]
    return min(budgets, key=lambda item: (_room(request, item[0], item[1]), item[2], -item[1].excess))


def _budget(request: CompleteRequest, stage: Stage) -> tuple[MemoryBudget, int]:
    """The budget of one GPU of a stage, and the number of KV blocks in it."""
    profile = request.profile
    capacity = request.gpu.usable_bytes
    limit = int(capacity * request.utilization)
    weights, adapters, draft = _weights(request, stage)
    activation = peak_activation_bytes(
        profile,
        request.spec,
        context=request.context,
        max_num_seqs=request.max_num_seqs,
        token_budget=request.token_budget,
        dtype=request.dtype,
        tp=request.tp,
        stage=stage,
    )
    non_torch = non_torch_bytes(profile, request.tp * request.pp)
    left = limit - weights - adapters - draft - activation - non_torch
    cache = whole_blocks(left, _block_bytes(request, stage), request.block_size, _most_blocks(request, stage))
    # A stage of recurrent layers alone keeps states and no blocks.
    kv = cache.bytes if cache.num_blocks or _block_bytes(request, stage) else max(left, 0)
    budget = MemoryBudget(
        capacity=capacity,
        reserved=capacity - limit,
        weights=weights,
        adapters=adapters,
        draft=draft,
        activation=activation,
        non_torch=non_torch,
        kv=kv,
        unused=max(left, 0) - kv,
        excess=max(-left, 0),
    )
    return budget, cache.num_blocks


def _most_blocks(request: CompleteRequest, stage: Stage) -> int | None:
    """More KV blocks than all sequences can use are not made by some engines: that many; None for as many as fit."""
    if not request.profile.caps_cache:
        return None
    # A sequence's recurrent states come out of the same memory.
    states = state_bytes_per_sequence(request.spec, request.dtype, request.tp, stage=stage)
    block = _block_bytes(request, stage)
    blocks = blocks_for(request.context, request.block_size) + (-(-states // block) if block else 0)
    return request.max_num_seqs * blocks


def _weights(request: CompleteRequest, stage: Stage) -> tuple[int, int, int]:
    """Bytes on one GPU of a stage: (weights, LoRA adapters, draft model)."""
    spec, profile, tp = request.spec, request.profile, request.tp
    weights = resident_weight_bytes(profile, spec, request.weights, request.dtype, tp, stage, ep=request.ep)
    weights += _encoder_bytes(request, stage)
    adapters = lora_bytes(spec, request.lora_rank, request.lora_adapters, request.dtype, tp=tp, stage=stage)
    draft = 0
    if request.draft is not None and stage.last:
        draft = resident_weight_bytes(profile, request.draft, request.dtype, request.dtype, request.draft_tp)
    return weights, adapters, draft


def _encoder_bytes(request: CompleteRequest, stage: Stage) -> int:
    """An image encoder's weights on one GPU of the first stage, unquantized."""
    if not stage.first or request.profile.text_only:
        return 0
    return share(request.spec.encoder, request.tp) * DTYPE_BYTES[request.dtype]


def _cached(request: CompleteRequest) -> ModelSpec:
    """The model as its engine caches it: transformers keeps full keys and values of latent attention."""
    spec = request.spec
    return expanded(spec) if request.profile.expands_latent and spec.is_latent else spec


@functools.lru_cache(maxsize=256)
def expanded(spec: ModelSpec) -> ModelSpec:
    """The same model with full keys and values in place of latents.

    >>> kv_bytes_per_token(expanded(model_spec("DeepSeek-V3")), "bf16")  # 61 · 128 heads · (192 + 128) · 2 B
    4997120
    """
    kinds = []
    for kind in spec.kinds:
        mixer = kind.mixer
        if isinstance(mixer, LatentAttention) and not isinstance(mixer, CompressedAttention):
            width = mixer.nope_dim + mixer.rope_dim + mixer.value_dim
            mixer = Attention(mixer.num_heads, mixer.num_heads, -(-width // 2))
        kinds.append(dataclasses.replace(kind, mixer=mixer))
    return dataclasses.replace(spec, kinds=tuple(kinds))


def _block_bytes(request: CompleteRequest, stage: Stage) -> int:
    """One block of all layers of the stage, the draft model's included."""
    size, form = request.block_size, request.kv_dtype
    block = kv_bytes_per_block(
        _cached(request), size, form, request.tp, stage=stage, grouped=request.profile.groups_layers
    )
    if request.draft is not None and stage.last:
        block += kv_bytes_per_block(request.draft, size, form, request.draft_tp)
    return block


def _sequence_bytes(request: CompleteRequest, stage: Stage) -> tuple[int, int]:
    """(one sequence of the planned context without what it shares, the shared prefix)."""
    state = state_bytes_per_sequence(request.spec, request.dtype, request.tp, stage=stage)
    whole = _kv_bytes(request, stage, request.context)
    # Only whole blocks can be shared, and what slides out of a window is nobody's.
    prefix = request.shared_prefix // request.block_size * request.block_size
    if not prefix:
        return whole + state, 0
    private = max(_kv_bytes(request, stage, request.context - prefix), whole - _kv_bytes(request, stage, prefix))
    return private + state, whole - private


def _kv_bytes(request: CompleteRequest, stage: Stage, context: int) -> int:
    profile = request.profile
    size = kv_bytes_per_sequence(
        _cached(request),
        context,
        request.block_size,
        request.kv_dtype,
        request.tp,
        stage=stage,
        frees_windows=profile.frees_windows_of(request.spec),
        grouped=profile.groups_layers,
    )
    if request.draft is not None and stage.last:
        size += kv_bytes_per_sequence(request.draft, context, request.block_size, request.kv_dtype, request.draft_tp)
    return size


def _sequences_that_fit(request: CompleteRequest) -> int:
    """Sequences of the planned context for which every stage has room."""
    stages = pipeline_stages(request.spec.num_layers, request.pp)
    return min(_room(request, stage, _budget(request, stage)[0]) for stage in stages)


def _room(request: CompleteRequest, stage: Stage, budget: MemoryBudget) -> int:
    """Sequences for which the stage has room."""
    private, shared = _sequence_bytes(request, stage)
    if budget.excess:
        return 0
    if private == 0:  # neither keys and values nor state: the stage never limits
        return MAX_SEQUENCES
    return max(0, (budget.kv - shared) // private)


def _largest(holds: Callable[[int], bool], most: int) -> int:
    """The largest n in 1 … most for which ``holds(n)``, which is true up to a point; 0 if there is none."""
    if most < 1 or not holds(1):
        return 0
    low, high = 1, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low
