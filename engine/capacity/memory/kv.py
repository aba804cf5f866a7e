"""Bytes of the KV cache: per token, per block, per sequence; and the constant state of recurrent layers."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from math import ceil

from engine.capacity.formats import ComputeDtype, KVPrecision
from engine.capacity.model.layers import Layer
from engine.capacity.model.sharding import WHOLE, Shard
from engine.capacity.model.spec import ModelSpec

#: Recurrent states are kept in float32 (``mamba_ssm_cache_dtype`` of the published configurations).
_STATE_BYTES = 4


@dataclasses.dataclass(frozen=True, slots=True)
class CacheLayout:
    """How an engine keeps keys and values.

    Attributes:
        precision: of one value.
        block_size: tokens of a block.
        frees_windows: gives back blocks that have slid out of a layer's window.
        grouped: layers with and without a window are allocated in equal groups, see :func:`grouped_layers`.
    """

    precision: KVPrecision
    block_size: int = 16
    frees_windows: bool = True
    grouped: bool = False


def kv_bytes_per_token(spec: ModelSpec, precision: KVPrecision, shard: Shard = WHOLE) -> int:
    """Bytes that one more token adds to one GPU's cache while no window is full.

    Over the layers with attention: 2 (keys and values) · ceil(KV heads / TP) · bytes of a head (scales included); with
    latent attention one vector of kv_rank + rope_dim, which tensor parallelism does not divide.

    Args:
        spec: the model.
        precision: of keys and values.
        shard: the GPU's part of the model.

    >>> from engine.capacity.formats import BFLOAT16, FLOAT16
    >>> from engine.capacity.model.catalog import model_spec
    >>> kv_bytes_per_token(model_spec("Llama-3.1-8B"), BFLOAT16.as_kv)  # 128 KiB
    131072
    >>> kv_bytes_per_token(model_spec("Llama-2-7b"), FLOAT16.as_kv)  # multi-head attention: 512 KiB
    524288
    >>> kv_bytes_per_token(model_spec("DeepSeek-V3"), BFLOAT16.as_kv, Shard(tp=8))  # 61 · (512 + 64) · 2
    70272
    """
    return ceil(_exact_bytes_per_token(spec, CacheLayout(precision), shard))


def kv_bytes_per_block(spec: ModelSpec, layout: CacheLayout, shard: Shard = WHOLE) -> int:
    """Bytes of one block over all layers of one GPU. ``spec`` and ``shard`` as for :func:`kv_bytes_per_token`.

    >>> from engine.capacity.formats import BFLOAT16
    >>> from engine.capacity.model.catalog import model_spec
    >>> kv_bytes_per_block(model_spec("Llama-3.1-8B"), CacheLayout(BFLOAT16.as_kv, block_size=16))
    2097152
    """
    return ceil(layout.block_size * _exact_bytes_per_token(spec, layout, shard))


def kv_bytes_per_sequence(spec: ModelSpec, layout: CacheLayout, context: int, shard: Shard = WHOLE) -> int:
    """Bytes that one sequence holds on one GPU, in whole blocks.

    Args:
        context: prompt and output together, tokens.

    The other arguments are those of :func:`kv_bytes_per_block`.

    >>> from engine.capacity.formats import FLOAT16
    >>> from engine.capacity.model.catalog import model_spec
    >>> layout = CacheLayout(FLOAT16.as_kv, block_size=16)
    >>> kv_bytes_per_sequence(model_spec("Llama-2-70b"), layout, 4096)  # 1.34 GB, not the published 10.7
    1342177280
    >>> mistral = model_spec("Mistral-7B-v0.1")  # every layer slides over 4,096 tokens
    >>> kv_bytes_per_sequence(mistral, layout, 32768) == kv_bytes_per_sequence(mistral, layout, 4096)
    True
    """
    total, size = Fraction(0), layout.block_size
    for layer, count in attending_layers(spec, shard, layout.grouped):
        kept = tokens_kept(context, layer.window if layout.frees_windows else None)
        total += count * blocks_for(kept, size) * size * _layer_bytes(layer, layout.precision, shard.tp)
        total += count * blocks_for(context, size) * size * layer.index_bytes
    return ceil(total)


def state_bytes_per_sequence(spec: ModelSpec, dtype: ComputeDtype, shard: Shard = WHOLE) -> int:
    """Bytes of constant state that one sequence holds on one GPU, whatever its length: recurrent state in float32, the
    convolutions' windows in ``dtype``. 0 for a model of attention alone.

    >>> from engine.capacity.formats import BFLOAT16
    >>> from engine.capacity.model.catalog import model_spec
    >>> spec = model_spec("Nemotron-H-8B")
    >>> state_bytes_per_sequence(spec, BFLOAT16)  # 24 layers · (1,048,576 · 4 B + 30,720 · 2 B)
    102137856
    """
    total = 0
    for layer, count in _layer_counts(spec, shard):
        recurrent, window = layer.mixer.state_elements(shard.tp)
        total += count * (recurrent * _STATE_BYTES + window * dtype.bytes)
    return total


def blocks_for(tokens: int, block_size: int) -> int:
    """Whole blocks that hold ``tokens``."""
    return -(-tokens // block_size)


def tokens_kept(context: int, window: int | None) -> int:
    """Tokens of a sequence that a layer with that window (None: without one) still needs."""
    return context if window is None else min(context, window)


def attending_layers(spec: ModelSpec, shard: Shard = WHOLE, grouped: bool = False) -> list[tuple[Layer, int]]:
    """(layer, how many of it are allocated) of those that keep keys and values, full attention first."""
    layers = [(layer, count) for layer, count in _layer_counts(spec, shard) if layer.attends]
    layers.sort(key=lambda item: (item[0].window is not None, item[0].window or 0))
    if not grouped:
        return layers
    by_window: dict[int | None, int] = {}
    for layer, count in layers:
        by_window[layer.window] = by_window.get(layer.window, 0) + count
    padded = grouped_layers(tuple(by_window.values()))
    extra = {window: more - count for (window, count), more in zip(by_window.items(), padded, strict=True)}
    return [(layer, count + extra.pop(layer.window, 0)) for layer, count in layers]


def grouped_layers(counts: tuple[int, ...]) -> tuple[int, ...]:
    """Layers of each kind (full attention, each window) as vLLM's hybrid cache manager allocates them.

    Groups of one size share a pool of blocks: the size is the smallest count, or the largest where that is less than a
    quarter above it; each kind is filled up to whole groups.

    >>> grouped_layers((10, 52))  # Gemma-3-27b: 52 sliding layers take six groups of 10
    (10, 60)
    >>> grouped_layers((12, 12)), grouped_layers((32,))  # gpt-oss-20b; a model of one kind
    ((12, 12), (32,))
    """
    if len(counts) < 2:
        return counts
    size = max(counts) if max(counts) < 1.25 * min(counts) else min(counts)
    return tuple(-(-count // size) * size for count in counts)


def _layer_counts(spec: ModelSpec, shard: Shard) -> list[tuple[Layer, int]]:
    held = shard.stage_of(spec)
    return spec.layer_counts(held.start, held.stop)


def _layer_bytes(layer: Layer, precision: KVPrecision, tp: int) -> Fraction:
    vectors, width = layer.mixer.cached_heads(tp)
    return vectors * precision.bytes_per_head(width)


def _exact_bytes_per_token(spec: ModelSpec, layout: CacheLayout, shard: Shard) -> Fraction:
    layers = attending_layers(spec, shard, layout.grouped)
    sizes = (count * (_layer_bytes(layer, layout.precision, shard.tp) + layer.index_bytes) for layer, count in layers)
    return sum(sizes, Fraction(0))
