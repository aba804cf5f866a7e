"""The uniform numbers of sampling: Philox4x64-10 (Salmon et al. 2011), the very stream that NumPy's generator gives.

A draw is keyed by the request's seed and the position of the token in its output, so it depends neither on the rest of
the batch nor on preemption or speculation, nor on whether the host or the device draws.
"""

# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# (the parameters of a Triton kernel are pointers and scalars of the launch: there is no Python type to write)

import numpy as np
import torch

from kernels.language import tl, triton

_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
_MASK = 2**64 - 1


def uniform(seed: int, position: int, word: int = 0) -> float:
    """A number in [0, 1) that depends on its arguments alone.

    Args:
        seed: key, 64 bit.
        position: counter, from 0.
        word: which of the four numbers of that counter.
    """
    generator = np.random.Generator(np.random.Philox(key=seed, counter=position))
    return float(generator.random(word + 1)[word])


def uniform_reference(seeds: torch.Tensor, positions: torch.Tensor, word: int = 0) -> torch.Tensor:
    """float64 [R] of int64 [R] seeds (their bits as unsigned) and positions."""
    pairs = zip(seeds.tolist(), positions.tolist(), strict=True)
    return torch.tensor([uniform(seed & _MASK, position, word) for seed, position in pairs], dtype=torch.float64)


@triton.jit
def _high_product(a, b):
    """Upper 64 bits of the product of two uint64, from products of 32-bit halves."""
    low_mask = tl.full([], 0xFFFFFFFF, tl.uint64)
    a_low, a_high, b_low, b_high = a & low_mask, a >> 32, b & low_mask, b >> 32
    middle = a_high * b_low + ((a_low * b_low) >> 32)
    other = a_low * b_high + (middle & low_mask)
    return a_high * b_high + (middle >> 32) + (other >> 32)


@triton.jit
def draw_uniform(seed, position, WORD: tl.constexpr):
    """As :func:`uniform`, float64, of int64 scalars or tensors."""
    k0 = seed.to(tl.uint64, bitcast=True)
    k1 = k0 * 0
    c0 = position.to(tl.uint64, bitcast=True) + 1  # NumPy counts before it draws
    c1, c2, c3 = k0 * 0, k0 * 0, k0 * 0
    m0, m1 = tl.full([], 0xD2E7470EE14C6C93, tl.uint64), tl.full([], 0xCA5A826395121157, tl.uint64)
    w0, w1 = tl.full([], 0x9E3779B97F4A7C15, tl.uint64), tl.full([], 0xBB67AE8584CAA73B, tl.uint64)
    for _ in tl.static_range(10):
        high0, low0 = _high_product(c0, m0), c0 * m0
        high1, low1 = _high_product(c2, m1), c2 * m1
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 += w0
        k1 += w1
    chosen = c0 if WORD == 0 else c1 if WORD == 1 else c2 if WORD == 2 else c3
    return (chosen >> 11).to(tl.float64) * 1.1102230246251565e-16
