"""The weight formats as the C++ kernels of the CPU read them: the same numbers in another order of memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from engine.quantization.formats import ModelDtypeFormat, WeightFormat, dtype_name
from engine.quantization.int4 import Int4Format
from engine.quantization.int8 import Int8Format
from engine.quantization.rows import slice_rows
from engine.quantization.w4a8 import W4A8Format
from kernels.cpu.build import native
from kernels.cpu.linear import PanelWeight, linear, pack_float, pack_int4, pack_int8, pack_w4a8


class NativeFormat(WeightFormat):
    """A weight in panels, multiplied by :func:`kernels.cpu.linear.linear`.

    Args:
        name: of the format whose numbers these are, e.g. ``"int4-g64"``.
        packed: the weight.
        bits, group_size, step: of that format, see :class:`WeightFormat`.
    """

    def __init__(self, name: str, packed: PanelWeight, bits: int | None, group_size: int | None, step: float) -> None:
        self.name = name
        self.packed = packed
        self.shape = (packed.outputs, packed.inputs)
        self.bits = bits
        self.group_size = group_size
        self._step = step

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return linear(x, self.packed, bias)

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        return self.packed.rows(index)

    def tensors(self) -> dict[str, torch.Tensor]:
        parts = {"weight": self.packed.panels, "scales": self.packed.scales, "grids": self.packed.grids}
        return {role: tensor for role, tensor in parts.items() if tensor is not None}

    def dequantize(self) -> torch.Tensor:
        return self.packed.dequantize()

    def largest_step(self) -> float:
        return self._step

    @property
    def path(self) -> str:
        kind = dtype_name(self.packed.panels.dtype) if self.name == "model" else self.name.replace("-", " ")
        prefix = "model: " if self.name == "model" else ""
        arithmetic = "float32 sums" if self.bits is None else f"{self.packed.activation_bits}-bit activations"
        return f"{prefix}{kind}, native {native().isa}, {arithmetic}"


def to_native(format: WeightFormat) -> WeightFormat:
    """The same weight for the native kernels; it takes not a byte more. Packed slice by slice: besides the two there is
    never more than a slice.

    Formats that they do not know come back as they are, and so do weights whose outputs fill no whole panels or whose
    inputs fill no whole quads.
    """
    if format.shape[0] % native().panel or format.shape[1] % 4:
        return format
    if isinstance(format, ModelDtypeFormat):
        weight = format.weight
        packed = _in_slices(format.shape, lambda rows: pack_float(weight[rows]))
        return NativeFormat("model", packed, None, None, 0.0)
    if isinstance(format, Int8Format):
        q, of_rows = format.q, format.scales
        packed = _in_slices(format.shape, lambda rows: pack_int8(q[rows], of_rows[rows]))
        return NativeFormat("int8", packed, 8, None, format.largest_step())
    if isinstance(format, Int4Format | W4A8Format):
        plain = format.plain if isinstance(format, W4A8Format) else format
        scales, zeros = (part.t() for part in plain.scales_and_zeros.unbind(dim=-1))
        pack = pack_w4a8 if isinstance(format, W4A8Format) else pack_int4
        packed = _in_slices(format.shape, lambda rows: pack(plain.unpacked(rows), scales[rows], zeros[rows]))
        return NativeFormat(format.name, packed, 4, format.group_size, format.largest_step())
    return format


def _in_slices(shape: tuple[int, int], pack: Callable[[slice], PanelWeight]) -> PanelWeight:
    """The panels of all rows, of which ``pack`` makes some: every tensor of them begins with the rows."""
    num_rows, columns = shape
    step = slice_rows(columns, torch.device("cpu"))
    first = pack(slice(0, min(step, num_rows)))
    if first.outputs == num_rows:
        return first
    names = [name for name in ("panels", "scales", "grids") if getattr(first, name) is not None]
    whole: dict[str, Any] = {}
    for name in names:
        part = getattr(first, name)
        whole[name] = part.new_empty(part.shape[0] * num_rows // first.outputs, *part.shape[1:])
    for start in range(0, num_rows, step):
        part = first if start == 0 else pack(slice(start, min(start + step, num_rows)))
        for name, target in whole.items():
            filled = getattr(part, name)
            begin = target.shape[0] * start // num_rows
            target[begin : begin + filled.shape[0]] = filled
    return dataclasses.replace(first, **whole, outputs=num_rows)
