"""Attention over the paged cache on the CPU, and the write into it; ``native/attention.h`` has the computation."""

from __future__ import annotations

import torch

from kernels.cpu.build import native
from kernels.kv_write import KVScales, check_caches

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
CACHE_TYPES = DTYPES | {torch.int8: 2, torch.uint8: 3, torch.float8_e4m3fn: 4}
"""Of a cache's payload: those of :mod:`kernels.kv_formats`, as ``native/simd.h`` numbers them."""
MAX_HEAD_DIM = 512


def kv_write(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    scales: KVScales | None = None,
) -> None:
    """Put this step's keys and values into the cache.

    Args:
        key, value: [T, num_kv_heads, head_dim], in any layout; rows whose heads do not lie side by side are copied.
        key_cache, value_cache: payload in a format of :mod:`kernels.kv_formats`, contiguous; where it is not quantized
            of the same dtype.
        slot_mapping: int64 [T], block · block_size + offset; a negative slot is skipped.
        scales: of a quantized cache.
    """
    key, value = _packed_rows(key), _packed_rows(value)
    if scales is not None:
        check_caches(key_cache, value_cache, scales)
        native().functions.headroom_kv_quantize(
            *(key.data_ptr(), value.data_ptr(), DTYPES[key.dtype], key.stride(0), value.stride(0)),
            *(key_cache.data_ptr(), value_cache.data_ptr(), scales[0].data_ptr(), scales[1].data_ptr()),
            *(CACHE_TYPES[key_cache.dtype], slot_mapping.data_ptr(), *key.shape),
        )
        return
    size = key.element_size()
    native().functions.headroom_kv_write(
        *(key.data_ptr(), value.data_ptr(), key.stride(0) * size, value.stride(0) * size),
        *(key_cache.data_ptr(), value_cache.data_ptr(), slot_mapping.data_ptr()),
        *(key.shape[0], key.shape[1] * key.shape[2] * size),
    )


def paged_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    window: int | None,
    scales: KVScales | None = None,
) -> torch.Tensor:
    """Causal attention of a ragged batch, bottom-right aligned; softmax and sums in float32.

    The signature is that of :func:`kernels.paged_attention.paged_attention_reference`.

    Args:
        query: float32 or bfloat16 [T, num_heads, head_dim], in any layout.
        key_cache, value_cache: [num_blocks, block_size, num_kv_heads, head_dim] in the dtype of ``query``, or quantized
            in a format of :mod:`kernels.kv_formats`; contiguous.
        block_tables: int32 [B, max_blocks].
        query_start: int32 [B + 1]; sequence i owns query rows query_start[i] : query_start[i + 1].
        context_lens: int32 [B], positions in the cache, this step's included.
        scale: factor on the scores.
        window: positions that a query sees, itself included; None for all.
        scales: of a quantized cache.

    Returns:
        [T, num_heads, head_dim], contiguous, in the dtype of ``query``.
    """
    query = _packed_rows(query)
    block_tables, query_start, context_lens = (
        table.contiguous() for table in (block_tables, query_start, context_lens)
    )
    tokens, heads, head_dim = query.shape
    out = torch.empty(tokens, heads, head_dim, dtype=query.dtype)
    pointers = (None, None) if scales is None else tuple(side.data_ptr() for side in scales)
    native().functions.headroom_attention(
        *(query.data_ptr(), key_cache.data_ptr(), value_cache.data_ptr(), *pointers, CACHE_TYPES[key_cache.dtype]),
        *(out.data_ptr(), DTYPES[query.dtype]),
        *(block_tables.data_ptr(), query_start.data_ptr(), context_lens.data_ptr()),
        *(block_tables.shape[0], block_tables.shape[1], heads, key_cache.shape[2], head_dim, key_cache.shape[1]),
        *(query.stride(0), window or 0, scale, torch.get_num_threads()),
    )
    return out


def _packed_rows(heads: torch.Tensor) -> torch.Tensor:
    """[T, H, D] with each row's heads side by side; rows themselves may be strided, as in a fused projection."""
    return heads if heads.stride()[1:] == (heads.shape[2], 1) else heads.contiguous()
