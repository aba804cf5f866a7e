"""Activations to 8 bits, a scale for each token, fused with what comes before: norm, gated activation, or nothing."""

# ruff: noqa: ANN001
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# (the parameters of a Triton kernel are pointers and scalars of the launch: there is no Python type to write)

import dataclasses

import torch

from kernels.gated_mul import ACTIVATIONS, activate, gated_mul_reference
from kernels.kv_formats import FP8_LARGEST, round_to_e4m3, round_to_even
from kernels.language import tl, triton
from kernels.rms_norm import rms_norm_reference
from kernels.variant import TYPE_NAMES, Variant, pointers


@dataclasses.dataclass(frozen=True, slots=True)
class EightBits:
    """An 8-bit type of activations and weights."""

    name: str
    dtype: torch.dtype
    largest: float


EIGHT_BITS = {
    "int8": EightBits("int8", torch.int8, 127.0),
    "fp8": EightBits("fp8", torch.float8_e4m3fn, FP8_LARGEST),
}
LARGEST_ROW = 65_536  # values that one program holds


def quantize_rows_reference(x: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric, one scale a row: the largest magnitude becomes 127 or 448. Rounds to nearest, ties to even.

    Args:
        x: [T, K], a float type.
        kind: a name in :data:`EIGHT_BITS`.

    Returns:
        [T, K] of 8 bits and float32 [T] scales: ``x ≈ payload · scale``. A row of zeros has scale 0.
    """
    type_ = _type(kind)
    wide = x.float()
    scale = wide.abs().amax(-1) / type_.largest
    scaled = wide * (1.0 / torch.where(scale == 0, 1.0, scale))[:, None]
    scaled = scaled.clamp(-type_.largest, type_.largest)
    return (scaled.round() if kind == "int8" else scaled).to(type_.dtype), scale


def rms_norm_quantize_reference(
    hidden: torch.Tensor, weight: torch.Tensor, eps: float, kind: str, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """:func:`kernels.rms_norm.rms_norm_reference`, quantized: payload, scales, and the sum ``hidden + residual``."""
    normed, total = rms_norm_reference(hidden, weight, eps, residual)
    return (*quantize_rows_reference(normed, kind), total)


def gated_mul_quantize_reference(
    gate_up: torch.Tensor, activation: str, kind: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`kernels.gated_mul.gated_mul_reference`, quantized: payload and scales."""
    return quantize_rows_reference(gated_mul_reference(gate_up, activation), kind)


def quantize_rows_triton(x: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`quantize_rows_reference`, in one launch; one program a row."""
    payload, scales = _results(x, x.shape[1], kind)
    _launch(_quantize_rows_kernel, x, (payload, scales, x, x.stride(0)), x.shape[1], kind)
    return payload, scales


def rms_norm_quantize_triton(
    hidden: torch.Tensor, weight: torch.Tensor, eps: float, kind: str, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As :func:`rms_norm_quantize_reference`, in one launch: the normalized row is never in memory."""
    payload, scales = _results(hidden, hidden.shape[1], kind)
    total = hidden if residual is None else torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    other = hidden if residual is None else residual
    arguments = (payload, scales, total, hidden, other, weight, hidden.stride(0), other.stride(0), eps)
    _launch(_rms_norm_quantize_kernel, hidden, arguments, hidden.shape[1], kind, HAS_RESIDUAL=residual is not None)
    return payload, scales, total


def gated_mul_quantize_triton(gate_up: torch.Tensor, activation: str, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`gated_mul_quantize_reference`, in one launch."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, not {activation!r}")
    size = gate_up.shape[1] // 2
    payload, scales = _results(gate_up, size, kind)
    arguments = (payload, scales, gate_up, gate_up.stride(0))
    _launch(_gated_mul_quantize_kernel, gate_up, arguments, size, kind, ACTIVATION=ACTIVATIONS[activation])
    return payload, scales


def _type(kind: str) -> EightBits:
    if kind not in EIGHT_BITS:
        raise ValueError(f"kind must be one of {', '.join(EIGHT_BITS)}, not {kind!r}")
    return EIGHT_BITS[kind]


def _results(x: torch.Tensor, size: int, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = _type(kind).dtype
    if x.dim() != 2 or x.stride(1) != 1:
        raise ValueError("the rows must be [T, K] and contiguous in their last dimension")
    if size > LARGEST_ROW:
        raise ValueError(f"rows of {size} values are wider than the {LARGEST_ROW} that one program holds")
    payload = torch.empty((x.shape[0], size), dtype=dtype, device=x.device)
    return payload, torch.empty(x.shape[0], dtype=torch.float32, device=x.device)


def _launch(kernel, x: torch.Tensor, arguments: tuple[object, ...], size: int, kind: str, **constants: object) -> None:
    if x.shape[0]:
        block = triton.next_power_of_2(size)
        kernel[(x.shape[0],)](
            *arguments,
            **constants,
            INTEGER=kind == "int8",
            SIZE=size,
            BLOCK=block,
            num_warps=min(16, max(1, block // 512)),
        )


@triton.jit
def _store_quantized(payload_ptr, scales_ptr, row, x, column, inside, INTEGER: tl.constexpr, SIZE: tl.constexpr):
    """Quantize one row, float32 [BLOCK], 0 outside."""
    largest: tl.constexpr = 127.0 if INTEGER else 448.0
    scale = tl.max(tl.abs(x), axis=0) / largest
    scaled = x * (1.0 / tl.where(scale == 0.0, 1.0, scale))
    scaled = tl.minimum(tl.maximum(scaled, -largest), largest)
    scaled = round_to_even(scaled) if INTEGER else round_to_e4m3(scaled)
    tl.store(payload_ptr + row * SIZE + column, scaled.to(payload_ptr.dtype.element_ty), mask=inside)
    tl.store(scales_ptr + row, scale)


@triton.jit
def _quantize_rows_kernel(
    payload_ptr, scales_ptr, x_ptr, x_stride, INTEGER: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < SIZE
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    _store_quantized(payload_ptr, scales_ptr, row, x, column, inside, INTEGER, SIZE)


@triton.jit
def _rms_norm_quantize_kernel(
    payload_ptr,
    scales_ptr,
    total_ptr,
    hidden_ptr,
    residual_ptr,
    weight_ptr,
    hidden_stride,
    residual_stride,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    INTEGER: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < SIZE
    dtype: tl.constexpr = hidden_ptr.dtype.element_ty
    hidden = tl.load(hidden_ptr + row * hidden_stride + column, mask=inside, other=0.0)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + row * residual_stride + column, mask=inside, other=0.0)
        hidden = (hidden.to(tl.float32) + residual.to(tl.float32)).to(dtype)
        tl.store(total_ptr + row * SIZE + column, hidden, mask=inside)
    wide = hidden.to(tl.float32)
    normalized = (wide / tl.sqrt(tl.sum(wide * wide, axis=0) / SIZE + eps)).to(dtype).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    # Rounded as the norm of its own leaves it: the same numbers are quantized.
    normed = (normalized * weight).to(dtype).to(tl.float32)
    _store_quantized(payload_ptr, scales_ptr, row, normed, column, inside, INTEGER, SIZE)


@triton.jit
def _gated_mul_quantize_kernel(
    payload_ptr,
    scales_ptr,
    gate_up_ptr,
    stride,
    ACTIVATION: tl.constexpr,
    INTEGER: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < SIZE
    dtype: tl.constexpr = gate_up_ptr.dtype.element_ty
    gate = tl.load(gate_up_ptr + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * stride + SIZE + column, mask=inside, other=0.0).to(tl.float32)
    product = (activate(gate, ACTIVATION).to(dtype).to(tl.float32) * up).to(dtype).to(tl.float32)
    _store_quantized(payload_ptr, scales_ptr, row, product, column, inside, INTEGER, SIZE)


def aot_variants() -> list[Variant]:
    """Both types, alone and fused, as a model of 8 billion parameters launches them."""
    return [variant for kind in EIGHT_BITS for variant in _variants(kind)]


def _variants(kind: str) -> list[Variant]:
    bf16, results = torch.bfloat16, pointers(_type(kind).dtype, "payload_ptr") | {"scales_ptr": "*fp32"}
    target = 90 if kind == "fp8" else 80
    label = f"{TYPE_NAMES[bf16]} to {kind}"
    narrow: dict[str, int | bool | float | None] = {"INTEGER": kind == "int8", "SIZE": 4096, "BLOCK": 4096}
    wide = narrow | {"SIZE": 14336, "BLOCK": 16384}
    norm = {**results, **pointers(bf16, "total_ptr", "hidden_ptr", "residual_ptr", "weight_ptr")}
    norm |= {"hidden_stride": "i32", "residual_stride": "i32", "eps": "fp32"}
    gated = {**results, "gate_up_ptr": "*bf16", "stride": "i32"}
    plain = {**results, "x_ptr": "*bf16", "x_stride": "i32"}
    return [
        Variant(_quantize_rows_kernel, label, plain, narrow, {"num_warps": 8}, min_target=target),
        Variant(
            _rms_norm_quantize_kernel, label, norm, narrow | {"HAS_RESIDUAL": True}, {"num_warps": 8}, min_target=target
        ),
        Variant(
            _gated_mul_quantize_kernel, label, gated, wide | {"ACTIVATION": 0}, {"num_warps": 16}, min_target=target
        ),
    ]
