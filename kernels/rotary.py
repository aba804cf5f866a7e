"""Rotary position embedding (Su et al. 2021) in the half-split layout of the checkpoints: pieces of
:mod:`kernels.rotary_kv_write`."""

# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# (the parameters of a Triton kernel are pointers and scalars of the launch: there is no Python type to write)

import torch

from kernels.language import tl, triton


def rotary_reference(x: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor) -> torch.Tensor:
    """Rotate each head by its token's position, in float32: ``x · cos + swap_halves(x) · signed_sin``.

    Args:
        x: [T, heads, head_dim], any strides with a contiguous last dimension.
        cos, signed_sin: float32 [T, 1, dim], the sine as (-sin, +sin); dim ≤ head_dim, dimensions beyond it are
            left alone.

    Returns:
        [T, heads, head_dim] in the dtype of ``x``.
    """
    dim = cos.shape[-1]
    turned = x[..., :dim]
    rotated = torch.addcmul(turned * cos, torch.roll(turned, dim // 2, dims=-1), signed_sin).to(x.dtype)
    return torch.cat((rotated, x[..., dim:]), dim=-1)


def check_angles(x: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor) -> None:
    """Raises ValueError unless the angles are float32 [T, 1, dim], contiguous, with an even dim that fits a head."""
    dim = cos.shape[-1]
    if x.stride(-1) != 1:
        raise ValueError("the heads must be contiguous in their last dimension")
    if dim % 2 or dim > x.shape[-1]:
        raise ValueError(f"cos has {dim} dimensions: an even number of at most {x.shape[-1]} is needed")
    for name, tensor in (("cos", cos), ("signed_sin", signed_sin)):
        if tensor.shape != (x.shape[0], 1, dim) or tensor.dtype != torch.float32 or not tensor.is_contiguous():
            raise ValueError(f"{name} must be float32 [T, 1, dim] and contiguous, not {list(tensor.shape)}")


@triton.jit
def partner_of(dim, ROTARY_DIM: tl.constexpr):
    """The dimension that each one is rotated with; those that are not rotated have themselves."""
    half: tl.constexpr = ROTARY_DIM // 2
    swapped = tl.where(dim < half, dim + half, dim - half)
    return tl.where(dim < ROTARY_DIM, swapped, dim)
