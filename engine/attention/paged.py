"""What the backends have in common that are two kernels: one writes into the paged cache, one reads it."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, ParamSpec

import torch

from engine.attention.base import AttentionBackend, AttentionBatch, AttentionLayer, NewTokens

P = ParamSpec("P")


class PagedAttention(AttentionBackend):
    """A backend made of two kernels; a new one names them and nothing else.

    Attributes:
        write: with the signature of :func:`kernels.kv_write.kv_write_reference`.
        read: with the arguments of :func:`kernels.paged_attention.paged_attention_reference`; returns what is attended,
            [T, num_heads, head_dim] in the dtype of the queries.
    """

    write: ClassVar[Callable[..., None]]
    read: ClassVar[Callable[..., torch.Tensor]]

    def attend(self, new: NewTokens, layer: AttentionLayer, batch: AttentionBatch) -> torch.Tensor:
        """As :meth:`AttentionBackend.attend`."""
        query, key, value = new
        self.write(key, value, layer.key_cache, layer.value_cache, batch.slot_mapping, layer.kv_scales)
        return self.read(
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


def attended_by(kernel: Callable[P, tuple[torch.Tensor, torch.Tensor]]) -> Callable[P, torch.Tensor]:
    """A kernel that also returns the log-sum-exp of its scores, without it."""

    def attended(*args: P.args, **kwargs: P.kwargs) -> torch.Tensor:
        return kernel(*args, **kwargs)[0]

    return attended
