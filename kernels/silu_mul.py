"""The gated activation of a Llama MLP: ``silu(gate) * up`` on the output of the fused gate/up projection."""

# ruff: noqa: ANN001
# mypy: disable-error-code="no-untyped-def"
# (the parameters of a Triton kernel are pointers and scalars of the launch: there is no Python type to write)

import torch
import torch.nn.functional as F

from kernels.language import tl, triton
from kernels.variant import TYPE_NAMES, Variant

_BLOCK = 1024


def silu_mul_reference(gate_up: torch.Tensor) -> torch.Tensor:
    """``silu(gate_up[:, :I]) * gate_up[:, I:]``.

    Args:
        gate_up: [T, 2 · I], the gate in the first half.

    Returns:
        [T, I] in the dtype of ``gate_up``.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def silu_mul_triton(gate_up: torch.Tensor) -> torch.Tensor:
    """As :func:`silu_mul_reference`, without the intermediate; rows contiguous in their last dimension."""
    num_rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    output = torch.empty((num_rows, size), dtype=gate_up.dtype, device=gate_up.device)
    _silu_mul_kernel[(num_rows, triton.cdiv(size, _BLOCK))](
        output, gate_up, gate_up.stride(0), SIZE=size, BLOCK=_BLOCK, num_warps=4
    )
    return output


@triton.jit
def _silu_mul_kernel(output_ptr, gate_up_ptr, stride, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < SIZE
    gate = tl.load(gate_up_ptr + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * stride + SIZE + column, mask=inside, other=0.0).to(tl.float32)
    # Rounded between the two operations, as when they are two.
    activated = (gate / (1.0 + tl.exp(-gate))).to(output_ptr.dtype.element_ty).to(tl.float32)
    tl.store(output_ptr + row * SIZE + column, (activated * up).to(output_ptr.dtype.element_ty), mask=inside)


def aot_variants() -> list[Variant]:
    """As a model of 8 billion parameters launches it."""
    return [_variant(torch.bfloat16, size=14336)]


def _variant(dtype: torch.dtype, *, size: int) -> Variant:
    element = f"*{TYPE_NAMES[dtype]}"
    types = {"output_ptr": element, "gate_up_ptr": element, "stride": "i32"}
    constants: dict[str, int | bool | float | None] = {"SIZE": size, "BLOCK": 1024}
    label = f"{TYPE_NAMES[dtype]} {size} wide"
    return Variant(_silu_mul_kernel, label, types, constants, {"num_warps": 4}, False)
