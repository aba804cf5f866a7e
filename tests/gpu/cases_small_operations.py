"""Norm and gated activation: both bound by memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch.nn import functional as F

from kernels.gated_mul import gated_mul_reference, gated_mul_triton
from kernels.rms_norm import rms_norm_reference, rms_norm_triton
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
    hidden, width = (4096, 14336) if full else (96, 160)
    for tokens in (8192, 64) if full else (3,):
        bars = BARS if tokens == 8192 else ()
        yield from _norm_and_gate(made, tokens, hidden, width, bars)


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
