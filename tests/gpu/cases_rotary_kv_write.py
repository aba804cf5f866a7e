"""Writing the cache, alone and together with rotary and norms of heads."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kernels.kv_formats import KV_FORMATS, dequantize
from kernels.kv_write import kv_write_reference, kv_write_triton
from kernels.rotary_kv_write import rotary_kv_write_reference, rotary_kv_write_triton
from tests.gpu.case import Bar, Case, Run, Size
from tests.kernels.empty_caches import empty_cache

BLOCK = 16


def cases(device: torch.device, size: Size) -> Iterator[Case]:
    """8192 tokens of Llama-3.1-8B into every format, and 64 without a bar."""
    full = size == "full"
    heads, kv_heads, dim = (32, 8, 128) if full else (3, 1, 16)
    dtype = torch.bfloat16 if full else torch.float32
    for tokens in (8192, 64) if full else (5,):
        product = torch.randn(tokens, heads + 2 * kv_heads, dim, device=device).to(dtype)
        angles = torch.rand(tokens, 1, dim, device=device)
        slots = torch.randperm(tokens + BLOCK, device=device)[:tokens]
        for name, format in KV_FORMATS.items():
            written = 2 * tokens * kv_heads * format.head_bytes(dim, dtype)
            moved = product.nbytes + tokens * heads * dim * dtype.itemsize + 2 * angles.nbytes + written
            label = f"{tokens} tokens to {name}"
            bars = (Bar("bandwidth", 0.85),) if tokens == 8192 and name == "model" else ()
            tolerance = {"model": 0.01, "int8": 0.02, "fp8": 0.15, "int4": 0.15}[name]
            run, result, reference = _fused(name, product, angles, slots, heads, kv_heads)
            yield Case("rotary_kv_write", label, run, reference, tolerance, moved, bars=bars, result=result)
            run, result, reference = _plain(name, product[:, heads:], slots, kv_heads)
            fresh = 2 * tokens * kv_heads * dim * dtype.itemsize
            yield Case("kv_write", label, run, reference, tolerance, fresh + written, bars=bars, result=result)


class Cache:
    """Keys and values of one layer, zero at the beginning."""

    def __init__(self, name: str, slots: torch.Tensor, kv_heads: int, dim: int, dtype: torch.dtype) -> None:
        blocks = -(-(slots.shape[0] + BLOCK) // BLOCK)
        made = [empty_cache(KV_FORMATS[name], blocks, BLOCK, kv_heads, dim, dtype, slots.device) for _ in range(2)]
        self.payloads = [payload.view(torch.uint8).zero_().view(payload.dtype) for payload, _ in made]
        factors = [scale.zero_() for _, scale in made if scale is not None]
        self.scales = (factors[0], factors[1]) if factors else None

    def values(self) -> tuple[torch.Tensor, ...]:
        """What it means, float32."""
        return tuple(dequantize(side, self.scales and self.scales[i]) for i, side in enumerate(self.payloads))


def _fused(
    name: str, product: torch.Tensor, angles: torch.Tensor, slots: torch.Tensor, heads: int, kv_heads: int
) -> tuple[Run, Run, Run]:
    """(what is timed, what it leaves, what the reference leaves), each with a cache of its own."""
    ours, theirs = (Cache(name, slots, kv_heads, product.shape[2], product.dtype) for _ in range(2))
    fields = {"num_heads": heads}
    return (
        lambda: rotary_kv_write_triton(product, angles, angles, *ours.payloads, slots, scales=ours.scales, **fields),
        ours.values,
        lambda: (
            rotary_kv_write_reference(product, angles, angles, *theirs.payloads, slots, scales=theirs.scales, **fields),
            theirs.values(),
        )[1],
    )


def _plain(name: str, rows: torch.Tensor, slots: torch.Tensor, kv_heads: int) -> tuple[Run, Run, Run]:
    ours, theirs = (Cache(name, slots, kv_heads, rows.shape[2], rows.dtype) for _ in range(2))
    key, value = rows[:, :kv_heads], rows[:, kv_heads:]
    return (
        lambda: kv_write_triton(key, value, *ours.payloads, slots, ours.scales),
        ours.values,
        lambda: (kv_write_reference(key, value, *theirs.payloads, slots, theirs.scales), theirs.values())[1],
    )
