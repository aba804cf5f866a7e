"""Attention backend ``sdpa``: gather each sequence's blocks, then torch's fused attention. The default.

Torch has no paged attention, so keys and values are gathered into a buffer first. What makes that quick:

* The layout of the work (:class:`_Plan`) is derived once per step and window, and reused by every layer.
* Sequences with equally many queries are batched in *tiles*; queries that share a KV head are folded into the query
  length (g · q rows), so that keys are never repeated.
* A tile's keys and values stay under ``_TILE_BYTES``, so that attention finds them in the processor's cache where the
  gather has just put them.
* A prompt computed from its first token reads its own fresh keys, and a lone sequence whose blocks lie in a row reads
  the cache: neither gathers.

Measured on 2 cores (AMD EPYC, 32 MiB L3, torch 2.13), 9 query and 3 KV heads of 64, block 16, decode, ms per layer:

    ============  =====  ========  ==========  =======  ========  ===========
    float32       gather  one call  tiles 6 MB  per seq  bmm+softmax  matmul
    B 8, S 128      0.03      0.15        0.15     0.51         0.17    0.19
    B 8, S 2048     1.32      3.81        2.50     3.21         3.86    5.33
    B 32, S 128     0.18      0.61        0.61     2.09         0.57    0.80
    B 32, S 512     1.36      3.41        2.46     4.19         3.85    5.24
    B 64, S 1024    7.16     17.48       10.88    14.87        21.35   47.72
    bfloat16
    B 8, S 2048     0.83      1.94        1.88     2.64         2.60    2.51
    B 32, S 128     0.05      0.46        0.46     1.59         0.61    0.46
    B 64, S 1024    3.27     12.47        8.22    25.13        14.29   14.79
    ============  =====  ========  ==========  =======  ========  ===========

Gathering token rows costs up to a tenth more than gathering whole blocks, but never touches a slot behind the context:
stale data, NaN included, cannot leak. Folding beats ``enable_gqa`` for few queries (B 32, q 5, S 256: 1.23 against
1.87 ms) and is level with it from some 100 on, where the mask's g copies are not worth their memory.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
import torch.nn.functional as F

from engine.attention.base import AttentionBackend, AttentionBatch, AttentionLayer, NewTokens
from engine.device import to_device
from kernels.kv_formats import KVFormat, dequantize, format_of, quantize
from kernels.kv_write import kv_write_reference

_TILE_BYTES = 6 << 20  # keys and values of one tile; the best of 1.5 … 24 MiB measured, see above
_TILE_BYTES_GPU = 256 << 20  # there a launch is dear and no cache holds a tile anyway: only bounds the workspace
_PADDING_BYTES = 1 << 20  # padding worth one call less: a call costs some 50 µs, in which about this much is gathered
_FOLD_MAX_QUERIES = 64


class SdpaAttention(AttentionBackend):
    """Torch's ``scaled_dot_product_attention`` over gathered blocks; runs on every device."""

    name = "sdpa"

    def attend(self, new: NewTokens, layer: AttentionLayer, batch: AttentionBatch) -> torch.Tensor:
        """As :meth:`AttentionBackend.attend`."""
        query, key, value = new
        kv_write_reference(key, value, layer.key_cache, layer.value_cache, batch.slot_mapping, layer.kv_scales)
        plan = batch.plan.get(_plan_key(layer.window))
        if not isinstance(plan, _Plan):
            plan = _make_plan(batch, layer.window, query, layer.key_cache)
            batch.plan[_plan_key(layer.window)] = plan
        if layer.kv_scales is not None and any(tile.fresh for tile in plan.tiles):
            key, value = (_as_stored(x, format_of(layer.key_cache)) for x in (key, value))
        sources = _Sources(key, value, layer, plan.workspace)
        if len(plan.tiles) == 1 and isinstance(plan.tiles[0].rows, slice):
            return _attend_tile(plan.tiles[0], query, sources)
        output = torch.empty_like(query)
        for tile in plan.tiles:
            result = _attend_tile(tile, query, sources)
            if isinstance(tile.rows, slice):
                output[tile.rows] = result
            else:
                output.index_copy_(0, tile.rows, result)
        return output


@dataclasses.dataclass(frozen=True, slots=True)
class _Tile:
    """Sequences attended in one call, all with the same number of queries.

    Attributes:
        rows: where their queries are, a slice where consecutive, else int64 [n · query_len].
        num_seqs, query_len, kv_len: n, q, and S, the longest KV span among them.
        fresh: keys and values are this step's own rows; nothing is read from the cache.
        slots: cache rows to attend over: int64 [n · S] to gather, a slice to read in place, None if fresh.
        mask: additive [n, 1, q or g·q, S] in the dtype of the queries, None where every position is visible
            (or, if fresh, where causality is all).
    """

    rows: slice | torch.Tensor
    num_seqs: int
    query_len: int
    kv_len: int
    fresh: bool
    slots: slice | torch.Tensor | None
    mask: torch.Tensor | None


@dataclasses.dataclass(frozen=True, slots=True)
class _Plan:
    """A step's tiles for one window, and the buffer [2, slots, num_kv_heads, head_dim] that they gather into; empty for
    a quantized cache, whose rows are decoded into new tensors."""

    tiles: list[_Tile]
    workspace: torch.Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class _Sources:
    """Where keys and values come from: this step's own rows, the layer's cache, gathered into ``workspace``."""

    key: torch.Tensor
    value: torch.Tensor
    layer: AttentionLayer
    workspace: torch.Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class _Member:
    """A sequence's share of a tile: which KV positions (first … context_len - 1) its queries can see at all."""

    index: int
    query_len: int
    context_len: int
    first: int
    fresh: bool

    @property
    def span(self) -> int:
        return self.context_len - self.first


def _plan_key(window: int | None) -> str:
    return f"sdpa, window {window}"


def _make_plan(batch: AttentionBatch, window: int | None, query: torch.Tensor, key_cache: torch.Tensor) -> _Plan:
    """Group the step's sequences into tiles and derive their indices and masks."""
    token_bytes = 2 * key_cache.shape[2] * query.shape[2] * query.element_size()
    tile_bytes = _TILE_BYTES if query.device.type == "cpu" else _TILE_BYTES_GPU
    groups: dict[tuple[int, bool], list[_Member]] = {}
    for index, (query_len, context_len) in enumerate(zip(batch.query_lens, batch.context_lens, strict=True)):
        fresh = query_len == context_len and (window is None or window >= context_len)
        first = 0 if window is None else max(0, context_len - query_len - window + 1)
        member = _Member(index, query_len, context_len, first, fresh)
        groups.setdefault((query_len, fresh), []).append(member)
    starts = _starts(batch.query_lens)
    tiles = [
        _make_tile(members, batch, starts, window, query, key_cache)
        for group in groups.values()
        for members in _pack(group, token_bytes, tile_bytes)
    ]
    gathered = max((t.num_seqs * t.kv_len for t in tiles if isinstance(t.slots, torch.Tensor)), default=0)
    gathered = gathered if format_of(key_cache).dtype is None else 0
    return _Plan(tiles, key_cache.new_empty(2, gathered, *key_cache.shape[2:]))


def _starts(query_lens: list[int]) -> list[int]:
    """First query row of each sequence."""
    starts, total = [], 0
    for query_len in query_lens:
        starts.append(total)
        total += query_len
    return starts


def _pack(group: list[_Member], token_bytes: int, tile_bytes: int) -> list[list[_Member]]:
    """Split a group into tiles, longest spans first, so that sequences of like length pad each other."""
    tiles: list[list[_Member]] = []
    padding = 0
    for member in sorted(group, key=lambda m: m.span, reverse=True):
        if tiles:
            longest = tiles[-1][0].span
            padding += (longest - member.span) * token_bytes
            if (len(tiles[-1]) + 1) * longest * token_bytes <= tile_bytes and padding <= _PADDING_BYTES:
                tiles[-1].append(member)
                continue
        tiles.append([member])
        padding = 0
    return tiles


def _make_tile(
    members: list[_Member],
    batch: AttentionBatch,
    starts: list[int],
    window: int | None,
    query: torch.Tensor,
    key_cache: torch.Tensor,
) -> _Tile:
    kv_len, query_len = members[0].span, members[0].query_len  # the longest comes first
    members = sorted(members, key=lambda m: m.index)
    device = query.device
    columns = np.array([(starts[m.index], m.first, m.context_len, m.index) for m in members], np.int64).T
    begins, first, context, index = to_device([np.ascontiguousarray(column) for column in columns], device)
    rows = _rows([starts[m.index] for m in members], begins, query_len)
    if members[0].fresh:
        return _Tile(rows, len(members), query_len, kv_len, True, None, None)
    first, context = first[:, None], context[:, None]
    positions = first + torch.arange(kv_len, device=device)  # [n, S]
    # Padding repeats the last valid position: always finite, and masked.
    valid = torch.minimum(positions, context - 1)
    block_size = key_cache.shape[1]
    tables = batch.block_tables.index_select(0, index).long()
    slots = tables.gather(1, valid // block_size) * block_size + valid % block_size
    group_size = query.shape[1] // key_cache.shape[2] if query_len <= _FOLD_MAX_QUERIES else 1
    mask = _mask(positions, context, query_len, window, group_size, query.dtype)
    return _Tile(rows, len(members), query_len, kv_len, False, _slice_or_index(slots), mask)


def _rows(starts: list[int], begins: torch.Tensor, query_len: int) -> slice | torch.Tensor:
    """Rows of the queries that begin at ``starts``, which are ``begins`` on the device."""
    if starts[-1] - starts[0] == query_len * (len(starts) - 1):
        return slice(starts[0], starts[-1] + query_len)
    return (begins[:, None] + torch.arange(query_len, device=begins.device)).flatten()


def _slice_or_index(slots: torch.Tensor) -> slice | torch.Tensor:
    """[n, S] slots as a slice, if of one sequence and consecutive (asked only where that costs no sync)."""
    if slots.shape[0] == 1 and slots.device.type == "cpu":
        start, stop = int(slots[0, 0]), int(slots[0, -1]) + 1
        if stop - start == slots.shape[1] and bool((slots[0].diff() == 1).all()):
            return slice(start, stop)
    return slots.flatten()


def _mask(
    positions: torch.Tensor,
    context: torch.Tensor,
    query_len: int,
    window: int | None,
    group_size: int,
    dtype: torch.dtype,
) -> torch.Tensor | None:
    """Additive mask [n, 1, g·q, S], row r for query r // g; None if all is visible.

    Args:
        positions: [n, S], KV position of each column.
        context: [n, 1], KV length of each sequence.
        group_size: g, query heads folded into the query length; 1 if none.
    """
    query_position = context - query_len + torch.arange(query_len, device=context.device)  # [n, q]
    distance = query_position[:, :, None] - positions[:, None, :]
    visible = distance >= 0
    if window is not None:
        visible &= distance < window
    if visible.device.type == "cpu" and bool(visible.all()):
        return None
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, float("-inf"))
    return mask.repeat_interleave(group_size, dim=1)[:, None]


def _attend_tile(tile: _Tile, query: torch.Tensor, sources: _Sources) -> torch.Tensor:
    """[n · q, num_heads, head_dim], the attention of one tile."""
    num_heads, head_dim = query.shape[1:]
    num_kv_heads = sources.key.shape[1]
    rows_q = _take(query, tile.rows).view(tile.num_seqs, tile.query_len, num_heads, head_dim)
    keys, values = _tile_kv(tile, sources)
    if tile.fresh or tile.query_len > _FOLD_MAX_QUERIES:
        attended = F.scaled_dot_product_attention(
            rows_q.transpose(1, 2),
            keys,
            values,
            attn_mask=tile.mask,
            is_causal=tile.fresh,
            scale=sources.layer.scale,
            enable_gqa=num_heads != num_kv_heads,
        )
        return attended.transpose(1, 2).reshape(-1, num_heads, head_dim)
    # Fold: [n, q, KV, g, D] → [n, KV, q · g, D], the queries that share a KV head side by side.
    grouped = (tile.num_seqs, tile.query_len, num_kv_heads, num_heads // num_kv_heads, head_dim)
    folded = rows_q.view(grouped).transpose(1, 2).flatten(2, 3)
    attended = F.scaled_dot_product_attention(folded, keys, values, attn_mask=tile.mask, scale=sources.layer.scale)
    unfolded = attended.view(tile.num_seqs, num_kv_heads, tile.query_len, -1, head_dim).transpose(1, 2)
    return unfolded.reshape(-1, num_heads, head_dim)


def _take(tensor: torch.Tensor, rows: slice | torch.Tensor) -> torch.Tensor:
    return tensor[rows] if isinstance(rows, slice) else tensor.index_select(0, rows)


def _tile_kv(tile: _Tile, sources: _Sources) -> tuple[torch.Tensor, torch.Tensor]:
    """The tile's keys and values, each [n, num_kv_heads, S, head_dim]: fresh, in place, gathered, or decoded."""
    key, value, layer = sources.key, sources.value, sources.layer
    shape = (tile.num_seqs, tile.kv_len, *key.shape[1:])
    if tile.slots is None:
        keys, values = _take(key, tile.rows), _take(value, tile.rows)
    elif layer.kv_scales is not None:
        keys = _decoded(layer.key_cache, layer.kv_scales[0], tile.slots, key.dtype)
        values = _decoded(layer.value_cache, layer.kv_scales[1], tile.slots, key.dtype)
    else:
        keys, values = layer.key_cache.flatten(0, 1), layer.value_cache.flatten(0, 1)
        if isinstance(tile.slots, slice):
            keys, values = keys[tile.slots], values[tile.slots]
        else:
            buffer = sources.workspace[:, : tile.slots.shape[0]]
            keys = torch.index_select(keys, 0, tile.slots, out=buffer[0])
            values = torch.index_select(values, 0, tile.slots, out=buffer[1])
    return keys.reshape(shape).transpose(1, 2), values.reshape(shape).transpose(1, 2)


def _decoded(
    cache: torch.Tensor, scales: torch.Tensor, slots: slice | torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """[slots, num_kv_heads, head_dim] of a quantized cache in ``dtype``."""
    payload = _take(cache.view(torch.uint8).flatten(0, 1), slots)  # as bytes: not every device gathers 8-bit floats
    return dequantize(payload.view(cache.dtype), _take(scales.flatten(0, 1), slots)).to(dtype)


def _as_stored(x: torch.Tensor, format: KVFormat) -> torch.Tensor:
    """What a quantized cache will give back for fresh keys or values."""
    return dequantize(*quantize(x, format)).to(x.dtype)
