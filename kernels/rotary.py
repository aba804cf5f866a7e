"""Rotary position embedding (Su et al. 2021) of the heads of a step, in the half-split layout of the checkpoints."""

# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def"
# (the parameters of a Triton kernel are pointers and scalars of the launch: there is no Python type to write)

import torch

from kernels.language import tl, triton
from kernels.variant import TYPE_NAMES, Variant, pointers


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


def rotary_triton(x: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor) -> torch.Tensor:
    """As :func:`rotary_reference`, in one launch; one program a token and head."""
    num_tokens, num_heads, head_dim = x.shape
    dim = cos.shape[-1]
    check_angles(x, cos, signed_sin)
    output = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if num_tokens:
        _rotary_kernel[(num_tokens, num_heads)](
            output,
            x,
            cos,
            signed_sin,
            *x.stride()[:2],
            HEAD_DIM=head_dim,
            ROTARY_DIM=dim,
            BLOCK_D=triton.next_power_of_2(head_dim),
            num_warps=1,
        )
    return output


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
def rotated(
    cos_ptr,  # of one token
    signed_sin_ptr,
    x,  # the head's values [.., BLOCK_D], float32
    partner,  # those of the other half, float32
    dim,
    ROTARY_DIM: tl.constexpr,
):
    """``x`` rotated; dimensions behind ROTARY_DIM as they are."""
    turns = dim < ROTARY_DIM
    cos = tl.load(cos_ptr + dim, mask=turns, other=1.0)
    sin = tl.load(signed_sin_ptr + dim, mask=turns, other=0.0)
    return x * cos + partner * sin


@triton.jit
def partner_of(dim, ROTARY_DIM: tl.constexpr):
    """The dimension that each one is rotated with; those that are not rotated have themselves."""
    half: tl.constexpr = ROTARY_DIM // 2
    swapped = tl.where(dim < half, dim + half, dim - half)
    return tl.where(dim < ROTARY_DIM, swapped, dim)


@triton.jit
def _rotary_kernel(
    output_ptr,  # [T, heads, HEAD_DIM], contiguous
    x_ptr,
    cos_ptr,  # float32 [T, ROTARY_DIM]
    signed_sin_ptr,
    x_stride_token,
    x_stride_head,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    dim = tl.arange(0, BLOCK_D)
    inside = dim < HEAD_DIM
    row_ptr = x_ptr + token * x_stride_token + head * x_stride_head
    x = tl.load(row_ptr + dim, mask=inside, other=0.0).to(tl.float32)
    partner = tl.load(row_ptr + partner_of(dim, ROTARY_DIM), mask=inside, other=0.0).to(tl.float32)
    angle = token * ROTARY_DIM
    result = rotated(cos_ptr + angle, signed_sin_ptr + angle, x, partner, dim, ROTARY_DIM)
    output = output_ptr + (token * tl.num_programs(1) + head) * HEAD_DIM
    tl.store(output + dim, result.to(output_ptr.dtype.element_ty), mask=inside)


def aot_variants() -> list[Variant]:
    """As a model of 8 billion parameters launches it."""
    types = {**pointers(torch.bfloat16, "output_ptr", "x_ptr"), **pointers(torch.float32, "cos_ptr", "signed_sin_ptr")}
    types |= {"x_stride_token": "i32", "x_stride_head": "i32"}
    constants: dict[str, int | bool | float | None] = {"HEAD_DIM": 128, "ROTARY_DIM": 128, "BLOCK_D": 128}
    return [Variant(_rotary_kernel, f"{TYPE_NAMES[torch.bfloat16]} d=128", types, constants, {"num_warps": 1})]
