"""The quantized weight formats as our Triton kernels read them: the same numbers in another order of memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from engine.device import capability
from engine.quantization.formats import SameWeights, WeightFormat
from engine.quantization.int4 import Int4Format
from engine.quantization.int8 import Int8Format
from engine.quantization.rows import slice_rows
from engine.quantization.scaled import ScaledFormat
from kernels.dispatch import FP8_CAPABILITY
from kernels.quantize_rows import quantize_rows_triton
from kernels.scaled_linear import num_counters, scaled_linear_triton
from kernels.weight_only_linear import weight_only_linear_triton
from kernels.weight_only_packing import PackedWeight, pack_int4, pack_int8
from kernels.weight_only_packing import num_counters as num_packed_counters


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
        q, of_rows = format.q, format.scales
        return TritonFormat(format, _in_slices(format.shape, q.device, lambda rows: pack_int8(q[rows], of_rows[rows])))
    if isinstance(format, Int4Format):
        scales, zeros = (part.t() for part in format.scales_and_zeros.unbind(dim=-1))

        def pack(rows: slice) -> PackedWeight:
            return pack_int4(format.unpacked(rows), scales[rows], zeros[rows])

        return TritonFormat(format, _in_slices(format.shape, format.packed.device, pack))
    if isinstance(format, ScaledFormat) and _multiplies(format.kind, format.q.device):
        return TritonScaledFormat(format)
    return format


def _in_slices(shape: tuple[int, int], device: torch.device, pack: Callable[[slice], PackedWeight]) -> PackedWeight:
    """The packed weight of all rows, of which ``pack`` makes some: packing takes sixteen times the bytes it leaves."""
    num_rows, columns = shape
    step = slice_rows(columns, device)
    first = pack(slice(0, min(step, num_rows)))
    if first.outputs == num_rows:
        return first
    names = [name for name in ("words", "scales", "zeros") if getattr(first, name) is not None]
    whole: dict[str, Any] = {}
    for name in names:  # rows are their second dimension
        part = getattr(first, name)
        whole[name] = part.new_empty(part.shape[0], num_rows, *part.shape[2:])
    for start in range(0, num_rows, step):
        some = first if start == 0 else pack(slice(start, min(start + step, num_rows)))
        for name, target in whole.items():
            target[:, start : start + some.outputs] = getattr(some, name)
    counters = first.counters.new_zeros(num_packed_counters(num_rows))
    return dataclasses.replace(first, **whole, counters=counters, outputs=num_rows)
