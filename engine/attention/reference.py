"""Attention backend ``reference``: plain softmax in float32, to check the others against."""

from __future__ import annotations

import torch

from engine.attention.base import AttentionBackend, AttentionBatch
from kernels.kv_write import KVScales, kv_write_reference
from kernels.paged_attention import paged_attention_reference


class ReferenceAttention(AttentionBackend):
    """See :func:`kernels.paged_attention.paged_attention_reference`."""

    name = "reference"

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
        kv_write_reference(key, value, key_cache, value_cache, batch.slot_mapping, kv_scales)
        attended, _ = paged_attention_reference(
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
