"""Decode against the bandwidth, prefill against the matrix rate and torch's flash attention, in every cache format."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from kernels.kv_formats import KV_FORMATS, quantize
from kernels.paged_attention import paged_attention_reference, paged_attention_triton
from tests.gpu.case import Bar, Case, Run, Size
from tests.kernels.empty_caches import empty_cache

BLOCK = 16


@dataclasses.dataclass
class Batch:
    """Tensors of one step: random keys and values in blocks that lie scattered."""

    query: torch.Tensor
    caches: list[torch.Tensor]
    scales: tuple[torch.Tensor, torch.Tensor] | None
    tables: torch.Tensor
    starts: torch.Tensor
    lengths: torch.Tensor

    def arguments(self) -> tuple[object, ...]:
        """Positional arguments of attention."""
        scale = self.query.shape[-1] ** -0.5
        return (self.query, *self.caches, self.tables, self.starts, self.lengths, scale)


def cases(device: torch.device, size: Size) -> Iterator[Case]:
    """Heads of Llama-3.1-8B: 32 that share 8, of 128."""
    full = size == "full"
    heads, kv_heads, dim = (32, 8, 128) if full else (4, 2, 16)
    decodes = ((1, 8192), (16, 4096), (64, 4096), (64, 8192)) if full else ((1, 40), (3, 20))
    for batch, context in decodes:
        for name in KV_FORMATS if batch in (3, 64) and context in (20, 8192) else ("model",):
            made = make_batch(device, full, [1] * batch, [context] * batch, heads, kv_heads, dim, name)
            moved = 2 * batch * context * kv_heads * KV_FORMATS[name].head_bytes(dim, made.query.dtype)
            bars = (Bar("bandwidth", 0.85),) if batch >= 16 and name == "model" and full else ()
            label = f"decode, {batch} of context {context}, {name} cache"
            peers = {"torch sdpa": _decode_peer(made)} if name == "model" else {}
            yield _case(label, made, moved + 2 * made.query.nbytes, 4 * batch * context * heads * dim, peers, bars)
    for query, context in ((8192, 8192), (2048, 8192)) if full else ((20, 20), (7, 33)):
        made = make_batch(device, full, [query], [context], heads, kv_heads, dim, "model")
        pairs = query * (2 * context - query + 1) // 2
        moved = 2 * made.query.nbytes + 2 * context * kv_heads * dim * made.query.element_size()
        whole = query == context and full
        bars = (Bar("flops", 0.55), Bar("torch flash", 1.0)) if whole else ()
        peers = {"torch flash": _prefill_peer(made)} if query == context else {}
        yield _case(f"prefill, {query} of context {context}", made, moved, 4 * pairs * heads * dim, peers, bars)


def _case(label: str, made: Batch, moved: int, flops: int, peers: dict[str, Run], bars: tuple[Bar, ...]) -> Case:
    arguments, scales = made.arguments(), made.scales
    small = int(made.lengths.sum()) * made.query.shape[0] <= 2**22 or made.query.shape[0] == made.lengths.shape[0]
    return Case(
        "paged_attention",
        label,
        lambda: paged_attention_triton(*arguments, scales=scales),  # type: ignore[arg-type]
        (lambda: paged_attention_reference(*arguments, scales=scales)) if small else None,  # type: ignore[arg-type]
        0.03 if made.query.dtype == torch.bfloat16 else 1e-4,
        moved,
        flops,
        peers=peers,
        bars=bars,
    )


def make_batch(
    device: torch.device,
    full: bool,
    query_lens: list[int],
    context_lens: list[int],
    heads: int,
    kv_heads: int,
    dim: int,
    format: str,
) -> Batch:
    """Sequences with so many queries over so many cached positions each."""
    dtype = torch.bfloat16 if full else torch.float32
    blocks = [-(-length // BLOCK) for length in context_lens]
    order = torch.randperm(sum(blocks), device=device).to(torch.int32)
    tables = torch.zeros(len(blocks), max(blocks), dtype=torch.int32, device=device)
    for row, (count, begin) in enumerate(zip(blocks, torch.tensor([0, *blocks]).cumsum(0).tolist(), strict=False)):
        tables[row, :count] = order[begin : begin + count]
    caches, scales = [], []
    for _ in range(2):
        payload, factors = empty_cache(KV_FORMATS[format], sum(blocks), BLOCK, kv_heads, dim, dtype, device)
        values, grid = quantize(torch.randn(sum(blocks), BLOCK, kv_heads, dim, device=device), KV_FORMATS[format])
        payload.copy_(values)
        caches.append(payload)
        if factors is not None and grid is not None:
            scales.append(factors.copy_(grid))
    starts = torch.tensor([0, *query_lens]).cumsum(0).to(torch.int32).to(device)
    query = torch.randn(sum(query_lens), heads, dim, device=device).to(dtype)
    lengths = torch.tensor(context_lens, dtype=torch.int32, device=device)
    return Batch(query, caches, (scales[0], scales[1]) if scales else None, tables, starts, lengths)


def _dense(made: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values without blocks, [B, kv_heads, S, D]; all contexts are equal."""
    length = int(made.lengths[0])
    found = [cache[made.tables.long()].flatten(1, 2)[:, :length].transpose(1, 2).contiguous() for cache in made.caches]
    return found[0], found[1]


def _decode_peer(made: Batch) -> Run:
    keys, values = _dense(made)
    query = made.query[:, :, None]
    return lambda: torch.nn.functional.scaled_dot_product_attention(query, keys, values, enable_gqa=True)


def _prefill_peer(made: Batch) -> Run:
    """torch's flash attention on dense keys, already repeated for the heads that share them."""
    group = made.query.shape[1] // made.caches[0].shape[2]
    keys, values = (side.repeat_interleave(group, dim=1) for side in _dense(made))
    query = made.query.transpose(0, 1)[None].contiguous()
    return lambda: torch.nn.functional.scaled_dot_product_attention(query, keys, values, is_causal=True)
