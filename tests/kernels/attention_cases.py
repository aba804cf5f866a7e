"""Paged attention problems of awkward shapes, and a dense oracle that shares no code with the kernels."""

from __future__ import annotations

import dataclasses

import torch

from engine.attention.base import AttentionBackend, AttentionBatch, AttentionLayer, NewTokens
from kernels.kv_formats import KV_FORMATS, dequantize, quantize
from kernels.kv_write import KVScales, kv_write_reference
from tests.kernels.empty_caches import empty_cache

# (query_lens, context_lens, window)
AWKWARD = {
    "one token": ([1], [1], None),
    "one full block": ([1], [16], None),
    "block boundary - 1": ([1], [15], None),
    "block boundary + 1": ([1], [17], None),
    "whole prompt": ([33], [33], None),
    "two prompts of equal length": ([20, 20], [20, 20], None),
    "chunk that continues a prompt": ([20], [50], None),
    "verification of 4 drafts": ([5], [40], None),
    "decodes of very different lengths": ([1, 1, 1], [1, 300, 18], None),
    "everything at once": ([1, 5, 33, 20, 1, 5, 70], [7, 40, 33, 50, 128, 5, 90], None),
    "window of one": ([1, 5], [40, 40], 1),
    "window equal to context": ([1, 8], [16, 8], 16),
    "window one short of context": ([1, 17], [17, 17], 16),
    "window ends at a block edge": ([1, 3], [48, 48], 16),
    "window starts one before a multiple of 32 and 64": ([1], [100], 37),
    "window within a chunk": ([30], [60], 7),
    "window, mixed": ([1, 5, 33, 20, 1], [7, 40, 33, 50, 128], 10),
    "fresh prompt beside a continued one of equal length": ([12, 12], [12, 30], None),
}


@dataclasses.dataclass
class Case:
    """One step: fresh queries, keys and values, a cache that holds the past, and the dense past per sequence."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    batch: AttentionBatch
    dense_keys: list[torch.Tensor]  # [context_len, num_kv_heads, head_dim] each, this step's tokens included
    dense_values: list[torch.Tensor]
    scale: float
    window: int | None
    kv_scales: KVScales | None = None


def make_case(
    query_lens: list[int],
    context_lens: list[int],
    *,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 16,
    block_size: int = 16,
    window: int | None = None,
    dtype: torch.dtype = torch.float32,
    garbage: float = 7.0,
    shuffle: bool = True,
    seed: int = 0,
) -> Case:
    """Random tensors; the blocks of a sequence lie scattered, and every slot that nobody owns holds ``garbage``."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    needed = [-(-length // block_size) for length in context_lens]
    num_blocks = sum(needed) + 3
    # Nobody owns block 0, which pads the block tables.
    ids = 1 + (torch.randperm(num_blocks - 1, generator=generator) if shuffle else torch.arange(num_blocks - 1))
    tables = torch.zeros(len(needed), max(needed), dtype=torch.int32)
    caches = [torch.full((num_blocks, block_size, num_kv_heads, head_dim), garbage, dtype=dtype) for _ in range(2)]
    dense: list[list[torch.Tensor]] = [[], []]
    fresh: list[list[torch.Tensor]] = [[], []]
    slots = []
    used = 0
    for index, (query_len, context_len) in enumerate(zip(query_lens, context_lens, strict=True)):
        blocks = ids[used : used + needed[index]]
        used += needed[index]
        tables[index, : needed[index]] = blocks
        positions = torch.arange(context_len)
        all_slots = blocks[positions // block_size] * block_size + positions % block_size
        past = context_len - query_len
        for kind in range(2):
            rows = randn(context_len, num_kv_heads, head_dim)
            caches[kind].view(-1, num_kv_heads, head_dim)[all_slots[:past]] = rows[:past]
            dense[kind].append(rows)
            fresh[kind].append(rows[past:])
        slots.append(all_slots[past:])
    starts = torch.tensor([0, *query_lens]).cumsum(0).to(torch.int32)
    batch = AttentionBatch(
        query_lens=query_lens,
        context_lens=context_lens,
        query_start=starts,
        context_lens_tensor=torch.tensor(context_lens, dtype=torch.int32),
        block_tables=tables,
        slot_mapping=torch.cat(slots),
    )
    query = randn(sum(query_lens), num_heads, head_dim)
    key, value = torch.cat(fresh[0]), torch.cat(fresh[1])
    return Case(query, key, value, *caches, batch, *dense, head_dim**-0.5, window)


def oracle(case: Case) -> torch.Tensor:
    """Dense attention in float64: the query at position p sees positions max(0, p - window + 1) … p."""
    group = case.query.shape[1] // case.key.shape[1]
    rows = []
    for index, (query_len, context_len) in enumerate(zip(case.batch.query_lens, case.batch.context_lens, strict=True)):
        keys, values = case.dense_keys[index].double(), case.dense_values[index].double()
        for position in range(context_len - query_len, context_len):
            first = 0 if case.window is None else max(0, position - case.window + 1)
            query = case.query[len(rows)].double()
            heads = []
            for head in range(query.shape[0]):
                seen = slice(first, position + 1)
                weights = (keys[seen, head // group] @ query[head] * case.scale).softmax(0)
                heads.append(weights @ values[seen, head // group])
            rows.append(torch.stack(heads))
    return torch.stack(rows)


def attend(backend: AttentionBackend, case: Case) -> torch.Tensor:
    """Run ``backend`` on the case."""
    layer = AttentionLayer(case.key_cache, case.value_cache, case.kv_scales, case.scale, case.window)
    return backend.attend(NewTokens(case.query, case.key, case.value), layer, case.batch)


def quantized(case: Case, name: str) -> Case:
    """The same step over a cache in that format: the past as it stores it, garbage in every other slot, and for the
    oracle what it will give back of past and fresh alike."""
    format, (num_blocks, block_size, *heads) = KV_FORMATS[name], case.key_cache.shape
    made = [empty_cache(format, num_blocks, block_size, *heads, case.query.dtype) for _ in range(2)]
    caches = [payload.view(torch.uint8).fill_(0x7F).view(payload.dtype) for payload, _ in made]
    scales = tuple(scale.fill_(float("nan")) for _, scale in made if scale is not None)
    batch = case.batch
    for index, (query_len, context_len) in enumerate(zip(batch.query_lens, batch.context_lens, strict=True)):
        past = torch.arange(context_len - query_len)
        slots = batch.block_tables[index].long()[past // block_size] * block_size + past % block_size
        rows = [dense[index][: len(past)] for dense in (case.dense_keys, case.dense_values)]
        kv_write_reference(*rows, *caches, slots, scales)
    dense = [[dequantize(*quantize(rows, format)) for rows in side] for side in (case.dense_keys, case.dense_values)]
    return dataclasses.replace(
        case, key_cache=caches[0], value_cache=caches[1], kv_scales=scales, dense_keys=dense[0], dense_values=dense[1]
    )
