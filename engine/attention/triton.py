"""Attention backend ``triton``: our paged kernels, which read the cache through the block tables without gathering."""

from __future__ import annotations

import torch

from engine.attention.base import AttentionBackend, AttentionBatch
from kernels.kv_write import KVScales, kv_write_triton
from kernels.paged_attention import paged_attention_triton


class TritonAttention(AttentionBackend):
    """See :func:`kernels.paged_attention.paged_attention_triton`."""

    name = "triton"

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        batch: AttentionBatch,
        *,
        scale: float,
        window: int | None,
        kv_scales: KVScales | None = None,
    ) -> torch.Tensor:
        """As :meth:`AttentionBackend.attend`."""
        kv_write_triton(key, value, key_cache, value_cache, batch.slot_mapping, kv_scales)
        attended, _ = paged_attention_triton(
            query,
            key_cache,
            value_cache,
            batch.block_tables,
            batch.query_start,
            batch.context_lens_tensor,
            scale,
            window,
            scales=kv_scales,
        )
        return attended
