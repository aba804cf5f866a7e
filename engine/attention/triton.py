"""Attention backend ``triton``: our paged kernels, which read the cache through the block tables without gathering."""

from __future__ import annotations

import torch

from engine.attention.base import AttentionBackend, AttentionBatch, AttentionLayer, NewTokens
from kernels.kv_write import kv_write_triton
from kernels.paged_attention import paged_attention_triton


class TritonAttention(AttentionBackend):
    """See :func:`kernels.paged_attention.paged_attention_triton`."""

    name = "triton"

    def attend(self, new: NewTokens, layer: AttentionLayer, batch: AttentionBatch) -> torch.Tensor:
        """As :meth:`AttentionBackend.attend`."""
        query, key, value = new
        kv_write_triton(key, value, layer.key_cache, layer.value_cache, batch.slot_mapping, layer.kv_scales)
        attended, _ = paged_attention_triton(
            query,
            layer.key_cache,
            layer.value_cache,
            batch.block_tables,
            batch.query_start,
            batch.context_lens_tensor,
            layer.scale,
            layer.window,
            scales=layer.kv_scales,
        )
        return attended
