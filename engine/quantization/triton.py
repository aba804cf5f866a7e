"""The quantized weight formats as our Triton kernels read them: the same numbers in another order of memory."""

from __future__ import annotations

import torch

from engine.device import capability
from engine.quantization.formats import SameWeights, WeightFormat
from engine.quantization.int4 import Int4Format
from engine.quantization.int8 import Int8Format
from engine.quantization.scaled import ScaledFormat
from kernels.dispatch import FP8_CAPABILITY
from kernels.quantize_rows import quantize_rows_triton
from kernels.scaled_linear import num_counters, scaled_linear_triton
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


class TritonScaledFormat(SameWeights):
    """W8A8 by :func:`kernels.scaled_linear.scaled_linear_triton`: the same tensors, multiplied in 8 bits.

    Args:
        plain: the format whose tensors these are.
    """

    bits = 8
    plain: ScaledFormat

    def __init__(self, plain: ScaledFormat) -> None:
        super().__init__(plain)
        self.name = plain.name
        self.kind = plain.kind
        # its own: two products with the same counters could overlap
        self.counters = torch.zeros(num_counters(plain.shape[0]), dtype=torch.int32, device=plain.q.device)

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return self.product(*quantize_rows_triton(x, self.kind), x.dtype, bias)

    def product(
        self, payload: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """:meth:`forward` of activations that are quantized already: payload [M, in_features], float32 scales [M]."""
        plain = self.plain
        return scaled_linear_triton(payload, scales, plain.q, plain.scales, bias, dtype, counters=self.counters)

    @property
    def path(self) -> str:
        sums = "int32" if self.kind == "int8" else "float32"
        return f"{self.name}, triton, 8-bit activations by token, {sums} sums"


def _multiplies(kind: str, device: torch.device) -> bool:
    """True if our kernel runs there: FP8 came to the matrix units with compute capability 8.9."""
    return kind == "int8" or device.type == "cpu" or capability(device) >= FP8_CAPABILITY


def to_triton(format: WeightFormat) -> WeightFormat:
    """The same weight for the Triton kernels; formats that they do not know come back as they are."""
    if isinstance(format, Int8Format):
        return TritonFormat(format, pack_int8(format.q, format.scales))
    if isinstance(format, Int4Format):
        scales, zeros = (part.t().contiguous() for part in format.scales_and_zeros.unbind(dim=-1))
        return TritonFormat(format, pack_int4(format.unpacked(), scales, zeros))
    if isinstance(format, ScaledFormat) and _multiplies(format.kind, format.q.device):
        return TritonScaledFormat(format)
    return format
