"""What the KV cache of a deployment holds on one GPU: its blocks, and the sequences in them."""

from __future__ import annotations

import dataclasses
import functools

from engine.capacity.memory.kv import (
    CacheLayout,
    blocks_for,
    kv_bytes_per_block,
    kv_bytes_per_sequence,
    state_bytes_per_sequence,
)
from engine.capacity.memory.request import CompleteRequest
from engine.capacity.model.mixers import Attention, CompressedAttention, LatentAttention
from engine.capacity.model.sharding import Shard, Stage
from engine.capacity.model.spec import ModelSpec


def cached_spec(request: CompleteRequest) -> ModelSpec:
    """The model as its engine caches it: transformers keeps full keys and values of latent attention."""
    spec = request.spec
    return expanded(spec) if request.profile.expands_latent and spec.is_latent else spec


@functools.lru_cache(maxsize=256)
def expanded(spec: ModelSpec) -> ModelSpec:
    """The same model with full keys and values in place of latents.

    >>> from engine.capacity.formats import BFLOAT16
    >>> from engine.capacity.memory.kv import kv_bytes_per_token
    >>> from engine.capacity.model.catalog import model_spec
    >>> kv_bytes_per_token(expanded(model_spec("DeepSeek-V3")), BFLOAT16.as_kv)  # 61 · 128 heads · (192 + 128) · 2 B
    4997120
    """
    kinds = []
    for kind in spec.kinds:
        mixer = kind.mixer
        if isinstance(mixer, LatentAttention) and not isinstance(mixer, CompressedAttention):
            width = mixer.nope_dim + mixer.rope_dim + mixer.value_dim
            mixer = Attention(mixer.num_heads, mixer.num_heads, -(-width // 2))
        kinds.append(dataclasses.replace(kind, mixer=mixer))
    return dataclasses.replace(spec, kinds=tuple(kinds))


def block_bytes(request: CompleteRequest, stage: Stage) -> int:
    """One block of all layers of the stage, the draft model's included."""
    block = kv_bytes_per_block(cached_spec(request), request.layout, request.shard(stage))
    if request.draft is not None and stage.last:
        block += kv_bytes_per_block(request.draft, _draft_layout(request), Shard(request.draft_tp))
    return block


def most_blocks(request: CompleteRequest, stage: Stage) -> int | None:
    """More KV blocks than all sequences can use are not made by some engines: that many; None for as many as fit."""
    if not request.profile.caps_cache:
        return None
    # A sequence's recurrent states come out of the same memory.
    states = state_bytes_per_sequence(request.spec, request.dtype, request.shard(stage))
    block = block_bytes(request, stage)
    blocks = blocks_for(request.context, request.block_size) + (-(-states // block) if block else 0)
    return request.max_num_seqs * blocks


def sequence_bytes(request: CompleteRequest, stage: Stage) -> tuple[int, int]:
    """(one sequence of the planned context without what it shares, the shared prefix)."""
    state = state_bytes_per_sequence(request.spec, request.dtype, request.shard(stage))
    whole = _kv_bytes(request, stage, request.context)
    # Only whole blocks can be shared, and what slides out of a window is nobody's.
    prefix = request.shared_prefix // request.block_size * request.block_size
    if not prefix:
        return whole + state, 0
    private = max(_kv_bytes(request, stage, request.context - prefix), whole - _kv_bytes(request, stage, prefix))
    return private + state, whole - private


def _kv_bytes(request: CompleteRequest, stage: Stage, context: int) -> int:
    size = kv_bytes_per_sequence(cached_spec(request), request.layout, context, request.shard(stage))
    if request.draft is not None and stage.last:
        size += kv_bytes_per_sequence(request.draft, _draft_layout(request), context, Shard(request.draft_tp))
    return size


def _draft_layout(request: CompleteRequest) -> CacheLayout:
    return CacheLayout(request.kv_dtype, request.block_size)
