"""Attention of ragged queries over a paged KV cache.

One signature for prefill, chunked prefill, decode and verification of drafts: they differ only in how many of a
sequence's positions are queries now. ``kernels/README.md`` has the diagram of the block table.
"""

# ruff: noqa: ANN001
# mypy: disable-error-code="no-untyped-def"
# (the parameters of a Triton kernel are pointers and scalars of the launch: there is no Python type to write)

import dataclasses
import math

import torch

from kernels.language import tl, triton
from kernels.variant import TYPE_NAMES, Variant


def paged_attention_reference(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """Plain softmax attention in float32, one sequence after another: slow, and the truth the others are held to.

    Args:
        query: [T, num_heads, head_dim]; query head h reads KV head ``h // (num_heads / num_kv_heads)``.
        key_cache, value_cache: [num_blocks, block_size, num_kv_heads, head_dim]. Slots behind a sequence's context
            may hold anything, NaN included.
        block_tables: int [B, max_blocks], block ids in order; entries behind the context are not read.
        query_start: int [B + 1], rows ``query_start[i]:query_start[i + 1]`` belong to sequence i.
        context_lens: int [B], KV length including the queries' own positions.
        scale: factor on the scores.
        window: a query sees at most this many positions, itself included; None for all.

    Returns:
        [T, num_heads, head_dim] in the dtype of ``query``.
    """
    block_size, num_kv_heads = key_cache.shape[1:3]
    group = query.shape[1] // num_kv_heads
    output = torch.empty_like(query)
    starts = query_start.tolist()
    for index, context_len in enumerate(context_lens.tolist()):
        rows = slice(starts[index], starts[index + 1])
        blocks = block_tables[index, : -(-context_len // block_size)].long()
        # [S, num_kv_heads, D] → [num_heads, S, D], each KV head repeated for the query heads that share it.
        keys = key_cache[blocks].flatten(0, 1)[:context_len].float().repeat_interleave(group, dim=1).transpose(0, 1)
        values = value_cache[blocks].flatten(0, 1)[:context_len].float().repeat_interleave(group, dim=1).transpose(0, 1)
        scores = query[rows].float().transpose(0, 1) @ keys.transpose(1, 2) * scale
        scores.masked_fill_(~_visible(rows.stop - rows.start, context_len, window, query.device), float("-inf"))
        output[rows] = (scores.softmax(dim=-1) @ values).transpose(0, 1).to(query.dtype)
    return output


def _visible(query_len: int, context_len: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Bool [query_len, context_len]: causal, aligned to the bottom right, at most ``window`` positions wide."""
    query_position = torch.arange(context_len - query_len, context_len, device=device)[:, None]
    distance = query_position - torch.arange(context_len, device=device)
    visible = distance >= 0
    return visible if window is None else visible & (distance < window)


@dataclasses.dataclass(frozen=True, slots=True)
class PagedAttentionConfig:
    """Tile sizes and launch parameters of the Triton kernel.

    Attributes:
        block_m: rows of a program's tile: ``block_m // g`` queries × the g query heads of one KV head.
        block_n: KV positions a step of the loop reads.
        num_warps, num_stages: as Triton means them.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def paged_attention_config(
    num_tokens: int, num_seqs: int, group_size: int, head_dim: int, dtype: torch.dtype
) -> PagedAttentionConfig:
    """The configuration for a batch, from shapes alone: nothing is read back from the device.

    Untuned: chosen for occupancy and so that nothing spills; ``python -m kernels.aot`` shows registers and spills.
    """
    wide = head_dim > 128 or dtype == torch.float32
    if num_tokens == num_seqs:  # every sequence decodes: bound by reading the cache, a small tile is enough
        block_m = max(16, triton.next_power_of_2(group_size))
        return PagedAttentionConfig(block_m, 32 if wide else 64, 4, 2 if wide else 3)
    if wide:
        return PagedAttentionConfig(max(64, triton.next_power_of_2(group_size)), 32, 8, 2)
    if head_dim > 64:  # 64 rows on 4 warps spill on sm_80
        return PagedAttentionConfig(max(128, triton.next_power_of_2(group_size)), 64, 8, 2)
    return PagedAttentionConfig(max(64, triton.next_power_of_2(group_size)), 64, 4, 2)


def paged_attention_triton(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """As :func:`paged_attention_reference`, in one launch, without ever making the score matrix.

    One design for ragged batches of any mix, after vLLM's unified attention (Ringlein et al. 2025): a program owns a
    few consecutive queries of one sequence together with all the query heads that share a KV head, so that even a
    decode fills a tile of the matrix units, and walks the block table with an online softmax (Milakov & Gimelshein
    2018; Dao et al. 2022). Decode of few long sequences leaves multiprocessors idle: splitting the KV comes later.

    Args:
        As the reference's; innermost dimensions contiguous, head_dim at most 256, bfloat16, float16 or float32.
    """
    num_tokens, num_heads, head_dim = query.shape
    _, block_size, num_kv_heads, _ = key_cache.shape
    num_seqs = context_lens.shape[0]
    if any(tensor.stride(-1) != 1 for tensor in (query, key_cache, value_cache, block_tables)):
        raise ValueError("query, caches and block tables must be contiguous in their last dimension")
    group_size = num_heads // num_kv_heads
    config = paged_attention_config(num_tokens, num_seqs, group_size, head_dim, query.dtype)
    queries_per_block = config.block_m // group_size
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    # Each sequence wastes at most one block of queries: an upper bound of the blocks that needs no device sync.
    grid = (num_tokens // queries_per_block + num_seqs, num_kv_heads)
    _paged_attention_kernel[grid](
        output,
        query,
        key_cache,
        value_cache,
        block_tables,
        query_start,
        context_lens,
        scale * math.log2(math.e),
        window or 0,
        num_seqs,
        block_tables.stride(0),
        *query.stride()[:2],
        *output.stride()[:2],
        *key_cache.stride()[:3],
        *value_cache.stride()[:3],
        HAS_WINDOW=window is not None,
        HEAD_DIM=head_dim,
        GROUP_SIZE=group_size,
        BLOCK_SIZE=block_size,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        # The interpreter multiplies bfloat16 wrongly (Triton 3.7): compute in float32 there.
        DOT_IN_FLOAT32=query.device.type == "cpu",
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return output


@triton.jit
def _find_sequence(query_start_ptr, query_block, num_seqs, BLOCK_Q: tl.constexpr):
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
def _paged_attention_kernel(
    output_ptr,  # [T, num_heads, HEAD_DIM]
    query_ptr,  # [T, num_heads, HEAD_DIM]
    key_cache_ptr,  # [num_blocks, BLOCK_SIZE, num_kv_heads, HEAD_DIM]
    value_cache_ptr,  # the same
    block_tables_ptr,  # int [B, max_blocks]
    query_start_ptr,  # int [B + 1]
    context_lens_ptr,  # int [B]
    scale_log2,  # scale * log2(e): exp2 is one instruction, exp is two
    window,
    num_seqs,
    table_stride,
    query_stride_token,
    query_stride_head,
    output_stride_token,
    output_stride_head,
    key_stride_block,
    key_stride_slot,
    key_stride_head,
    value_stride_block,
    value_stride_slot,
    value_stride_head,
    HAS_WINDOW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    GROUP_SIZE: tl.constexpr,  # g, query heads that share a KV head
    BLOCK_SIZE: tl.constexpr,  # tokens in a block of the cache
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,  # HEAD_DIM padded to a power of two
    DOT_IN_FLOAT32: tl.constexpr,
):
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP_SIZE
    query_block = tl.program_id(0)
    kv_head = tl.program_id(1)
    sequence = _find_sequence(query_start_ptr, query_block, num_seqs, BLOCK_Q)
    query_begin = tl.load(query_start_ptr + sequence)
    query_len = tl.load(query_start_ptr + sequence + 1) - query_begin
    first_query = (query_block - (query_begin // BLOCK_Q + sequence)) * BLOCK_Q
    if first_query >= query_len:
        return
    past = tl.load(context_lens_ptr + sequence) - query_len

    # Row r of the tile: query r // g of this block, query head r % g of this KV head.
    rows = tl.arange(0, BLOCK_M)
    row_query = first_query + rows // GROUP_SIZE
    row_head = kv_head * GROUP_SIZE + rows % GROUP_SIZE
    row_inside = (rows < BLOCK_Q * GROUP_SIZE) & (row_query < query_len)
    row_position = past + row_query
    dims = tl.arange(0, BLOCK_D)
    dim_inside = dims < HEAD_DIM
    row_token = (query_begin + row_query).to(tl.int64)
    query = tl.load(
        query_ptr + (row_token * query_stride_token + row_head * query_stride_head)[:, None] + dims[None, :],
        mask=row_inside[:, None] & dim_inside[None, :],
        other=0.0,
    )
    if DOT_IN_FLOAT32:
        query = query.to(tl.float32)

    # KV positions that any row of the tile can see.
    kv_stop = past + tl.minimum(first_query + BLOCK_Q, query_len)
    kv_start = 0
    if HAS_WINDOW:
        kv_start = tl.maximum(past + first_query - window + 1, 0) // BLOCK_N * BLOCK_N

    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    accumulator = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    table_ptr = block_tables_ptr + sequence.to(tl.int64) * table_stride
    for start in range(kv_start, kv_stop, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        column_inside = columns < kv_stop
        # A cache holds more than 2^31 elements: offsets in 64 bits.
        block = tl.load(table_ptr + columns // BLOCK_SIZE, mask=column_inside, other=0).to(tl.int64)
        slot = columns % BLOCK_SIZE
        key_offset = block * key_stride_block + slot * key_stride_slot + kv_head * key_stride_head
        value_offset = block * value_stride_block + slot * value_stride_slot + kv_head * value_stride_head
        # Slots behind the context are not read: whatever they hold, NaN included, must not meet a zero weight.
        key = tl.load(
            key_cache_ptr + key_offset[None, :] + dims[:, None],
            mask=column_inside[None, :] & dim_inside[:, None],
            other=0.0,
        )
        value = tl.load(
            value_cache_ptr + value_offset[:, None] + dims[None, :],
            mask=column_inside[:, None] & dim_inside[None, :],
            other=0.0,
        )
        if DOT_IN_FLOAT32:
            key = key.to(tl.float32)
            value = value.to(tl.float32)
        # "ieee": float32 models must not be rounded to TF32; of no effect on 16-bit types.
        scores = tl.dot(query, key, input_precision="ieee") * scale_log2
        visible = columns[None, :] <= row_position[:, None]
        if HAS_WINDOW:
            visible = visible & (row_position[:, None] - columns[None, :] < window)
        scores = tl.where(visible & row_inside[:, None], scores, float("-inf"))

        new_max = tl.maximum(row_max, tl.max(scores, axis=1))
        # A row that has seen nothing yet (window) or never will (padding) would give inf - inf.
        safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = tl.exp2(scores - safe_max[:, None])
        correction = tl.exp2(row_max - safe_max)
        row_sum = row_sum * correction + tl.sum(weights, axis=1)
        accumulator = accumulator * correction[:, None]
        accumulator = tl.dot(weights.to(value.dtype), value, accumulator, input_precision="ieee")
        row_max = new_max

    attended = accumulator / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
    tl.store(
        output_ptr + (row_token * output_stride_token + row_head * output_stride_head)[:, None] + dims[None, :],
        attended.to(output_ptr.dtype.element_ty),
        mask=row_inside[:, None] & dim_inside[None, :],
    )


def aot_variants() -> list[Variant]:
    """16-bit and float32, narrow and wide heads, decode and prefill."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    return [
        _variant(bf16, head_dim=128, group_size=4, decode=True, window=False),
        _variant(bf16, head_dim=128, group_size=4, decode=False, window=False),
        _variant(fp16, head_dim=64, group_size=3, decode=False, window=True),
        _variant(bf16, head_dim=256, group_size=8, decode=False, window=False),
        _variant(fp16, head_dim=80, group_size=1, decode=True, window=True),
        _variant(fp32, head_dim=64, group_size=3, decode=False, window=False),
    ]


def _variant(dtype: torch.dtype, *, head_dim: int, group_size: int, decode: bool, window: bool) -> Variant:
    config = paged_attention_config(64, 64 if decode else 1, group_size, head_dim, dtype)
    element = f"*{TYPE_NAMES[dtype]}"
    types = dict.fromkeys(("output_ptr", "query_ptr", "key_cache_ptr", "value_cache_ptr"), element)
    types |= dict.fromkeys(("block_tables_ptr", "query_start_ptr", "context_lens_ptr"), "*i32")
    types |= {"scale_log2": "fp32", "window": "i32", "num_seqs": "i32", "table_stride": "i32"}
    types |= {f"{tensor}_stride_{axis}": "i32" for tensor in ("query", "output") for axis in ("token", "head")}
    types |= {f"{tensor}_stride_{axis}": "i32" for tensor in ("key", "value") for axis in ("block", "slot", "head")}
    constants: dict[str, int | bool | float | None] = {
        "HAS_WINDOW": window,
        "HEAD_DIM": head_dim,
        "GROUP_SIZE": group_size,
        "BLOCK_SIZE": 16,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_D": max(16, 1 << (head_dim - 1).bit_length()),
        "DOT_IN_FLOAT32": False,
    }
    use = f"{'decode' if decode else 'prefill'} {TYPE_NAMES[dtype]} d={head_dim} g={group_size}"
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    # float32 must not be rounded to TF32, so it does not use the matrix units: the parity path, not the fast one.
    label = use + (" window" if window else "")
    return Variant(_paged_attention_kernel, label, types, constants, options, dtype is not torch.float32)
