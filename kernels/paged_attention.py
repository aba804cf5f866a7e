"""Attention of ragged queries over a paged KV cache.

One signature for prefill, chunked prefill, decode and verification of drafts: they differ only in how many of a
sequence's positions are queries now. ``kernels/README.md`` has the diagram of the block table, of a program's tile and
of the chunks that a long context is cut into.
"""

# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# (the parameters of a Triton kernel are pointers and scalars of the launch: there is no Python type to write)

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator

import torch

from kernels.device import capability
from kernels.kv_formats import KV_FORMATS, dequantize, format_of
from kernels.kv_write import KVScales
from kernels.language import tl, triton
from kernels.soft_cap import capped
from kernels.tuning import select
from kernels.variant import TYPE_NAMES, Variant, pointers

LOG2_E = math.log2(math.e)
CHUNK = 1024  # KV positions that a program of a split context takes at a time: fixed, so that sums do not depend on …
SPLIT_PROGRAMS = 528  # … how many programs share a context; about four for each multiprocessor of a large GPU


def paged_attention_reference(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    window: int | None = None,
    *,
    soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
    scales: KVScales | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain softmax attention in float32, one sequence after another: slow, and the truth the others are held to.

    Args:
        query: [T, num_heads, head_dim]; query head h reads KV head ``h // (num_heads / num_kv_heads)``.
        key_cache, value_cache: [num_blocks, block_size, num_kv_heads, head_dim] in a format of
            :mod:`kernels.kv_formats`. Slots behind a sequence's context may hold anything, NaN included.
        block_tables: int [B, max_blocks], block ids in order; entries behind the context are not read.
        query_start: int [B + 1], rows ``query_start[i]:query_start[i + 1]`` belong to sequence i.
        context_lens: int [B], KV length including the queries' own positions.
        scale: factor on the scores.
        window: a query sees at most this many positions, itself included; None for all.
        soft_cap: scores are bounded smoothly to this (Gemma 2, section 2); None for no bound.
        sinks: float32 [num_heads], a score besides those of the keys that takes its share of the softmax and gives
            nothing (GPT-OSS; Xiao et al. 2023); None for none.
        scales: of a quantized cache.

    Returns:
        [T, num_heads, head_dim] in the dtype of ``query``, and the natural logarithm of each softmax's denominator,
        float32 [T, num_heads], sinks included.
    """
    block_size = key_cache.shape[1]
    group = query.shape[1] // key_cache.shape[2]
    output = torch.empty_like(query)
    lse = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)
    starts = query_start.tolist()
    for index, context_len in enumerate(context_lens.tolist()):
        rows = slice(starts[index], starts[index + 1])
        blocks = block_tables[index, : -(-context_len // block_size)].long()
        keys, values = (
            gathered_rows(cache, None if scales is None else scales[side], blocks, context_len, group)
            for side, cache in enumerate((key_cache, value_cache))
        )
        scores = query[rows].float().transpose(0, 1) @ keys.transpose(1, 2) * scale
        if soft_cap is not None:
            scores = torch.tanh(scores / soft_cap) * soft_cap
        scores.masked_fill_(~visible_positions(rows.stop - rows.start, context_len, window, query.device), -torch.inf)
        denominators = scores.logsumexp(dim=-1)  # [num_heads, rows]
        if sinks is not None:
            denominators = torch.logaddexp(denominators, sinks[:, None].float())
        output[rows] = ((scores - denominators[..., None]).exp() @ values).transpose(0, 1).to(query.dtype)
        lse[rows] = denominators.t()
    return output, lse


def gathered_rows(
    cache: torch.Tensor, scales: torch.Tensor | None, blocks: torch.Tensor, context_len: int, group: int
) -> torch.Tensor:
    """[num_heads, S, head_dim] float32 of one sequence, each KV head repeated for the query heads that share it."""
    rows = cache.view(torch.uint8)[blocks].view(cache.dtype) if cache.dtype.itemsize == 1 else cache[blocks]
    rows = dequantize(rows, None if scales is None else scales[blocks])
    return rows.flatten(0, 1)[:context_len].repeat_interleave(group, dim=1).transpose(0, 1)


def visible_positions(query_len: int, context_len: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Bool [query_len, context_len]: causal, aligned to the bottom right, at most ``window`` positions wide."""
    query_position = torch.arange(context_len - query_len, context_len, device=device)[:, None]
    distance = query_position - torch.arange(context_len, device=device)
    visible = distance >= 0
    return visible if window is None else visible & (distance < window)


# -- configurations ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class PagedAttentionConfig:
    """Tile sizes and launch parameters of the Triton kernel.

    Attributes:
        block_m: rows of a program's tile: ``block_m // g`` queries × the g query heads of one KV head.
        block_n: KV positions a step of the loop reads.
        num_warps, num_stages: as Triton means them; a tile's keys are addressed by what the block table says: Triton
            gives that load stages of its own: 3 and 4 keep one tile of keys and values on its way, 5 keep two.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


CONFIGS = {
    "decode 16x64": PagedAttentionConfig(16, 64, 4, 5),
    "decode 16x64, shallow": PagedAttentionConfig(16, 64, 4, 3),
    "decode 16x128": PagedAttentionConfig(16, 128, 4, 2),
    "decode 16x32": PagedAttentionConfig(16, 32, 4, 5),
    "decode 16x16, 8 warps": PagedAttentionConfig(16, 16, 8, 2),
    "prefill 64x64": PagedAttentionConfig(64, 64, 4, 2),
    "prefill 64x32": PagedAttentionConfig(64, 32, 8, 2),
    "prefill 64x64, 8 warps": PagedAttentionConfig(64, 64, 8, 2),
    "prefill 128x32": PagedAttentionConfig(128, 32, 8, 2),
    "prefill 128x64": PagedAttentionConfig(128, 64, 8, 2),
}


def default_config(decode: bool, head_dim: int, dtype: torch.dtype, quantized: bool, capability: int) -> str:
    """The rule for shapes that nobody has measured: occupancy, nothing spills, and it fits an L4's shared memory.

    Args:
        quantized: the cache is.
        capability: of the GPU, e.g. 90.
    """
    wide = head_dim > 128 or dtype == torch.float32
    if decode:  # bound by reading the cache: a small tile is enough, and a second one on its way
        if dtype == torch.float32:  # no matrix unit: its products live in registers
            return "decode 16x16, 8 warps"
        return "decode 16x32" if wide else "decode 16x64"
    if wide:
        return "prefill 64x32"
    if head_dim <= 64:
        return "prefill 64x64" if capability < 100 else "prefill 64x64, 8 warps"
    if 90 <= capability < (100 if quantized else 999):
        return "prefill 128x64"
    return "prefill 64x64, 8 warps" if quantized else "prefill 128x32"


def _key(decode: bool, group_size: int, head_dim: int, dtype: torch.dtype, format: str) -> tuple[int | str, ...]:
    return "decode" if decode else "prefill", head_dim, group_size, TYPE_NAMES[dtype], format


def _pick(
    decode: bool, group_size: int, head_dim: int, query: torch.Tensor, format: str, name: str | None
) -> PagedAttentionConfig:
    if name is None:
        rule = default_config(decode, head_dim, query.dtype, format != "model", _capability(query.device))
        key = _key(decode, group_size, head_dim, query.dtype, format)
        name = select("paged_attention", key, rule, query.device)
    config = CONFIGS[name]
    return dataclasses.replace(config, block_m=max(config.block_m, triton.next_power_of_2(group_size)))


@functools.cache
def _capability(device: torch.device) -> int:
    """90 for compute capability 9.0; that of a Hopper for the interpreter."""
    major, minor = capability(device) if device.type == "cuda" else (9, 0)
    return 10 * major + minor


def _num_splits(num_programs: int, table_tokens: int) -> int:
    """How many programs share the context of one sequence and KV head, from shapes alone."""
    chunks: int = triton.cdiv(table_tokens, CHUNK)
    return max(1, min(chunks, SPLIT_PROGRAMS // max(num_programs, 1)))


# -- the launch -------------------------------------------------------------------------------------------------------


def paged_attention_triton(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    window: int | None = None,
    *,
    soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
    scales: KVScales | None = None,
    num_splits: int | None = None,
    config: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`paged_attention_reference`, without ever making the score matrix.

    One design for ragged batches of any mix, after vLLM's unified attention (Ringlein et al. 2025): a program owns a
    few consecutive queries of one sequence together with all the query heads that share a KV head, so that even a
    decode fills a tile of the matrix units, and walks the block table with an online softmax (Milakov & Gimelshein
    2018; Dao et al. 2022).

    Where every sequence decodes, its context is cut into chunks of :data:`CHUNK` positions, each with a softmax of its
    own, which are joined in order (flash-decoding, Dao et al. 2023). Few sequences are shared by several programs,
    many are not; as the chunks are the same, so are the operations of the result, whatever else is in the batch.

    Args:
        As the reference's; innermost dimensions contiguous, head_dim at most 256, bfloat16, float16 or float32.
        num_splits: programs that share a context; None for what the shapes suggest. Only where all sequences decode.
        config: a name in :data:`CONFIGS`; None for what was measured, or the rule's.

    Raises:
        ValueError: naming the argument whose layout does not fit.
    """
    _check(query, key_cache, value_cache, block_tables, sinks, scales)
    num_tokens, num_heads, head_dim = query.shape
    block_size, num_kv_heads = key_cache.shape[1:3]
    launch = _plan_launch(query, key_cache, block_tables, context_lens.shape[0], num_splits, config)
    tiles, chunks = launch.config, launch.chunks
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty((num_tokens, num_heads), dtype=torch.float32, device=query.device)
    partial, state = _empty_states(query, launch)
    key_scales, value_scales = scales or (state, state)  # without any, never read
    _paged_attention_kernel[launch.grid](
        output, lse, partial, state, query, key_cache, value_cache, key_scales, value_scales,
        lse if sinks is None else sinks, block_tables, query_start, context_lens, scale, soft_cap or 0.0, window or 0,
        context_lens.shape[0], chunks, block_tables.stride(0), *query.stride()[:2], *key_cache.stride()[:3],
        *value_cache.stride()[:3],
        DECODE=launch.decode, SPLIT=chunks > 1, HAS_WINDOW=window is not None, HAS_SOFT_CAP=soft_cap is not None,
        HAS_SINKS=sinks is not None, FORMAT=format_of(key_cache).number, HEAD_DIM=head_dim,
        GROUP_SIZE=num_heads // num_kv_heads, BLOCK_SIZE=block_size, CHUNK_N=CHUNK, BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n, BLOCK_D=launch.block_d,
        # The interpreter multiplies bfloat16 wrongly (Triton 3.7): compute in float32 there.
        DOT_IN_FLOAT32=query.device.type == "cpu", num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    if chunks > 1:
        _merge(output, lse, partial, state, sinks, context_lens, window)
    return output, lse


@dataclasses.dataclass(frozen=True, slots=True)
class _Launch:
    """How a batch is divided among programs.

    Attributes:
        config: tile sizes.
        decode: every sequence has one query.
        grid: blocks of queries, KV heads, programs that share a context.
        chunks: states that each row keeps in memory; 1 where no context is shared.
        block_d: head_dim padded to a power of two.
    """

    config: PagedAttentionConfig
    decode: bool
    grid: tuple[int, int, int]
    chunks: int
    block_d: int


def _plan_launch(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    block_tables: torch.Tensor,
    num_seqs: int,
    num_splits: int | None,
    config: str | None,
) -> _Launch:
    num_tokens, num_heads, head_dim = query.shape
    block_size, num_kv_heads = key_cache.shape[1:3]
    decode = num_tokens == num_seqs
    group_size = num_heads // num_kv_heads
    chosen = _pick(decode, group_size, head_dim, query, format_of(key_cache).name, config)
    table_tokens = block_tables.shape[1] * block_size
    splits = num_splits or (_num_splits(num_seqs * num_kv_heads, table_tokens) if decode else 1)
    chunks = triton.cdiv(table_tokens, CHUNK) if decode and splits > 1 else 1
    # Each sequence wastes at most one block of queries: an upper bound of the blocks that needs no device sync.
    blocks = num_seqs if decode else num_tokens // (chosen.block_m // group_size) + num_seqs
    block_d = max(16, triton.next_power_of_2(head_dim))
    return _Launch(chosen, decode, (blocks, num_kv_heads, splits), chunks, block_d)


def _empty_states(query: torch.Tensor, launch: _Launch) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for one state a chunk: the weighted values, and its softmax's maximum and sum."""
    rows = (*query.shape[:2], launch.chunks)
    values = torch.empty((*rows, launch.block_d), dtype=torch.float32, device=query.device)
    return values, torch.empty((*rows, 2), dtype=torch.float32, device=query.device)


def _merge(
    output: torch.Tensor,
    lse: torch.Tensor,
    partial: torch.Tensor,
    state: torch.Tensor,
    sinks: torch.Tensor | None,
    context_lens: torch.Tensor,
    window: int | None,
) -> None:
    """Join the chunks' states into ``output`` and ``lse``; all sequences decode."""
    num_tokens, num_heads, head_dim = output.shape
    _merge_kernel[(num_tokens, num_heads)](
        output,
        lse,
        partial,
        state,
        lse if sinks is None else sinks,
        context_lens,
        window or 0,
        partial.shape[2],
        HAS_WINDOW=window is not None,
        HAS_SINKS=sinks is not None,
        HEAD_DIM=head_dim,
        CHUNK_N=CHUNK,
        BLOCK_D=partial.shape[3],
        num_warps=2,
    )


def _check(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    sinks: torch.Tensor | None,
    scales: KVScales | None,
) -> None:
    named = {"query": query, "key_cache": key_cache, "value_cache": value_cache, "block_tables": block_tables}
    for name, tensor in named.items():
        if tensor.stride(-1) != 1:
            raise ValueError(f"{name} must be contiguous in its last dimension")
    format = format_of(key_cache)
    if format is not format_of(value_cache):
        raise ValueError("key_cache and value_cache must have the same format")
    if (scales is not None) != bool(format.num_scales):
        raise ValueError(f"scales {'are needed' if format.num_scales else 'mean nothing'} for a cache in {format.name}")
    if sinks is not None and (sinks.dtype != torch.float32 or sinks.shape != (query.shape[1],)):
        raise ValueError(f"sinks must be float32 [{query.shape[1]}], not {list(sinks.shape)}")


# -- pieces of the kernel ---------------------------------------------------------------------------------------------


@triton.jit
def find_sequence(query_start_ptr, query_block, num_seqs, BLOCK_Q: tl.constexpr):
    """Largest i with ``query_start[i] // BLOCK_Q + i <= query_block``, the sequence that owns a block of queries."""
    low = 0
    high = num_seqs
    while low < high:
        middle = (low + high) // 2
        if tl.load(query_start_ptr + middle) // BLOCK_Q + middle <= query_block:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit
def _tile(query_start_ptr, num_seqs, BLOCK_Q: tl.constexpr, DECODE: tl.constexpr):
    """(sequence, its first row, how many it has, the first of them in this program's tile)."""
    if DECODE:
        sequence = tl.program_id(0)
        first_query = 0
    else:
        sequence = find_sequence(query_start_ptr, tl.program_id(0), num_seqs, BLOCK_Q)
        first_query = (tl.program_id(0) - (tl.load(query_start_ptr + sequence) // BLOCK_Q + sequence)) * BLOCK_Q
    query_begin = tl.load(query_start_ptr + sequence)
    return sequence, query_begin, tl.load(query_start_ptr + sequence + 1) - query_begin, first_query


@triton.jit
def load_queries(
    query_ptr,
    token,  # int64 [M]
    head,  # [M]
    inside,  # [M]
    stride_token,
    stride_head,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DOT_IN_FLOAT32: tl.constexpr,
):
    """Queries of M rows [M, BLOCK_D], zero where there is none, and their sums over the dimensions, float32 [M]."""
    dim = tl.arange(0, BLOCK_D)
    source = query_ptr + (token * stride_token + head * stride_head)[:, None] + dim[None, :]
    query = tl.load(source, mask=inside[:, None] & (dim < HEAD_DIM)[None, :], other=0.0)
    if DOT_IN_FLOAT32:
        query = query.to(tl.float32)
    return query, tl.sum(query.to(tl.float32), axis=1)


@triton.jit
def _store_state(partial_ptr, state_ptr, place, row_max, row_sum, accumulator, row_inside, BLOCK_D: tl.constexpr):
    """Leave a chunk's softmax at ``place`` [M] for the second kernel."""
    target = partial_ptr + place[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    tl.store(target, accumulator, mask=row_inside[:, None])
    tl.store(state_ptr + place * 2, row_max, mask=row_inside)
    tl.store(state_ptr + place * 2 + 1, row_sum, mask=row_inside)


@triton.jit
def load_rows(
    cache_ptr,
    offset,  # int64 [N], of each position's head in payload elements
    inside,  # [N]
    FORMAT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Payload of N positions [N, BLOCK_D], in the cache's own type, or as small whole numbers of INT4."""
    # Slots behind the context are not read: whatever they hold, NaN included, must not meet a zero weight.
    if FORMAT == 3:
        byte = tl.arange(0, BLOCK_D // 2)
        mask = inside[:, None] & (byte < HEAD_DIM // 2)[None, :]
        packed = tl.load(cache_ptr + offset[:, None] + byte[None, :], mask=mask, other=0)
        return tl.interleave(packed & 15, packed >> 4)
    dim = tl.arange(0, BLOCK_D)
    mask = inside[:, None] & (dim < HEAD_DIM)[None, :]
    return tl.load(cache_ptr + offset[:, None] + dim[None, :], mask=mask, other=0.0)


@triton.jit
def key_scores(
    query,  # [M, D]
    query_sum,  # [M], over the dimensions
    key,  # [N, D], as load_rows gives it
    scales_ptr,
    scale_row,  # int64 [N], of each position's head among the scales
    inside,  # [N]
    scale,
    soft_cap,
    HAS_SOFT_CAP: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """Scores [M, N] in units of log2(e), float32: a quantized key's scale is applied to its column."""
    # "ieee": float32 models must not be rounded to TF32; of no effect on 16-bit types.
    scores = tl.dot(query, tl.trans(key.to(query.dtype)), input_precision="ieee")
    if FORMAT == 1 or FORMAT == 2:
        column = tl.load(scales_ptr + scale_row, mask=inside, other=0.0).to(tl.float32)
        scores = scores * column[None, :]
    if FORMAT == 3:  # q · (s k + m) = s (q · k) + m Σq
        column = tl.load(scales_ptr + scale_row * 2, mask=inside, other=0.0).to(tl.float32)
        minimum = tl.load(scales_ptr + scale_row * 2 + 1, mask=inside, other=0.0).to(tl.float32)
        scores = scores * column[None, :] + query_sum[:, None] * minimum[None, :]
    if HAS_SOFT_CAP:
        return capped(scores * scale, soft_cap) * 1.4426950408889634
    return scores * (scale * 1.4426950408889634)


@triton.jit
def weighted_values(
    weights,  # float32 [M, N]
    value,  # [N, D], as load_rows gives it
    accumulator,  # float32 [M, D]
    scales_ptr,
    scale_row,
    inside,
    FORMAT: tl.constexpr,
    DOT_IN_FLOAT32: tl.constexpr,
    COMPUTE: tl.constexpr,  # the query's type
):
    """``accumulator`` + weights · values; a quantized value's scale is folded into its column of the weights."""
    if FORMAT == 1 or FORMAT == 2:
        weights = weights * tl.load(scales_ptr + scale_row, mask=inside, other=0.0).to(tl.float32)[None, :]
    if FORMAT == 3:  # Σ w (s v + m) = (w s) · v + Σ w m
        minimum = tl.load(scales_ptr + scale_row * 2 + 1, mask=inside, other=0.0).to(tl.float32)
        accumulator += tl.sum(weights * minimum[None, :], axis=1)[:, None]
        weights = weights * tl.load(scales_ptr + scale_row * 2, mask=inside, other=0.0).to(tl.float32)[None, :]
    compute: tl.constexpr = tl.float32 if DOT_IN_FLOAT32 else COMPUTE
    return tl.dot(weights.to(compute), value.to(compute), accumulator, input_precision="ieee")


@triton.jit
def slots_of(table_ptr, columns, inside, start, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """(block, offset in it) of consecutive positions; one load where a tile lies within one block."""
    # A cache holds more than 2^31 elements: offsets in 64 bits.
    if BLOCK_SIZE % BLOCK_N == 0:
        first = tl.load(table_ptr + start // BLOCK_SIZE, mask=tl.max(inside.to(tl.int32), axis=0) > 0, other=0)
        block = first.to(tl.int64) + tl.zeros_like(columns).to(tl.int64)
    else:
        block = tl.load(table_ptr + columns // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
    return block, columns % BLOCK_SIZE


@triton.jit
def _fold(row_max, row_sum, accumulator, scores):
    """A step of the online softmax: the state scaled to its new maximum, and the weights of the new columns."""
    new_max = tl.maximum(row_max, tl.max(scores, axis=1))
    # A row that has seen nothing yet (window) would give inf - inf.
    safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
    weights = tl.exp2(scores - safe_max[:, None])
    correction = tl.exp2(row_max - safe_max)
    return new_max, row_sum * correction + tl.sum(weights, axis=1), accumulator * correction[:, None], weights


@triton.jit
def _join(row_max, row_sum, accumulator, other_max, other_sum, other_accumulator):
    """Two softmax states of the same rows as one. ``accumulator`` is [M, D]."""
    new_max = tl.maximum(row_max, other_max)
    safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
    left, right = tl.exp2(row_max - safe_max), tl.exp2(other_max - safe_max)
    joined = accumulator * left[:, None] + other_accumulator * right[:, None]
    return new_max, row_sum * left + other_sum * right, joined


@triton.jit
def _finish(row_max, row_sum, accumulator, sink, HAS_SINKS: tl.constexpr):
    """The attended values of rows [M, D] and the natural logarithm of their denominators [M]."""
    if HAS_SINKS:
        sink = sink * 1.4426950408889634
        new_max = tl.maximum(row_max, sink)
        correction = tl.exp2(row_max - new_max)
        row_sum = row_sum * correction + tl.exp2(sink - new_max)
        accumulator = accumulator * correction[:, None]
        row_max = new_max
    denominator = tl.where(row_sum == 0.0, 1.0, row_sum)
    return accumulator / denominator[:, None], (row_max + tl.log2(denominator)) * 0.6931471805599453


@triton.jit
def _store_rows(output_ptr, lse_ptr, row, attended, lse, inside, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Attended values [M, BLOCK_D] and log-sum-exps [M] to the rows [M] of the output, in its type."""
    dim = tl.arange(0, BLOCK_D)
    target = output_ptr + row[:, None] * HEAD_DIM + dim[None, :]
    tl.store(target, attended.to(output_ptr.dtype.element_ty), mask=inside[:, None] & (dim < HEAD_DIM)[None, :])
    tl.store(lse_ptr + row, lse, mask=inside)


@triton.jit
def _walk(
    row_max,  # [M], the softmax's state
    row_sum,
    accumulator,  # [M, D]
    begin,  # KV positions [begin, end), begin a multiple of BLOCK_N
    end,
    query,  # [M, D]
    query_sum,
    row_position,  # [M]
    cache,  # pointers and strides, see the kernel
    table_ptr,
    kv_head,
    num_kv_heads,
    scale,
    soft_cap,
    window,
    MASKED: tl.constexpr,  # else every row sees every position
    HAS_WINDOW: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    FORMAT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DOT_IN_FLOAT32: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """The state after the positions [begin, end)."""
    key_ptr, value_ptr, key_scales_ptr, value_scales_ptr = cache[0], cache[1], cache[2], cache[3]
    for start in range(begin, end, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        inside = columns < end
        block, slot = slots_of(table_ptr, columns, inside, start, BLOCK_SIZE, BLOCK_N)
        scale_row = (block * BLOCK_SIZE + slot) * num_kv_heads + kv_head
        offset = block * cache[4] + slot * cache[5] + kv_head * cache[6]
        key = load_rows(key_ptr, offset, inside, FORMAT, HEAD_DIM, BLOCK_N, BLOCK_D)
        scores = key_scores(
            query, query_sum, key, key_scales_ptr, scale_row, inside, scale, soft_cap, HAS_SOFT_CAP, FORMAT
        )
        if MASKED:
            visible = columns[None, :] <= row_position[:, None]
            if HAS_WINDOW:
                visible = visible & (row_position[:, None] - columns[None, :] < window)
            scores = tl.where(visible & inside[None, :], scores, float("-inf"))
        offset = block * cache[7] + slot * cache[8] + kv_head * cache[9]
        value = load_rows(value_ptr, offset, inside, FORMAT, HEAD_DIM, BLOCK_N, BLOCK_D)
        row_max, row_sum, accumulator, weights = _fold(row_max, row_sum, accumulator, scores)
        accumulator = weighted_values(
            weights, value, accumulator, value_scales_ptr, scale_row, inside, FORMAT, DOT_IN_FLOAT32, COMPUTE
        )
    return row_max, row_sum, accumulator


@triton.jit
def _walk_causally(
    begin,
    end,
    first_position,  # of the tile's first query: all rows see what is not behind it
    query,
    query_sum,
    row_position,
    cache,
    table_ptr,
    kv_head,
    num_kv_heads,
    scale,
    soft_cap,
    window,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    FORMAT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DOT_IN_FLOAT32: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """A softmax of its own over [begin, end): without masks as far as every row sees all, with them at the edge."""
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    accumulator = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    middle = begin
    if not HAS_WINDOW:
        middle = begin + tl.maximum(tl.minimum(first_position + 1, end) - begin, 0) // BLOCK_N * BLOCK_N
        row_max, row_sum, accumulator = _walk(
            row_max, row_sum, accumulator, begin, middle, query, query_sum, row_position, cache, table_ptr, kv_head,
            num_kv_heads, scale, soft_cap, window, False, False, HAS_SOFT_CAP, FORMAT, HEAD_DIM, BLOCK_SIZE, BLOCK_N,
            BLOCK_D, DOT_IN_FLOAT32, COMPUTE,
        )  # fmt: skip
    return _walk(
        row_max, row_sum, accumulator, middle, end, query, query_sum, row_position, cache, table_ptr, kv_head,
        num_kv_heads, scale, soft_cap, window, True, HAS_WINDOW, HAS_SOFT_CAP, FORMAT, HEAD_DIM, BLOCK_SIZE, BLOCK_N,
        BLOCK_D, DOT_IN_FLOAT32, COMPUTE,
    )  # fmt: skip


# -- the kernels ------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["num_seqs", "chunks", "table_stride"])
def _paged_attention_kernel(
    output_ptr,  # [T, num_heads, HEAD_DIM], contiguous
    lse_ptr,  # float32 [T, num_heads]
    partial_ptr,  # float32 [T, num_heads, chunks, BLOCK_D]
    state_ptr,  # float32 [T, num_heads, chunks, 2]: maximum and sum
    query_ptr,  # [T, num_heads, HEAD_DIM]
    key_cache_ptr,  # [num_blocks, BLOCK_SIZE, num_kv_heads, HEAD_DIM], packed where the format packs
    value_cache_ptr,
    key_scales_ptr,  # float16 [num_blocks, BLOCK_SIZE, num_kv_heads, 1 or 2]
    value_scales_ptr,
    sinks_ptr,  # float32 [num_heads]
    block_tables_ptr,  # int [B, max_blocks]
    query_start_ptr,  # int [B + 1]
    context_lens_ptr,  # int [B]
    scale,
    soft_cap,
    window,
    num_seqs,
    chunks,
    table_stride,
    query_stride_token,
    query_stride_head,
    key_stride_block,
    key_stride_slot,
    key_stride_head,
    value_stride_block,
    value_stride_slot,
    value_stride_head,
    DECODE: tl.constexpr,  # every sequence has one query
    SPLIT: tl.constexpr,  # several programs share a context: states go to memory
    HAS_WINDOW: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    FORMAT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    GROUP_SIZE: tl.constexpr,  # g, query heads that share a KV head
    BLOCK_SIZE: tl.constexpr,  # tokens in a block of the cache
    CHUNK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,  # HEAD_DIM padded to a power of two
    DOT_IN_FLOAT32: tl.constexpr,
):
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP_SIZE
    kv_head, num_kv_heads = tl.program_id(1), tl.num_programs(1)
    sequence, query_begin, query_len, first_query = _tile(query_start_ptr, num_seqs, BLOCK_Q, DECODE)
    if first_query >= query_len:
        return
    past = tl.load(context_lens_ptr + sequence) - query_len

    # Row r of the tile: query r // g of this block, query head r % g of this KV head.
    rows = tl.arange(0, BLOCK_M)
    row_query = first_query + rows // GROUP_SIZE
    row_head = kv_head * GROUP_SIZE + rows % GROUP_SIZE
    row_inside = (rows < BLOCK_Q * GROUP_SIZE) & (row_query < query_len)
    row_token = (query_begin + row_query).to(tl.int64)
    query, query_sum = load_queries(
        query_ptr, row_token, row_head, row_inside, query_stride_token, query_stride_head, HEAD_DIM, BLOCK_D,
        DOT_IN_FLOAT32,
    )  # fmt: skip
    cache = (
        key_cache_ptr, value_cache_ptr, key_scales_ptr, value_scales_ptr, key_stride_block, key_stride_slot,
        key_stride_head, value_stride_block, value_stride_slot, value_stride_head,
    )  # fmt: skip
    table_ptr = block_tables_ptr + sequence.to(tl.int64) * table_stride
    # KV positions that any row of the tile can see.
    kv_stop = past + tl.minimum(first_query + BLOCK_Q, query_len)
    kv_start = 0
    if HAS_WINDOW:
        kv_start = tl.maximum(past + first_query - window + 1, 0) // BLOCK_N * BLOCK_N

    row_out = row_token * (num_kv_heads * GROUP_SIZE) + row_head
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    accumulator = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if not DECODE:  # the range at once: its tiles are many, and a second accumulator of 128 rows would spill
        row_max, row_sum, accumulator = _walk_causally(
            kv_start, kv_stop, past + first_query, query, query_sum, past + row_query, cache, table_ptr, kv_head,
            num_kv_heads, scale, soft_cap, window, HAS_WINDOW, HAS_SOFT_CAP, FORMAT, HEAD_DIM, BLOCK_SIZE, BLOCK_M,
            BLOCK_N, BLOCK_D, DOT_IN_FLOAT32, query_ptr.dtype.element_ty,
        )  # fmt: skip
    else:
        first_chunk = kv_start // CHUNK_N + tl.program_id(2)
        for chunk in range(first_chunk, tl.cdiv(kv_stop, CHUNK_N), tl.num_programs(2)):
            begin, end = tl.maximum(chunk * CHUNK_N, kv_start), tl.minimum((chunk + 1) * CHUNK_N, kv_stop)
            chunk_max, chunk_sum, chunk_accumulator = _walk_causally(
                begin, end, past, query, query_sum, past + row_query, cache, table_ptr, kv_head, num_kv_heads, scale,
                soft_cap, window, HAS_WINDOW, HAS_SOFT_CAP, FORMAT, HEAD_DIM, BLOCK_SIZE, BLOCK_M, BLOCK_N, BLOCK_D,
                DOT_IN_FLOAT32, query_ptr.dtype.element_ty,
            )  # fmt: skip
            if SPLIT:
                place = row_out * chunks + chunk
                _store_state(
                    partial_ptr, state_ptr, place, chunk_max, chunk_sum, chunk_accumulator, row_inside, BLOCK_D
                )
            else:
                row_max, row_sum, accumulator = _join(
                    row_max, row_sum, accumulator, chunk_max, chunk_sum, chunk_accumulator
                )
    if not SPLIT:
        sink = tl.load(sinks_ptr + row_head) if HAS_SINKS else row_max
        attended, lse = _finish(row_max, row_sum, accumulator, sink, HAS_SINKS)
        _store_rows(output_ptr, lse_ptr, row_out, attended, lse, row_inside, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=["chunks"])
def _merge_kernel(
    output_ptr,
    lse_ptr,
    partial_ptr,
    state_ptr,
    sinks_ptr,
    context_lens_ptr,
    window,
    chunks,
    HAS_WINDOW: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHUNK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Join the chunks of one decoding sequence and head, in order."""
    sequence, head = tl.program_id(0), tl.program_id(1)
    row = sequence.to(tl.int64) * tl.num_programs(1) + head
    context_len = tl.load(context_lens_ptr + sequence)
    first = 0
    if HAS_WINDOW:
        first = tl.maximum(context_len - window, 0) // CHUNK_N
    dim = tl.arange(0, BLOCK_D)
    one = tl.arange(0, 1)
    row_max = tl.full([1], float("-inf"), tl.float32)
    row_sum = tl.zeros([1], tl.float32)
    accumulator = tl.zeros([1, BLOCK_D], tl.float32)
    for chunk in range(first, tl.cdiv(context_len, CHUNK_N)):
        place = row * chunks + chunk + one
        other = tl.load(partial_ptr + place[:, None] * BLOCK_D + dim[None, :])
        other_max, other_sum = tl.load(state_ptr + place * 2), tl.load(state_ptr + place * 2 + 1)
        row_max, row_sum, accumulator = _join(row_max, row_sum, accumulator, other_max, other_sum, other)
    sink = tl.load(sinks_ptr + head + one) if HAS_SINKS else row_max
    attended, lse = _finish(row_max, row_sum, accumulator, sink, HAS_SINKS)
    _store_rows(output_ptr, lse_ptr, row + one, attended, lse, one == 0, HEAD_DIM, BLOCK_D)


# -- for the tuner and ahead of time ----------------------------------------------------------------------------------


def tuning_problems(device: torch.device) -> Iterator[tuple[tuple[int | str, ...], dict[str, Callable[[], object]]]]:
    """32 sequences that decode at context 4096, and a prompt of 4096, with the heads of Llama-3.1-8B."""
    dtype, heads, kv_heads, head_dim, context, block = torch.bfloat16, 32, 8, 128, 4096, 16
    for num_seqs, query_len in ((32, 1), (1, context)):
        blocks = context // block
        caches = torch.randn(2, num_seqs * blocks, block, kv_heads, head_dim, device=device).to(dtype)
        tables = torch.arange(num_seqs * blocks, dtype=torch.int32, device=device).view(num_seqs, blocks)
        starts = torch.arange(0, num_seqs * query_len + 1, query_len, dtype=torch.int32, device=device)
        lengths = torch.full((num_seqs,), context, dtype=torch.int32, device=device)
        query = torch.randn(num_seqs * query_len, heads, head_dim, device=device).to(dtype)
        arguments = (query, caches[0], caches[1], tables, starts, lengths, head_dim**-0.5)
        way = "decode" if query_len == 1 else "prefill"
        names = [name for name in CONFIGS if name.startswith(way)]
        key = _key(query_len == 1, heads // kv_heads, head_dim, dtype, "model")
        yield key, {name: functools.partial(paged_attention_triton, *arguments, config=name) for name in names}


def aot_variants() -> list[Variant]:
    """Every configuration, 16-bit and float32, narrow and wide heads, every cache format, and what models add."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    return [
        _variant(bf16, 128, 4, "decode 16x64"),
        _variant(bf16, 128, 4, "decode 16x64", split=True),
        _variant(bf16, 128, 4, "decode 16x128", split=True),
        _variant(bf16, 128, 4, "decode 16x64, shallow"),
        _variant(bf16, 256, 8, "decode 16x32"),
        _variant(fp32, 64, 3, "decode 16x16, 8 warps"),
        _variant(fp32, 256, 8, "decode 16x16, 8 warps"),
        _variant(fp16, 80, 1, "decode 16x64", window=True),
        _variant(bf16, 128, 4, "decode 16x64", format="fp8"),
        _variant(bf16, 128, 4, "decode 16x64", format="int8"),
        _variant(bf16, 128, 4, "decode 16x64", format="int4"),
        _variant(bf16, 128, 4, "prefill 128x64", targets=(90, 999)),
        _variant(bf16, 128, 4, "prefill 128x64", format="fp8", targets=(90, 90)),
        _variant(bf16, 128, 4, "prefill 128x64", format="int8", targets=(90, 90)),
        _variant(bf16, 128, 4, "prefill 128x64", format="int4", targets=(90, 90)),
        _variant(bf16, 128, 4, "prefill 128x32"),
        _variant(bf16, 128, 4, "prefill 64x64, 8 warps", format="int8"),
        _variant(bf16, 128, 4, "prefill 64x64, 8 warps", format="int4"),
        _variant(bf16, 64, 8, "prefill 64x64, 8 warps", window=True, sinks=True),
        _variant(fp16, 64, 3, "prefill 64x64", window=True, targets=(80, 90)),
        _variant(bf16, 256, 8, "prefill 64x32", soft_cap=True),
        _variant(fp32, 64, 3, "prefill 64x32"),
        _merge_variant(),
    ]


def _variant(
    dtype: torch.dtype,
    head_dim: int,
    group_size: int,
    name: str,
    *,
    format: str = "model",
    split: bool = False,
    window: bool = False,
    soft_cap: bool = False,
    sinks: bool = False,
    targets: tuple[int, int] = (80, 999),
) -> Variant:
    config, kv, fp32 = CONFIGS[name], KV_FORMATS[format], torch.float32
    types = {
        **pointers(dtype, "output_ptr", "query_ptr"),
        **pointers(fp32, "lse_ptr", "partial_ptr", "state_ptr", "sinks_ptr"),
        **pointers(kv.dtype or dtype, "key_cache_ptr", "value_cache_ptr"),
        **pointers(torch.float16, "key_scales_ptr", "value_scales_ptr"),
        **pointers(torch.int32, "block_tables_ptr", "query_start_ptr", "context_lens_ptr"),
        **dict.fromkeys(("scale", "soft_cap"), "fp32"),
        **dict.fromkeys(("window", "num_seqs", "chunks", "table_stride"), "i32"),
        **{f"query_stride_{axis}": "i32" for axis in ("token", "head")},
        **{f"{side}_stride_{axis}": "i32" for side in ("key", "value") for axis in ("block", "slot", "head")},
    }
    constants: dict[str, int | bool | float | None] = {
        "DECODE": name.startswith("decode"),
        "SPLIT": split,
        "HAS_WINDOW": window,
        "HAS_SOFT_CAP": soft_cap,
        "HAS_SINKS": sinks,
        "FORMAT": kv.number,
        "HEAD_DIM": head_dim,
        "GROUP_SIZE": group_size,
        "BLOCK_SIZE": 16,
        "CHUNK_N": CHUNK,
        "BLOCK_M": max(config.block_m, triton.next_power_of_2(group_size)),
        "BLOCK_N": config.block_n,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "DOT_IN_FLOAT32": False,
    }
    flags = {"split": split, "window": window, "soft cap": soft_cap, "sinks": sinks, f"{format} cache": kv.number > 0}
    label = " ".join([name, TYPE_NAMES[dtype], f"d={head_dim}", f"g={group_size}", *(k for k, v in flags.items() if v)])
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    # float32 must not be rounded to TF32, so it does not use the matrix units: the parity path, not the fast one.
    first = max(targets[0], 90 if format == "fp8" else 80)
    return Variant(
        _paged_attention_kernel, label, types, constants, options, dtype is not fp32, first, max_target=targets[1]
    )


def _merge_variant() -> Variant:
    types = {
        **pointers(torch.bfloat16, "output_ptr"),
        **pointers(torch.float32, "lse_ptr", "partial_ptr", "state_ptr", "sinks_ptr"),
        "context_lens_ptr": "*i32",
        "window": "i32",
        "chunks": "i32",
    }
    constants: dict[str, int | bool | float | None] = {
        "HAS_WINDOW": False,
        "HAS_SINKS": False,
        "HEAD_DIM": 128,
        "CHUNK_N": CHUNK,
        "BLOCK_D": 128,
    }
    return Variant(_merge_kernel, "bf16 d=128", types, constants, {"num_warps": 2})
