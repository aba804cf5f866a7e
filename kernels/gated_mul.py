"""The gated activation of an MLP: ``activation(gate) * up`` on the output of the fused gate/up projection."""

# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# (the parameters of a Triton kernel are pointers and scalars of the launch: there is no Python type to write)

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F

from kernels.language import tl, triton
from kernels.variant import TYPE_NAMES, Variant, pointers

_BLOCK = 1024
SILU: int = 0
GELU: int = 1
GELU_TANH: int = 2
RELU: int = 3
ACTIVATIONS: dict[str, int] = {
    "silu": SILU,
    "swish": SILU,
    "gelu": GELU,
    "gelu_pytorch_tanh": GELU_TANH,
    "gelu_new": GELU_TANH,
    "relu": RELU,
}
"""Number of each activation, by the name that a ``config.json`` gives it."""

_REFERENCES: dict[int, Callable[[torch.Tensor], torch.Tensor]] = {
    SILU: F.silu,
    GELU: F.gelu,
    GELU_TANH: functools.partial(F.gelu, approximate="tanh"),
    RELU: F.relu,
}


def gated_mul_reference(gate_up: torch.Tensor, activation: str = "silu") -> torch.Tensor:
    """``activation(gate_up[:, :I]) * gate_up[:, I:]`` (Shazeer 2020).

    Args:
        gate_up: [T, 2 · I], the gate in the first half.
        activation: a name in :data:`ACTIVATIONS`.

    Returns:
        [T, I] in the dtype of ``gate_up``.

    Raises:
        ValueError: if there is no such activation.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    return _REFERENCES[_number(activation)](gate) * up


def gated_mul_triton(gate_up: torch.Tensor, activation: str = "silu") -> torch.Tensor:
    """As :func:`gated_mul_reference`, without the intermediate; rows contiguous in their last dimension."""
    if gate_up.dim() != 2 or gate_up.shape[1] % 2 or gate_up.stride(1) != 1:
        raise ValueError("gate_up must be [T, 2 · I] and contiguous in its last dimension")
    num_rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    output = torch.empty((num_rows, size), dtype=gate_up.dtype, device=gate_up.device)
    if num_rows:
        _gated_mul_kernel[(num_rows, triton.cdiv(size, _BLOCK))](
            output, gate_up, gate_up.stride(0), SIZE=size, ACTIVATION=_number(activation), BLOCK=_BLOCK, num_warps=4
        )
    return output


def _number(activation: str) -> int:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, not {activation!r}")
    return ACTIVATIONS[activation]


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """The activation in float32. tanh by exp, which every version of Triton has, and which does not overflow here."""
    if ACTIVATION == 0:
        return x / (1.0 + tl.exp(-x))
    if ACTIVATION == 1:
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    if ACTIVATION == 2:
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        return x * (1.0 - 1.0 / (1.0 + tl.exp(2.0 * inner)))
    return tl.maximum(x, 0.0)


@triton.jit
def _gated_mul_kernel(
    output_ptr, gate_up_ptr, stride, SIZE: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < SIZE
    gate = tl.load(gate_up_ptr + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * stride + SIZE + column, mask=inside, other=0.0).to(tl.float32)
    # Rounded between the two operations, as when they are two.
    activated = activate(gate, ACTIVATION).to(output_ptr.dtype.element_ty).to(tl.float32)
    tl.store(output_ptr + row * SIZE + column, (activated * up).to(output_ptr.dtype.element_ty), mask=inside)


def aot_variants() -> list[Variant]:
    """As models of 8 billion parameters launch it."""
    return [_variant(torch.bfloat16, 14336, "silu"), _variant(torch.float16, 15360, "gelu_pytorch_tanh")]


def _variant(dtype: torch.dtype, size: int, activation: str) -> Variant:
    types = {**pointers(dtype, "output_ptr", "gate_up_ptr"), "stride": "i32"}
    constants: dict[str, int | bool | float | None] = {
        "SIZE": size,
        "ACTIVATION": ACTIVATIONS[activation],
        "BLOCK": _BLOCK,
    }
    label = f"{activation} {TYPE_NAMES[dtype]} {size} wide"
    return Variant(_gated_mul_kernel, label, types, constants, {"num_warps": 4})
