"""INT8 weights: symmetric, one scale per output channel."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from engine.quantization.cpu_ops import int8_product_works
from engine.quantization.formats import WeightFormat, dtype_name
from engine.quantization.round_to_nearest import GRID_DTYPE, quantize_symmetric_int8
from engine.quantization.rows import Weight, row_slices

# Rows above which unpacking the weight and one dense product are faster than the packed operator, which reads the
# weight once per row. Measured at K = 576, N = 3072 on two AVX-512 cores, bfloat16, microseconds:
#     rows    1    4    8   16   32   64  128
#     packed 52   98  197  388  803 1533 3061
#     dense 227  244  289  342  543  723 1242
PACKED_ROWS_LIMIT = 12


class Int8Format(WeightFormat):
    """w ≈ q · scale, q in -127 … 127.

    Args:
        weight: [N, K] to be quantized, slice by slice; not kept.
        device: where it will live.
        dtype: the model's compute dtype.
    """

    name = "int8"
    bits = 8

    def __init__(self, weight: Weight, device: torch.device, dtype: torch.dtype) -> None:
        self.shape = (weight.shape[0], weight.shape[1])
        self.q = torch.empty(self.shape, dtype=torch.int8, device=device)
        self.scales = torch.empty(self.shape[0], dtype=GRID_DTYPE, device=device)
        for rows, values in row_slices(weight, device, torch.float32):
            self.q[rows], self.scales[rows] = quantize_symmetric_int8(values)
        self.dtype = dtype
        self.packed_rows_limit = PACKED_ROWS_LIMIT if device.type == "cpu" and int8_product_works() else 0

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        y: torch.Tensor
        if x.shape[0] <= self.packed_rows_limit:
            y = torch.ops.aten._weight_int8pack_mm(x.to(torch.bfloat16).contiguous(), self.q, self.scales).to(x.dtype)
        else:
            y = F.linear(x, self.q.to(x.dtype)) * self.scales.to(x.dtype)  # one scale a column: applied to the result
        return y if bias is None else y + bias

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        return self.q[index].float() * self.scales[index].float().unsqueeze(1)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"weight": self.q, "scales": self.scales}

    def dequantize(self) -> torch.Tensor:
        return self.q.float() * self.scales.float().unsqueeze(1)

    def largest_step(self) -> float:
        return float(self.scales.max())

    @property
    def path(self) -> str:
        dense = f"dequantize + {dtype_name(self.dtype)} matmul"
        if not self.packed_rows_limit:
            return f"int8: {dense}"
        return f"int8: aten _weight_int8pack_mm in bfloat16 (M<={self.packed_rows_limit}), {dense} above"
