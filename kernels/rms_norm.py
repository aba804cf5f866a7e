"""Root-mean-square norm, with the residual addition that precedes it fused in."""

# ruff: noqa: ANN001
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# (the parameters of a Triton kernel are pointers and scalars of the launch: there is no Python type to write)

import torch

from kernels.language import tl, triton
from kernels.variant import TYPE_NAMES, Variant


def rms_norm_reference(
    hidden: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalize ``hidden + residual``; rounds where transformers' LlamaRMSNorm does.

    Args:
        hidden: [T, hidden_size].
        weight: [hidden_size], in the dtype of ``hidden``.
        eps: added to the mean square.
        residual: [T, hidden_size] or None for zero.

    Returns:
        The normalized rows and the sum ``hidden + residual``, both [T, hidden_size] in the dtype of ``hidden``.
    """
    total = hidden if residual is None else hidden + residual
    wide = total.float()
    normalized = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * normalized.to(hidden.dtype), total


def rms_norm_triton(
    hidden: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`rms_norm_reference`, in one launch that reads and writes every row once; one program a row.

    Args:
        As the reference's; rows contiguous in their last dimension, at most 65,536 wide.
    """
    num_rows, size = hidden.shape
    output = torch.empty((num_rows, size), dtype=hidden.dtype, device=hidden.device)
    total = hidden if residual is None else torch.empty_like(output)
    block = triton.next_power_of_2(size)
    _rms_norm_kernel[(num_rows,)](
        output,
        total,
        hidden,
        hidden if residual is None else residual,
        weight,
        hidden.stride(0),
        hidden.stride(0) if residual is None else residual.stride(0),
        eps,
        HAS_RESIDUAL=residual is not None,
        SIZE=size,
        BLOCK=block,
        num_warps=min(16, max(1, block // 512)),
    )
    return output, total


@triton.jit
def _rms_norm_kernel(
    output_ptr,
    total_ptr,
    hidden_ptr,
    residual_ptr,
    weight_ptr,
    hidden_stride,
    residual_stride,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < SIZE
    hidden = tl.load(hidden_ptr + row * hidden_stride + column, mask=inside, other=0.0)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + row * residual_stride + column, mask=inside, other=0.0)
        # Rounded to the dtype of the stream before it is normalized, as when the addition is an operation of its own.
        hidden = (hidden.to(tl.float32) + residual.to(tl.float32)).to(hidden_ptr.dtype.element_ty)
        tl.store(total_ptr + row * SIZE + column, hidden, mask=inside)
    wide = hidden.to(tl.float32)
    mean_square = tl.sum(wide * wide, axis=0) / SIZE
    normalized = (wide / tl.sqrt(mean_square + eps)).to(hidden_ptr.dtype.element_ty)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0)
    output = normalized.to(tl.float32) * weight.to(tl.float32)
    tl.store(output_ptr + row * SIZE + column, output.to(output_ptr.dtype.element_ty), mask=inside)


def aot_variants() -> list[Variant]:
    """As a model of 8 billion parameters launches it."""
    return [_variant(torch.bfloat16, size=4096)]


def _variant(dtype: torch.dtype, *, size: int) -> Variant:
    element = f"*{TYPE_NAMES[dtype]}"
    types = dict.fromkeys(("output_ptr", "total_ptr", "hidden_ptr", "residual_ptr", "weight_ptr"), element)
    types |= {"hidden_stride": "i32", "residual_stride": "i32", "eps": "fp32"}
    constants: dict[str, int | bool | float | None] = {
        "HAS_RESIDUAL": True,
        "SIZE": size,
        "BLOCK": 1 << (size - 1).bit_length(),
    }
    label = f"{TYPE_NAMES[dtype]} {size} wide, residual"
    return Variant(_rms_norm_kernel, label, types, constants, {"num_warps": 8}, False)
