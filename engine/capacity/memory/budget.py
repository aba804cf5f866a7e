"""How much KV cache is left once weights, activations and the rest have their memory."""

from __future__ import annotations

import dataclasses

from engine.capacity.memory.kv import kv_bytes_per_block
from engine.capacity.memory.parallel import Stage
from engine.capacity.model.spec import ModelSpec
from engine.capacity.words import gib
from engine.errors import CapacityError


@dataclasses.dataclass(frozen=True, slots=True)
class KVCacheSize:
    """Size of one GPU's KV cache: whole blocks, the tokens they hold while no window is full, and their bytes."""

    num_blocks: int
    tokens: int
    bytes: int


def size_kv_cache(
    spec: ModelSpec,
    *,
    limit_bytes: int,
    weights_bytes: int,
    activation_bytes: int,
    block_size: int,
    kv_dtype: str,
    max_blocks: int | None = None,
    other_bytes: int = 0,
    tp: int = 1,
    stage: Stage | None = None,
) -> KVCacheSize:
    """The KV cache that fits: the engine allocates it, the Plan page shows it.

    Args:
        limit_bytes: memory for everything on one GPU.
        weights_bytes, activation_bytes, other_bytes: what is taken from it first.
        block_size: tokens per block.
        kv_dtype: see :func:`engine.capacity.memory.formats.kv_format`.
        max_blocks: never more than this, None for no such bound.
        tp, stage: the GPU's share of the model.

    Raises:
        CapacityError: with the arithmetic, if not even one block fits.

    >>> from engine.capacity.model.catalog import model_spec
    >>> size_kv_cache(model_spec("Llama-3.1-8B"), limit_bytes=80 * 10**9, weights_bytes=16_060_522_496,
    ...               activation_bytes=2 * 10**9, block_size=16, kv_dtype="bf16")
    KVCacheSize(num_blocks=29535, tokens=472560, bytes=61939384320)
    """
    left = limit_bytes - weights_bytes - activation_bytes - other_bytes
    size = kv_cache_within(
        spec, left, block_size=block_size, kv_dtype=kv_dtype, max_blocks=max_blocks, tp=tp, stage=stage
    )
    if size.num_blocks < 1:
        block = kv_bytes_per_block(spec, block_size, kv_dtype, tp, stage=stage)
        raise _nothing_left(limit_bytes, weights_bytes, activation_bytes, other_bytes, block, block_size)
    return size


def kv_cache_within(
    spec: ModelSpec,
    available_bytes: int,
    *,
    block_size: int,
    kv_dtype: str,
    max_blocks: int | None = None,
    tp: int = 1,
    stage: Stage | None = None,
) -> KVCacheSize:
    """The whole blocks that fit into ``available_bytes`` of one GPU; possibly none. Arguments as above.

    >>> from engine.capacity.model.catalog import model_spec
    >>> kv_cache_within(model_spec("Llama-3.1-8B"), 2**30, block_size=16, kv_dtype="bf16").num_blocks  # 2 MiB each
    512
    """
    block = kv_bytes_per_block(spec, block_size, kv_dtype, tp, stage=stage)
    return whole_blocks(available_bytes, block, block_size, max_blocks)


def whole_blocks(available_bytes: int, block_bytes: int, block_size: int, max_blocks: int | None = None) -> KVCacheSize:
    """The blocks of ``block_bytes`` that fit; none where a block takes nothing (layers without keys and values).

    >>> whole_blocks(100, 30, 16)
    KVCacheSize(num_blocks=3, tokens=48, bytes=90)
    """
    if block_bytes == 0:
        return KVCacheSize(0, 0, 0)
    num_blocks = max(available_bytes, 0) // block_bytes
    if max_blocks is not None:
        num_blocks = min(num_blocks, max_blocks)
    return KVCacheSize(num_blocks, num_blocks * block_size, num_blocks * block_bytes)


def _nothing_left(limit: int, weights: int, activations: int, other: int, block: int, tokens: int) -> CapacityError:
    taken = f"{gib(weights)} of weights, {gib(activations)} of activations"
    if other:
        taken += f", {gib(other)} of runtime overhead"
    missing = weights + activations + other + block - limit
    return CapacityError(
        f"{gib(limit)} do not hold {taken} and one KV block of {tokens} tokens ({gib(block)}): {gib(missing)} missing.",
        field="memory_limit_gib",
        remedy="Raise the memory limit, lower max_num_seqs or max_num_batched_tokens, or use smaller weights.",
    )
