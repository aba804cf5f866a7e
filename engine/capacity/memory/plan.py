"""From a model, GPUs and a goal to a memory plan: what is where, what fits, what the limits are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from engine.capacity.memory.budget import MemoryBudget, encoder_bytes, memory_budget
from engine.capacity.memory.cache import block_bytes, cached_spec, sequence_bytes
from engine.capacity.memory.kv import kv_bytes_per_token, state_bytes_per_sequence
from engine.capacity.memory.notes import assumptions_of, warnings_of
from engine.capacity.memory.request import MAX_SEQUENCES, CompleteRequest, PlanRequest, complete, request_from_names
from engine.capacity.model.parameters import ParameterCount, parameter_count
from engine.capacity.model.sharding import Stage, pipeline_stages
from engine.capacity.text import GIB


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """The answer. Memory figures are of one GPU: the one that limits, where a pipeline's stages differ.

    Attributes:
        request: with every None replaced by what was assumed.
        stage: the limiting GPU's layers.
        parameters: of the whole model.
        memory: see :class:`~engine.capacity.memory.budget.MemoryBudget`.
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
                "encoder_gib": encoder_bytes(self.request, self.stage) / GIB,
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
                "bytes": memory.bytes_by_part(),
            },
            "limits": {"max_concurrency": self.max_concurrency, "max_context": self.max_context},
            "fits": self.fits,
            "warnings": list(self.warnings),
            "assumptions": list(self.assumptions),
        }


def _request_dict(request: CompleteRequest) -> dict[str, Any]:
    names = request.names()
    model, draft, profile = names.pop("spec"), names.pop("draft"), names.pop("profile")
    return {"model": model, **names, "draft": draft, "profile": profile}


def plan(request: PlanRequest) -> Plan:
    """Plan the memory of a deployment.

    >>> from engine.capacity.hardware import find_gpu
    >>> from engine.capacity.model.catalog import model_spec
    >>> answer = plan(PlanRequest(model_spec("Llama-3.1-8B"), find_gpu("H100 SXM 80GB"), context=8192,
    ...                           max_num_seqs=1024, utilization=0.95))
    >>> answer.kv_tokens, answer.max_concurrency  # vLLM 0.19 reported 476,016 tokens
    (475888, 58)

    Raises:
        ConfigError: naming the input at fault and what would work.
    """
    full = complete(request)
    stage, memory = _limiting_stage(full)
    shard = full.shard(stage)
    per_sequence, shared = sequence_bytes(full, stage)
    needed = per_sequence * full.share + shared
    fits = needed <= memory.kv
    most = full.dp * max_concurrency(full)
    return Plan(
        request=full,
        stage=stage,
        parameters=parameter_count(full.spec),
        memory=memory,
        kv_bytes_per_token=kv_bytes_per_token(cached_spec(full), full.kv_dtype, shard),
        kv_bytes_per_block=block_bytes(full, stage),
        kv_blocks=memory.kv_blocks,
        kv_tokens=memory.kv_blocks * full.block_size,
        kv_bytes_per_sequence=per_sequence,
        kv_bytes_shared=shared,
        state_bytes_per_sequence=state_bytes_per_sequence(full.spec, full.dtype, shard),
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


def _limiting_stage(request: CompleteRequest) -> tuple[Stage, MemoryBudget]:
    """The pipeline stage whose GPU can hold the fewest sequences, and its budget."""
    stages = pipeline_stages(request.spec.num_layers, request.pp)
    budgets = [(stage, memory_budget(request, stage)) for stage in stages]
    return min(budgets, key=lambda item: (_room(request, *item), item[1].kv_blocks, -item[1].excess))


def _sequences_that_fit(request: CompleteRequest) -> int:
    """Sequences of the planned context for which every stage has room."""
    stages = pipeline_stages(request.spec.num_layers, request.pp)
    return min(_room(request, stage, memory_budget(request, stage)) for stage in stages)


def _room(request: CompleteRequest, stage: Stage, budget: MemoryBudget) -> int:
    """Sequences for which the stage has room."""
    private, shared = sequence_bytes(request, stage)
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
