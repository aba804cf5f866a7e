"""Norm, gated activation, rotary, embedding and soft cap: all bound by memory."""

from __future__ import annotations

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


def cases(device: torch.device, size: Size) -> Iterator[Case]:
    """At 8192 tokens, where the memory is the bound, and at 64 without a bar."""
    full = size == "full"
    dtype = torch.bfloat16 if full else torch.float32
    hidden, width, heads, head_dim, vocab = (4096, 14336, 40, 128, 128256) if full else (96, 160, 5, 32, 300)
    tolerance = 0.02 if full else 1e-5
    for tokens in (8192, 64) if full else (3,):
        bars = BARS if tokens == 8192 else ()
        shape = f"{tokens} tokens"

        def made(*sizes: int) -> torch.Tensor:
            return torch.randn(*sizes, device=device).to(dtype)

        x, residual, weight = made(tokens, hidden), made(tokens, hidden), made(hidden)
        yield Case(
            "rms_norm",
            f"with residual, {shape} of {hidden}",
            lambda x=x, r=residual, w=weight: rms_norm_triton(x, w, 1e-5, r),
            lambda x=x, r=residual, w=weight: rms_norm_reference(x, w, 1e-5, r),
            tolerance,
            4 * x.nbytes,
            peers={"torch": lambda x=x, r=residual, w=weight: F.rms_norm(x + r, w.shape, w, 1e-5)},
            bars=bars,
        )
        gate_up = made(tokens, 2 * width)
        yield Case(
            "gated_mul",
            f"silu, {shape} of {width}",
            lambda g=gate_up: gated_mul_triton(g),
            lambda g=gate_up: gated_mul_reference(g),
            tolerance,
            gate_up.nbytes * 3 // 2,
            peers={"torch": lambda g=gate_up, n=width: F.silu(g[:, :n]) * g[:, n:]},
            bars=bars,
        )
        del x, residual, gate_up
        turned, angles = made(tokens, heads, head_dim), torch.rand(tokens, 1, head_dim, device=device)
        yield Case(
            "rotary",
            f"{shape} of {heads} heads of {head_dim}",
            lambda x=turned, a=angles: rotary_triton(x, a, a),
            lambda x=turned, a=angles: rotary_reference(x, a, a),
            tolerance,
            2 * turned.nbytes + 2 * angles.nbytes,
            peers={"torch": lambda x=turned, a=angles: rotary_reference(x, a, a)},
            bars=bars,
        )
        table, ids = made(vocab, hidden), torch.randint(0, vocab, (tokens,), device=device)
        yield Case(
            "embedding",
            f"{shape} of {hidden}, vocabulary of {vocab}",
            lambda t=table, i=ids: embedding_triton(t, i),
            lambda t=table, i=ids: embedding_reference(t, i),
            tolerance,
            2 * tokens * hidden * dtype.itemsize,
            peers={"torch": lambda t=table, i=ids: F.embedding(i, t)},
            bars=bars,
        )
        rows = min(tokens, 256)
        logits = made(rows, vocab)
        yield Case(
            "soft_cap",
            f"{rows} rows of {vocab}",
            lambda x=logits: soft_cap_triton(x, 30.0),
            lambda x=logits: soft_cap_reference(x, 30.0),
            tolerance,
            2 * logits.nbytes,
            peers={"torch": lambda x=logits: torch.tanh(x / 30.0) * 30.0},
            bars=bars,
        )
