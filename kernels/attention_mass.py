"""How much attention each cached position got in a step: what score-based eviction keeps count of (H2O, SnapKV).

Attention itself never has the weights of all queries on a position together, as every query's softmax walks along the
positions; with the logarithms of the denominators that it leaves behind, each weight can be computed again on its own.
"""

# ruff: noqa: ANN001
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# (the parameters of a Triton kernel are pointers and scalars of the launch: there is no Python type to write)

import torch

from kernels.kv_formats import KV_FORMATS, format_of
from kernels.kv_write import KVScales
from kernels.language import tl, triton
from kernels.paged_attention import (
    gathered_rows,
    key_scores,
    load_queries,
    load_rows,
    slots_of,
    visible_positions,
)
from kernels.variant import TYPE_NAMES, Variant, pointers

_BLOCK_M, _BLOCK_N = 16, 64


def attention_mass_reference(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    context_lens: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    window: int | None = None,
    *,
    soft_cap: float | None = None,
    scales: KVScales | None = None,
) -> torch.Tensor:
    """Sum over a sequence's queries, and over the query heads of a KV head, of the weights on each position.

    Args:
        lse: float32 [T, num_heads], what :func:`kernels.paged_attention.paged_attention_triton` returned with its
            output for the same arguments.
        query, key_cache, block_tables, query_start, context_lens, scale, window, soft_cap, scales: the same.

    Returns:
        float32 [B, num_kv_heads, max_blocks · block_size], 0 behind a context. A step's masses sum to the number of its
        queries' heads, less what sinks took.
    """
    block_size, num_kv_heads = key_cache.shape[1:3]
    group = query.shape[1] // num_kv_heads
    num_seqs, max_blocks = block_tables.shape
    mass = torch.zeros((num_seqs, num_kv_heads, max_blocks * block_size), dtype=torch.float32, device=query.device)
    starts = query_start.tolist()
    for index, length in enumerate(context_lens.tolist()):
        rows = slice(starts[index], starts[index + 1])
        blocks = block_tables[index, : -(-length // block_size)].long()
        keys = gathered_rows(key_cache, None if scales is None else scales[0], blocks, length, group)
        scores = query[rows].float().transpose(0, 1) @ keys.transpose(1, 2) * scale
        if soft_cap is not None:
            scores = torch.tanh(scores / soft_cap) * soft_cap
        weights = (scores - lse[rows].t()[..., None]).exp()
        weights = weights * visible_positions(rows.stop - rows.start, length, window, query.device)
        mass[index, :, :length] = weights.view(num_kv_heads, group, -1, length).sum(dim=(1, 2))
    return mass


def attention_mass_triton(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    context_lens: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    window: int | None = None,
    *,
    soft_cap: float | None = None,
    scales: KVScales | None = None,
) -> torch.Tensor:
    """As :func:`attention_mass_reference`, in one launch; a program owns some positions, so sums have a fixed order."""
    _, num_heads, head_dim = query.shape
    block_size, num_kv_heads = key_cache.shape[1:3]
    num_seqs, max_blocks = block_tables.shape
    if query.stride(-1) != 1 or key_cache.stride(-1) != 1:
        raise ValueError("query and key_cache must be contiguous in their last dimension")
    if lse.shape != query.shape[:2] or not lse.is_contiguous():
        raise ValueError(f"lse must be contiguous {list(query.shape[:2])}, not {list(lse.shape)}")
    positions = max_blocks * block_size
    mass = torch.empty((num_seqs, num_kv_heads, positions), dtype=torch.float32, device=query.device)
    _attention_mass_kernel[(num_seqs, num_kv_heads, triton.cdiv(positions, _BLOCK_N))](
        mass,
        query,
        key_cache,
        mass if scales is None else scales[0],
        lse,
        block_tables,
        query_start,
        context_lens,
        scale,
        soft_cap or 0.0,
        window or 0,
        positions,
        block_tables.stride(0),
        *query.stride()[:2],
        *key_cache.stride()[:3],
        HAS_WINDOW=window is not None,
        HAS_SOFT_CAP=soft_cap is not None,
        FORMAT=format_of(key_cache).number,
        HEAD_DIM=head_dim,
        GROUP_SIZE=num_heads // num_kv_heads,
        BLOCK_SIZE=block_size,
        BLOCK_M=_BLOCK_M,
        BLOCK_N=_BLOCK_N,
        BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        DOT_IN_FLOAT32=query.device.type == "cpu",
        num_warps=4,
    )
    return mass


@triton.jit(do_not_specialize=["positions", "table_stride"])
def _attention_mass_kernel(
    mass_ptr,  # float32 [B, num_kv_heads, positions]
    query_ptr,
    key_cache_ptr,
    key_scales_ptr,
    lse_ptr,  # float32 [T, num_heads]
    block_tables_ptr,
    query_start_ptr,
    context_lens_ptr,
    scale,
    soft_cap,
    window,
    positions,
    table_stride,
    query_stride_token,
    query_stride_head,
    key_stride_block,
    key_stride_slot,
    key_stride_head,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    FORMAT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DOT_IN_FLOAT32: tl.constexpr,
):
    sequence, kv_head, num_kv_heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    begin = tl.load(query_start_ptr + sequence)
    query_len = tl.load(query_start_ptr + sequence + 1) - begin
    context_len = tl.load(context_lens_ptr + sequence)
    start = tl.program_id(2) * BLOCK_N
    columns = start + tl.arange(0, BLOCK_N)
    inside = columns < context_len
    table_ptr = block_tables_ptr + sequence.to(tl.int64) * table_stride
    block, slot = slots_of(table_ptr, columns, inside, start, BLOCK_SIZE, BLOCK_N)
    scale_row = (block * BLOCK_SIZE + slot) * num_kv_heads + kv_head
    offset = block * key_stride_block + slot * key_stride_slot + kv_head * key_stride_head
    key = load_rows(key_cache_ptr, offset, inside, FORMAT, HEAD_DIM, BLOCK_N, BLOCK_D)
    rows = tl.arange(0, BLOCK_M)
    total = tl.zeros([BLOCK_N], tl.float32)
    for first in range(0, query_len * GROUP_SIZE, BLOCK_M):
        row_query, row_head = (first + rows) // GROUP_SIZE, kv_head * GROUP_SIZE + (first + rows) % GROUP_SIZE
        row_inside = row_query < query_len
        token = (begin + row_query).to(tl.int64)
        query, query_sum = load_queries(
            query_ptr, token, row_head, row_inside, query_stride_token, query_stride_head, HEAD_DIM, BLOCK_D,
            DOT_IN_FLOAT32,
        )  # fmt: skip
        scores = key_scores(
            query, query_sum, key, key_scales_ptr, scale_row, inside, scale, soft_cap, HAS_SOFT_CAP, FORMAT
        )
        distance = (context_len - query_len + row_query)[:, None] - columns[None, :]
        visible = (distance >= 0) & row_inside[:, None] & inside[None, :]
        if HAS_WINDOW:
            visible = visible & (distance < window)
        row = token * (num_kv_heads * GROUP_SIZE) + row_head
        lse = tl.load(lse_ptr + row, mask=row_inside, other=0.0) * 1.4426950408889634
        total += tl.sum(tl.where(visible, tl.exp2(scores - lse[:, None]), 0.0), axis=0)
    target = mass_ptr + (sequence.to(tl.int64) * num_kv_heads + kv_head) * positions + columns
    tl.store(target, total, mask=columns < positions)


def aot_variants() -> list[Variant]:
    """The model's dtype and INT8."""
    return [_variant(name) for name in ("model", "int8")]


def _variant(name: str) -> Variant:
    bf16, format = torch.bfloat16, KV_FORMATS[name]
    types = {
        **pointers(torch.float32, "mass_ptr", "lse_ptr"),
        "query_ptr": f"*{TYPE_NAMES[bf16]}",
        **pointers(format.dtype or bf16, "key_cache_ptr"),
        "key_scales_ptr": "*fp16",
        **pointers(torch.int32, "block_tables_ptr", "query_start_ptr", "context_lens_ptr"),
        **dict.fromkeys(("scale", "soft_cap"), "fp32"),
        **dict.fromkeys(("window", "positions", "table_stride", "query_stride_token", "query_stride_head"), "i32"),
        **{f"key_stride_{axis}": "i32" for axis in ("block", "slot", "head")},
    }
    constants: dict[str, int | bool | float | None] = {
        "HAS_WINDOW": False,
        "HAS_SOFT_CAP": False,
        "FORMAT": format.number,
        "HEAD_DIM": 128,
        "GROUP_SIZE": 4,
        "BLOCK_SIZE": 16,
        "BLOCK_M": _BLOCK_M,
        "BLOCK_N": _BLOCK_N,
        "BLOCK_D": 128,
        "DOT_IN_FLOAT32": False,
    }
    return Variant(_attention_mass_kernel, f"bf16 d=128 {name} cache", types, constants, {"num_warps": 4}, True)
