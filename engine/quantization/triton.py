"""The quantized weight formats as our Triton kernels read them: the same numbers in another order of memory."""

from __future__ import annotations

import torch

from engine.quantization.formats import WeightFormat
from engine.quantization.int4 import Int4Format
from engine.quantization.int8 import Int8Format
from kernels.weight_only_linear import weight_only_linear_triton
from kernels.weight_only_packing import PackedWeight, pack_int4, pack_int8


class TritonFormat(WeightFormat):
    """A weight multiplied by :func:`kernels.weight_only_linear.weight_only_linear_triton`.

    Args:
        plain: the format whose numbers these are; not kept.
        packed: its weight.
    """

    bits: int

    def __init__(self, plain: WeightFormat, packed: PackedWeight) -> None:
        self.name = plain.name
        self.shape = plain.shape
        self.bits = packed.bits
        self.group_size = plain.group_size
        self.packed = packed
        self._step = plain.largest_step()

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return weight_only_linear_triton(x, self.packed, bias)

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        return self.packed.rows(index)

    def tensors(self) -> dict[str, torch.Tensor]:
        return self.packed.tensors()

    def dequantize(self) -> torch.Tensor:
        return self.packed.dequantize()

    def largest_step(self) -> float:
        return self._step

    @property
    def path(self) -> str:
        return f"{self.name.replace('-', ' ')}, triton, float32 sums"


def to_triton(format: WeightFormat) -> WeightFormat:
    """The same weight for the Triton kernels; formats that they do not know come back as they are."""
    if isinstance(format, Int8Format):
        return TritonFormat(format, pack_int8(format.q, format.scales))
    if isinstance(format, Int4Format):
        scales, zeros = (part.t().contiguous() for part in format.scales_and_zeros.unbind(dim=-1))
        return TritonFormat(format, pack_int4(format.unpacked(), scales, zeros))
    return format
