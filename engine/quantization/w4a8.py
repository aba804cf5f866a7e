"""W4A8: INT4 weights in groups of 32 input channels, and activations rounded to 8 bits in the same groups.

What llama.cpp does with its Q4_1 weights on a CPU (their activations are Q8_1). A scale for every 32 activations keeps
outliers from costing their whole token its precision, as they do under w8a8, and the products of bytes take about half
the vector operations of 16-bit or float ones, which is what a prompt or a large batch waits for.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from engine.quantization.formats import SameWeights, dtype_name
from engine.quantization.int4 import Int4Format
from engine.quantization.rows import Weight
from kernels.cpu.linear import BYTE_GROUP, round_to_bytes


class W4A8Format(SameWeights):
    """w ≈ (q - 8) · scale + zero as :class:`Int4Format`, multiplied with x ≈ p · scale, p in -127 … 127.

    This class multiplies by torch; :class:`engine.quantization.native.NativeFormat` multiplies the integers.

    Args:
        weight: [N, K] to be quantized, slice by slice, N even and K a multiple of 32; not kept.
        device: where it will live.
        dtype: the model's compute dtype.
    """

    bits = 4
    name = "w4a8"
    group_size: int = BYTE_GROUP
    plain: Int4Format

    def __init__(self, weight: Weight, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(Int4Format(weight, BYTE_GROUP, device, dtype))
        self.dtype = dtype

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return F.linear(round_to_bytes(x), self.plain.dequantize().to(x.dtype), bias)

    @property
    def path(self) -> str:
        return f"w4a8: 8-bit activations in groups of {BYTE_GROUP}, widened to a {dtype_name(self.dtype)} matmul"
