"""INT4 weights: asymmetric, in groups of input channels that share a scale and a zero point."""

from __future__ import annotations

import math

import torch

from engine.quantization.cpu_ops import int4_block_rows, pack_int4
from engine.quantization.formats import WeightFormat, dtype_name
from engine.quantization.round_to_nearest import GRID_DTYPE, quantize_asymmetric_int4
from engine.quantization.rows import ROWS_MULTIPLE, Weight, row_slices

GROUP_SIZES = (128, 64, 32)

# Rows above which unpacking the weight and one dense product are faster than the packed operator, which unpacks
# once per few rows. Measured at K = 576, N = 3072 on two shared AVX-512 cores, bfloat16, microseconds (third fastest
# of 60; unpacking alone is 500; the unquantized product is 149 at one row and 1107 at 128):
#     rows     1    4    8   16   32   48   64  128
#     packed  54  119  174  406  802 1000 1317 2659
#     dense 1192 1197 1371 1082 1270 1054 1192 1846
PACKED_ROWS_LIMIT = 48


def largest_group_size(in_features: int, wanted: int) -> int | None:
    """The largest supported group size that divides ``in_features`` and is at most ``wanted``; None if none does."""
    return next((size for size in GROUP_SIZES if size <= wanted and in_features % size == 0), None)


class Int4Format(WeightFormat):
    """w ≈ (q - 8) · scale + zero, q in 0 … 15.

    Two values share a byte, in the layout that torch's CPU operator wants where it can be used (see ``cpu_ops``), else
    in the same layout with blocks of whatever size divides the rows; both are unpacked by the same code.

    Args:
        weight: [N, K] to be quantized, slice by slice, N even; not kept.
        group_size: input channels per group, divides K.
        device: where it will live.
        dtype: the model's compute dtype.
    """

    bits = 4
    group_size: int

    def __init__(self, weight: Weight, group_size: int, device: torch.device, dtype: torch.dtype) -> None:
        num_rows, num_columns = weight.shape
        self.shape = (num_rows, num_columns)
        self.group_size = group_size
        self.dtype = dtype
        self.name = f"int4-g{group_size}"
        block_rows = int4_block_rows() if device.type == "cpu" else None
        usable = block_rows is not None and num_rows % block_rows == 0
        self.packed_rows_limit = PACKED_ROWS_LIMIT if usable else 0
        # Of either size whole blocks fill a slice of rows.
        self.block_rows = block_rows if usable and block_rows is not None else math.gcd(num_rows, ROWS_MULTIPLE)
        self.packed = torch.empty(num_rows, num_columns // 2, dtype=torch.uint8, device=device)
        grid = (num_columns // group_size, num_rows, 2)
        self.scales_and_zeros = torch.empty(grid, dtype=GRID_DTYPE, device=device)
        for rows, values in row_slices(weight, device, torch.float32):
            q, scales, zeros = quantize_asymmetric_int4(values, group_size)
            self.packed[rows] = pack_int4(q, self.block_rows)
            self.scales_and_zeros[:, rows] = torch.stack((scales, zeros), dim=-1)

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        y: torch.Tensor
        if x.shape[0] <= self.packed_rows_limit:
            product = torch.ops.aten._weight_int4pack_mm_for_cpu
            y = product(x.to(torch.bfloat16).contiguous(), self.packed, self.group_size, self.scales_and_zeros)
            y = y.to(x.dtype)
        else:
            y = x @ self._unpack(x.dtype)
        return y if bias is None else y + bias

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        scales, zeros = self.scales_and_zeros[:, index].float().repeat_interleave(self.group_size, dim=0).unbind(dim=-1)
        return (self.unpacked()[index].float() - 8) * scales.t() + zeros.t()

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"weight": self.packed, "scales_and_zeros": self.scales_and_zeros}

    def dequantize(self) -> torch.Tensor:
        return self._unpack(torch.float32).t().contiguous()

    def unpacked(self, rows: slice = slice(None)) -> torch.Tensor:
        """q, uint8 [N, K] in 0 … 15; of some rows, which are whole blocks."""
        num_columns = self.shape[1]
        blocks = self.packed[rows].view(-1, num_columns, self.block_rows // 2).transpose(1, 2)
        return torch.cat((blocks & 15, blocks >> 4), dim=1).reshape(-1, num_columns)

    def largest_step(self) -> float:
        return float(self.scales_and_zeros[..., 0].max())

    @property
    def path(self) -> str:
        dense = f"dequantize + {dtype_name(self.dtype)} matmul"
        if not self.packed_rows_limit:
            return f"int4 g{self.group_size}: {dense}"
        packed = f"aten _weight_int4pack_mm_for_cpu in bfloat16 (M<={self.packed_rows_limit})"
        return f"int4 g{self.group_size}: {packed}, {dense} above"

    def _unpack(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight transposed, [K, N] in ``dtype``."""
        num_rows, num_columns = self.shape
        half = self.block_rows // 2
        bytes_ = self.packed.view(num_rows // self.block_rows, num_columns, half).permute(1, 0, 2)
        out = torch.empty(num_columns, num_rows // self.block_rows, 2, half, dtype=dtype, device=self.packed.device)
        # Minus 8 while it is still one byte a value; contiguous scales: both keep the large product below vectorized.
        out[:, :, 0].copy_((bytes_ & 15).view(torch.int8).sub_(8))
        out[:, :, 1].copy_((bytes_ >> 4).view(torch.int8).sub_(8))
        groups = out.view(-1, self.group_size, num_rows)
        scales, zeros = (part.to(dtype).contiguous().unsqueeze(1) for part in self.scales_and_zeros.unbind(dim=-1))
        return torch.addcmul(zeros, groups, scales).view(num_columns, num_rows)
