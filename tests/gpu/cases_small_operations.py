"""Norm, gated activation, rotary, embedding and soft cap: all bound by memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch.nn import functional as F

from kernels.embedding import embedding_reference, embedding_triton
from kernels.gated_mul import gated_mul_reference, gated_mul_triton
from kernels.rms_norm import rms_norm_reference, rms_norm_triton
from kernels.rotary import rotary_reference, rotary_triton
from kernels.soft_cap import soft_cap_reference, soft_cap_triton
from tests.gpu.case import Bar, Case, Size

BARS = (Bar("bandwidth", 0.85),)


@dataclasses.dataclass(frozen=True, slots=True)
class _Made:
    """Random tensors of one dtype on the device, and how exact results on them must be."""

    device: torch.device
    dtype: torch.dtype
    tolerance: float

    def __call__(self, *sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, device=self.device).to(self.dtype)


def cases(device: torch.device, size: Size) -> Iterator[Case]:
    """At 8192 tokens, where the memory is the bound, and at 64 without a bar."""
    full = size == "full"
    made = _Made(device, torch.bfloat16, 0.02) if full else _Made(device, torch.float32, 1e-5)
    hidden, width, heads, head_dim, vocab = (4096, 14336, 40, 128, 128256) if full else (96, 160, 5, 32, 300)
    for tokens in (8192, 64) if full else (3,):
        bars = BARS if tokens == 8192 else ()
        yield from _norm_and_gate(made, tokens, hidden, width, bars)
        yield from _rotary(made, tokens, heads, head_dim, bars)
        yield from _vocabulary(made, tokens, hidden, vocab, bars)


def _norm_and_gate(made: _Made, tokens: int, hidden: int, width: int, bars: tuple[Bar, ...]) -> Iterator[Case]:
    x, residual, weight = made(tokens, hidden), made(tokens, hidden), made(hidden)
    yield Case(
        "rms_norm",
        f"with residual, {tokens} tokens of {hidden}",
        lambda: rms_norm_triton(x, weight, 1e-5, residual),
        lambda: rms_norm_reference(x, weight, 1e-5, residual),
        made.tolerance,
        4 * x.nbytes,
        peers={"torch": lambda: F.rms_norm(x + residual, weight.shape, weight, 1e-5)},
        bars=bars,
    )
    gate_up = made(tokens, 2 * width)
    yield Case(
        "gated_mul",
        f"silu, {tokens} tokens of {width}",
        lambda: gated_mul_triton(gate_up),
        lambda: gated_mul_reference(gate_up),
        made.tolerance,
        gate_up.nbytes * 3 // 2,
        peers={"torch": lambda: F.silu(gate_up[:, :width]) * gate_up[:, width:]},
        bars=bars,
    )


def _rotary(made: _Made, tokens: int, heads: int, head_dim: int, bars: tuple[Bar, ...]) -> Iterator[Case]:
    turned, angles = made(tokens, heads, head_dim), torch.rand(tokens, 1, head_dim, device=made.device)
    yield Case(
        "rotary",
        f"{tokens} tokens of {heads} heads of {head_dim}",
        lambda: rotary_triton(turned, angles, angles),
        lambda: rotary_reference(turned, angles, angles),
        made.tolerance,
        2 * turned.nbytes + 2 * angles.nbytes,
        peers={"torch": lambda: rotary_reference(turned, angles, angles)},
        bars=bars,
    )


def _vocabulary(made: _Made, tokens: int, hidden: int, vocab: int, bars: tuple[Bar, ...]) -> Iterator[Case]:
    table, ids = made(vocab, hidden), torch.randint(0, vocab, (tokens,), device=made.device)
    yield Case(
        "embedding",
        f"{tokens} tokens of {hidden}, vocabulary of {vocab}",
        lambda: embedding_triton(table, ids),
        lambda: embedding_reference(table, ids),
        made.tolerance,
        2 * tokens * hidden * made.dtype.itemsize,
        peers={"torch": lambda: F.embedding(ids, table)},
        bars=bars,
    )
    rows = min(tokens, 256)
    logits = made(rows, vocab)
    yield Case(
        "soft_cap",
        f"{rows} rows of {vocab}",
        lambda: soft_cap_triton(logits, 30.0),
        lambda: soft_cap_reference(logits, 30.0),
        made.tolerance,
        2 * logits.nbytes,
        peers={"torch": lambda: torch.tanh(logits / 30.0) * 30.0},
        bars=bars,
    )
