"""One GPU's memory: what weights, activations and the rest take, and how much KV cache is left.

The one composition: :func:`engine.capacity.plan` shows it, the engine sizes its cache with it. ::

    capacity ─┬─ reserved     (1 - utilization): the engine leaves it alone
              └─ limit ─┬─ weights, adapters, draft model
                        ├─ activations of the largest step
                        ├─ non-torch: CUDA context, communication buffers, libraries
                        ├─ KV cache: what is left, in whole blocks
                        └─ unused: less than a block, or more than the engine has a use for
"""

from __future__ import annotations

import dataclasses

from engine.capacity.memory.cache import block_bytes, most_blocks
from engine.capacity.memory.profiles import non_torch_bytes, peak_activation_bytes, resident_weight_bytes
from engine.capacity.memory.request import CompleteRequest
from engine.capacity.memory.weights import lora_bytes
from engine.capacity.model.sharding import WHOLE, Shard, Stage
from engine.capacity.model.tensors import share
from engine.capacity.text import gib
from engine.errors import CapacityError


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
        kv_blocks: whole blocks in ``kv``; their number, not bytes.
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
    kv_blocks: int

    @property
    def limit(self) -> int:
        """What the engine may use."""
        return self.capacity - self.reserved

    @property
    def fixed(self) -> int:
        """What is taken before the KV cache."""
        return self.weights + self.adapters + self.draft + self.activation + self.non_torch

    def bytes_by_part(self) -> dict[str, int]:
        """``{part: bytes}``."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "kv_blocks"}


def memory_budget(
    request: CompleteRequest, stage: Stage | None = None, *, measured_weights: int | None = None
) -> MemoryBudget:
    """The memory of one GPU.

    Args:
        request: the deployment.
        stage: the GPU's stage of a pipeline; None: all layers.
        measured_weights: bytes that the weights really take, where they are loaded; None: as predicted.

    >>> from engine.capacity.hardware import custom_gpu
    >>> from engine.capacity.memory.request import PlanRequest, complete
    >>> from engine.capacity.model.catalog import model_spec
    >>> wanted = PlanRequest(model_spec("Llama-3.1-8B"), custom_gpu("80 GB", 74.5), context=8192, max_num_seqs=1024)
    >>> budget = memory_budget(complete(wanted))
    >>> budget.kv_blocks, budget.kv_blocks * 2**21 == budget.kv  # of 2 MiB
    (25554, True)
    >>> memory_budget(complete(wanted), measured_weights=budget.weights - 2**30).kv_blocks - budget.kv_blocks
    512
    """
    held = stage or WHOLE.stage_of(request.spec)
    capacity = request.gpu.usable_bytes
    limit = int(capacity * request.utilization)
    shard, profile, spec = request.shard(held), request.profile, request.spec
    weights = _weight_bytes(request, held) if measured_weights is None else measured_weights
    adapters = lora_bytes(spec, request.lora_rank, request.lora_adapters, request.dtype, shard)
    draft = _draft_bytes(request, held)
    activation = peak_activation_bytes(profile, spec, request.largest_step, request.dtype, shard)
    non_torch = non_torch_bytes(profile, request.tp * request.pp)
    left = limit - weights - adapters - draft - activation - non_torch
    kv, blocks = _cache(request, held, max(left, 0))
    return MemoryBudget(
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
        kv_blocks=blocks,
    )


def check_holds_a_block(request: CompleteRequest, budget: MemoryBudget) -> None:
    """Refuse a budget in which not even one block fits.

    Raises:
        CapacityError: with the arithmetic.
    """
    if budget.kv_blocks:
        return
    block = block_bytes(request, WHOLE.stage_of(request.spec))
    other = budget.fixed - budget.weights - budget.activation
    taken = f"{gib(budget.weights)} of weights, {gib(budget.activation)} of activations"
    if other:
        taken += f", {gib(other)} of runtime overhead"
    raise CapacityError(
        f"{gib(budget.limit)} do not hold {taken} and one KV block of {request.block_size} tokens ({gib(block)}): "
        f"{gib(budget.fixed + block - budget.limit)} missing.",
        field="memory_limit_gib",
        remedy="Raise the memory limit, lower max_num_seqs or max_num_batched_tokens, or use smaller weights.",
    )


def encoder_bytes(request: CompleteRequest, stage: Stage) -> int:
    """An image encoder's weights on one GPU of the first stage, unquantized."""
    if not stage.first or request.profile.text_only:
        return 0
    return share(request.spec.encoder, request.tp) * request.dtype.bytes


def _weight_bytes(request: CompleteRequest, stage: Stage) -> int:
    shard = request.shard(stage)
    own = resident_weight_bytes(request.profile, request.spec, request.weights, request.dtype, shard)
    return own + encoder_bytes(request, stage)


def _draft_bytes(request: CompleteRequest, stage: Stage) -> int:
    """The draft model's weights, unquantized, on the stage that chooses tokens."""
    if request.draft is None or not stage.last:
        return 0
    dtype = request.dtype
    return resident_weight_bytes(request.profile, request.draft, dtype.as_weights, dtype, Shard(request.draft_tp))


def _cache(request: CompleteRequest, stage: Stage, available: int) -> tuple[int, int]:
    """(bytes, blocks) of the KV cache that fits into ``available`` bytes."""
    block = block_bytes(request, stage)
    if not block:
        return available, 0  # a stage of recurrent layers alone keeps states and no blocks
    blocks, most = available // block, most_blocks(request, stage)
    blocks = blocks if most is None else min(blocks, most)
    return blocks * block, blocks
