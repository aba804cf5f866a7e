"""Attention backend ``native``: our C++ kernel for the CPU reads the paged cache in place."""

from __future__ import annotations

import torch

from engine.attention.base import AttentionBackend, AttentionBatch
from kernels.cpu.attention import kv_write, paged_attention
from kernels.kv_write import KVScales


class NativeAttention(AttentionBackend):
    """See :func:`kernels.cpu.attention.paged_attention`."""

    name = "native"

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
        kv_write(key, value, key_cache, value_cache, batch.slot_mapping, kv_scales)
        return paged_attention(
            query,
            key_cache,
            value_cache,
            batch.block_tables,
            batch.query_start,
            batch.context_lens_tensor,
            scale,
            window,
            kv_scales,
        )
