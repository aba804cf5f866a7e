"""Number formats of the paged KV cache: what a slot holds, and the arithmetic that makes it.

| format | payload of a slot and KV head | scales | bytes of a head of D dimensions |
|---|---|---|---|
| model | D values in the model's dtype | none | 2 · D (16-bit) |
| fp8 | D × e4m3 | one float16 | D + 2 |
| int8 | D × int8, symmetric | one float16 | D + 2 |
| int4 | D / 2 bytes, two dimensions each | float16 scale and minimum | D / 2 + 4 |

Scales are per slot and KV head: a token is quantized when it is written, without looking at any other, so a value never
depends on what else is in the batch. INT4's byte j holds dimension 2j in its low and 2j + 1 in its high half: taking
them apart interleaves neighbours, which stays within a thread's registers.

    payload  [num_blocks, block_size, num_kv_heads, D or D / 2]        contiguous
    scales   [num_blocks, block_size, num_kv_heads, 1 or 2]            float16, contiguous
"""

# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# (the parameters of a Triton kernel are pointers and scalars of the launch: there is no Python type to write)

import dataclasses

import torch

from kernels.language import tl, triton

MODEL: int = 0
FP8: int = 1
INT8: int = 2
INT4: int = 3
FP8_LARGEST = 448.0  # of e4m3 (Micikevicius et al. 2022, table 1)


@dataclasses.dataclass(frozen=True, slots=True)
class KVFormat:
    """How keys and values are stored.

    Attributes:
        name: ``"model"``, ``"fp8"``, ``"int8"`` or ``"int4"``.
        number: as kernels know it.
        dtype: of the payload; None for the model's own.
        num_scales: of a slot and KV head.
        values_per_element: dimensions that share a payload element.
    """

    name: str
    number: int
    dtype: torch.dtype | None
    num_scales: int
    values_per_element: int = 1

    def head_bytes(self, head_dim: int, model_dtype: torch.dtype) -> int:
        """Bytes of one slot and KV head, scales included."""
        element = (self.dtype or model_dtype).itemsize
        return head_dim // self.values_per_element * element + 2 * self.num_scales


KV_FORMATS = {
    format.name: format
    for format in (
        KVFormat("model", MODEL, None, 0),
        KVFormat("fp8", FP8, torch.float8_e4m3fn, 1),
        KVFormat("int8", INT8, torch.int8, 1),
        KVFormat("int4", INT4, torch.uint8, 2, values_per_element=2),
    )
}


def format_of(cache: torch.Tensor) -> KVFormat:
    """The format of a payload tensor: its element type tells.

    Raises:
        ValueError: if no format has that type.
    """
    for format in KV_FORMATS.values():
        if format.dtype is cache.dtype:
            return format
    if cache.dtype.is_floating_point:
        return KV_FORMATS["model"]
    raise ValueError(f"no KV cache format stores {cache.dtype}")


def quantize(x: torch.Tensor, format: KVFormat) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Payload and scales of [..., head_dim] values. Rounds to nearest, ties to even, with the scale as it is stored."""
    if format.number == MODEL:
        return x, None
    wide = x.float()
    if format.number == INT4:
        low, high = wide.amin(-1, keepdim=True), wide.amax(-1, keepdim=True)
        scale, minimum = _stored((high - low) / 15.0), _stored(low)
        q = ((wide - minimum.float()) / _divisor(scale)).round().clamp(0, 15).to(torch.uint8)
        return q[..., 0::2] | (q[..., 1::2] << 4), torch.cat((scale, minimum), dim=-1)
    largest = 127.0 if format.number == INT8 else FP8_LARGEST
    scale = _stored(wide.abs().amax(-1, keepdim=True) / largest)
    scaled = (wide / _divisor(scale)).clamp(-largest, largest)
    return (scaled.round() if format.number == INT8 else scaled).to(format.dtype), scale


def _stored(scale: torch.Tensor) -> torch.Tensor:
    return scale.clamp(-65504.0, 65504.0).half()


def _divisor(scale: torch.Tensor) -> torch.Tensor:
    wide = scale.float()
    return torch.where(wide == 0, 1.0, wide)  # all values alike (zero): the quotient is 0


def dequantize(payload: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    """float32 [..., head_dim] of what :func:`quantize` gave."""
    format = format_of(payload)
    if scales is None:
        return payload.float()
    if format.number == INT4:
        q = torch.stack((payload & 15, payload >> 4), dim=-1).flatten(-2).float()
        return q * scales[..., :1].float() + scales[..., 1:].float()
    return payload.float() * scales.float()


# -- in kernels -------------------------------------------------------------------------------------------------------


@triton.jit
def round_to_even(x):
    """The nearest whole number of |x| < 2^22, ties to even: what is added pushes the fraction out of the mantissa."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def round_to_e4m3(x):
    """The nearest value of e4m3 of |x| ≤ 448, ties to even, in float32: what follows converts it exactly.

    The interpreter of Triton 3.7 rounds ties up and loses carries into the exponent; a GPU would round as this does.
    """
    power = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)  # of two, at most |x|
    step = tl.maximum(power, 0.015625) * 0.125  # three bits of mantissa; subnormal below 2^-6
    return round_to_even(x / step) * step


@triton.jit
def quantized_rows(x, inside, FORMAT: tl.constexpr):
    """Whole numbers (or FP8's values) of rows [R, D] in float32, and their float16 scales and minima [R].

    Args:
        x: float32 [R, D], 0 outside.
        inside: [1, D], the dimensions that exist.
    """
    if FORMAT == 3:
        low = tl.min(tl.where(inside, x, float("inf")), axis=1)
        high = tl.max(tl.where(inside, x, float("-inf")), axis=1)
        scale = tl.minimum((high - low) / 15.0, 65504.0).to(tl.float16)
        minimum = tl.minimum(tl.maximum(low, -65504.0), 65504.0).to(tl.float16)
        largest = 15.0
        smallest = 0.0
    else:
        largest = 127.0 if FORMAT == 2 else 448.0
        smallest = -largest
        scale = tl.minimum(tl.max(tl.abs(x), axis=1) / largest, 65504.0).to(tl.float16)
        minimum = tl.zeros_like(scale)
    wide = scale.to(tl.float32)
    divisor = tl.where(wide == 0.0, 1.0, wide)
    scaled = (x - minimum.to(tl.float32)[:, None]) / divisor[:, None]
    scaled = tl.minimum(tl.maximum(scaled, smallest), largest)
    return round_to_e4m3(scaled) if FORMAT == 1 else round_to_even(scaled), scale, minimum
