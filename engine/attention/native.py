"""Attention backend ``native``: our C++ kernel for the CPU reads the paged cache in place."""

from __future__ import annotations

import torch

from engine.attention.base import AttentionBackend, AttentionBatch, AttentionLayer, NewTokens
from kernels.cpu.attention import kv_write, paged_attention


class NativeAttention(AttentionBackend):
    """See :func:`kernels.cpu.attention.paged_attention`."""

    name = "native"

    def attend(self, new: NewTokens, layer: AttentionLayer, batch: AttentionBatch) -> torch.Tensor:
        """As :meth:`AttentionBackend.attend`."""
        query, key, value = new
        kv_write(key, value, layer.key_cache, layer.value_cache, batch.slot_mapping, layer.kv_scales)
        return paged_attention(
            query,
            layer.key_cache,
            layer.value_cache,
            batch.block_tables,
            batch.query_start,
            batch.context_lens_tensor,
            layer.scale,
            layer.window,
            layer.kv_scales,
        )
