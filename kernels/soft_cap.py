"""The soft cap on logits (Gemma 2, section 2): ``cap · tanh(x / cap)``."""

# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def"
# (the parameters of a Triton kernel are pointers and scalars of the launch: there is no Python type to write)

import torch

from kernels.language import tl, triton
from kernels.variant import Variant, pointers

_BLOCK = 1024


def soft_cap_reference(x: torch.Tensor, cap: float) -> torch.Tensor:
    """Bound values smoothly to (-cap, cap), in float32.

    Args:
        x: any shape, contiguous.
        cap: above 0.

    Returns:
        The shape and dtype of ``x``.
    """
    return (torch.tanh(x.float() / cap) * cap).to(x.dtype)


def soft_cap_triton(x: torch.Tensor, cap: float) -> torch.Tensor:
    """As :func:`soft_cap_reference`, without an intermediate and rounded once."""
    if not x.is_contiguous():
        raise ValueError("x must be contiguous")
    if not cap > 0:
        raise ValueError(f"cap must be above 0, not {cap}")
    output = torch.empty_like(x)
    if x.numel():
        _soft_cap_kernel[(triton.cdiv(x.numel(), _BLOCK),)](output, x, cap, x.numel(), BLOCK=_BLOCK, num_warps=4)
    return output


@triton.jit
def capped(x, cap):
    """``cap · tanh(x / cap)`` in float32, by an exp that does not overflow."""
    magnitude = tl.abs(x) / cap
    decay = tl.exp(-2.0 * magnitude)
    bounded = cap * (1.0 - decay) / (1.0 + decay)
    return tl.where(x < 0, -bounded, bounded)


@triton.jit
def _soft_cap_kernel(output_ptr, x_ptr, cap, size, BLOCK: tl.constexpr):
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = element < size
    x = tl.load(x_ptr + element, mask=inside, other=0.0).to(tl.float32)
    tl.store(output_ptr + element, capped(x, cap).to(output_ptr.dtype.element_ty), mask=inside)


def aot_variants() -> list[Variant]:
    """Logits of a step."""
    types = {**pointers(torch.bfloat16, "output_ptr", "x_ptr"), "cap": "fp32", "size": "i64"}
    return [Variant(_soft_cap_kernel, "bf16", types, {"BLOCK": _BLOCK}, {"num_warps": 4})]
