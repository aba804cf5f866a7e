"""The soft cap on scores (Gemma 2, section 2): ``cap · tanh(x / cap)``, a piece of the attention kernels."""

# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# (the parameters of a Triton kernel are pointers and scalars of the launch: there is no Python type to write)

from kernels.language import tl, triton


@triton.jit
def capped(x, cap):
    """``cap · tanh(x / cap)`` in float32, by an exp that does not overflow."""
    magnitude = tl.abs(x) / cap
    decay = tl.exp(-2.0 * magnitude)
    bounded = cap * (1.0 - decay) / (1.0 + decay)
    return tl.where(x < 0, -bounded, bounded)
