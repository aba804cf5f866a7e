"""The seam between the decoder and the paged KV cache.

The decoder hands every layer's fresh queries, keys and values, flattened over the ragged batch, to an
:class:`AttentionBackend`; the backend writes keys and values into the cache and returns the attention output.
A step's layout of the batch, shared by all layers:

    query_lens = [3, 1, 2]      tokens that each sequence computes in this step
    query_start = [0, 3, 4, 6]  sequence i owns rows query_start[i]:query_start[i+1]
    context_lens = [3, 18, 40]  KV length of each sequence, *including* this step's tokens

    sequence i:  |<------------- context_lens[i] ------------->|
                 |  already in the cache  |  query_lens[i] new  |
    Query row j of sequence i (j from 0) sees KV positions 0 … context_lens[i] - query_lens[i] + j: causal, aligned
    to the *bottom right*. ``is_causal=True`` of torch SDPA aligns top-left and is wrong unless the two lengths are
    equal.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import NamedTuple

import torch

from kernels.kv_write import KVScales


@dataclasses.dataclass(frozen=True, slots=True)
class AttentionBatch:
    """Who computes what in one step. Set by the runner, read by every layer.

    Attributes:
        query_lens: tokens each of the B sequences computes now, each ≥ 1.
        context_lens: KV length of each sequence after this step's tokens are written, ≥ query_lens.
        query_start: int32 [B + 1], cumulative sum of ``query_lens``, on the model's device.
        context_lens_tensor: int32 [B], ``context_lens`` on the model's device.
        block_tables: int32 [B, max_blocks], block ids in order; behind what a context needs is anything, which nobody
            reads. On the model's device.
        slot_mapping: int64 [T], where each of the T new tokens goes: block_id * block_size + offset.
        plan: scratch a backend may use to keep what it derives once per step (masks, gathers, groups) and reuses in
            every layer; cleared by making a new batch.
    """

    query_lens: list[int]
    context_lens: list[int]
    query_start: torch.Tensor
    context_lens_tensor: torch.Tensor
    block_tables: torch.Tensor
    slot_mapping: torch.Tensor
    plan: dict[str, object] = dataclasses.field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """T, the number of tokens computed in this step."""
        return sum(self.query_lens)


class NewTokens(NamedTuple):
    """What one layer computes for the T tokens of a step.

    Attributes:
        query: [T, num_heads, head_dim], rotary embedding already applied.
        key, value: [T, num_kv_heads, head_dim], keys rotated.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class AttentionLayer:
    """One layer of a cache and how its scores are taken; the same at every step.

    Attributes:
        key_cache, value_cache: [num_blocks, block_size, num_kv_heads, head_dim] in a format of
            :mod:`kernels.kv_formats`.
        kv_scales: of a quantized cache. Every query, a fresh prompt's too, then reads keys and values as they are
            stored: what it sees depends neither on chunks nor on what was cached.
        scale: factor on the scores, usually head_dim ** -0.5.
        window: a query sees at most this many positions, itself included; None for all.
    """

    key_cache: torch.Tensor
    value_cache: torch.Tensor
    kv_scales: KVScales | None
    scale: float
    window: int | None


class AttentionBackend(abc.ABC):
    """One way to attend over the paged cache. Stateless: everything it needs arrives with the call."""

    name: str

    @abc.abstractmethod
    def attend(self, new: NewTokens, layer: AttentionLayer, batch: AttentionBatch) -> torch.Tensor:
        """Write this step's keys and values into the layer's cache, in place, then attend.

        Returns:
            [T, num_heads, head_dim] in the dtype of the queries.
        """
