"""W8A8: weights and activations of 8 bits, INT8 or FP8, with a scale for each output and for each token.

Activations are quantized as they come (dynamically), so nothing has to be calibrated, and a token's result does not
depend on which others are in its batch. Dettmers et al. 2022, section 3; Micikevicius et al. 2022.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from engine.quantization.formats import WeightFormat, dtype_name
from engine.quantization.rows import Weight, row_slices

#: Name of the format to the name of its 8-bit type in :data:`kernels.quantize_rows.EIGHT_BITS`.
KINDS = {"w8a8": "int8", "fp8": "fp8"}
_E4M3_IN_FLOAT16 = 2.0**8  # the bits of an e4m3 number, read as those of a float16, mean a 256th


class ScaledFormat(WeightFormat):
    """w ≈ q · scale, multiplied with x ≈ p · scale: y = (p qᵀ) · (scale of the token) · (scale of the output).

    This class multiplies by torch, in the compute dtype with float32 sums; the 8-bit matrix units are used by
    :class:`engine.quantization.triton.TritonScaledFormat`.

    Args:
        name: a key of :data:`KINDS`.
        weight: [N, K] to be quantized, slice by slice; not kept.
        device: where it will live.
        dtype: the model's compute dtype.
    """

    bits = 8

    def __init__(self, name: str, weight: Weight, device: torch.device, dtype: torch.dtype) -> None:
        from kernels.quantize_rows import EIGHT_BITS, quantize_rows_reference  # Triton loads only where it is asked for

        self.name = name
        self.kind = KINDS[name]
        self.shape = (weight.shape[0], weight.shape[1])
        self.q = torch.empty(self.shape, dtype=EIGHT_BITS[self.kind].dtype, device=device)
        self.scales = torch.empty(self.shape[0], dtype=torch.float32, device=device)
        for rows, values in row_slices(weight, device, torch.float32):
            self.q[rows], self.scales[rows] = quantize_rows_reference(values, self.kind)
        # sums of INT8 products leave the range of float16
        self.dtype = torch.float32 if dtype is torch.float16 else dtype
        self._quantize = quantize_rows_reference

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        p, token_scales = self._quantize(x, self.kind)
        sums = F.linear(p.to(self.dtype), self._widened().to(self.dtype)).float()
        y = (sums * token_scales[:, None] * (self.scales * self._unit())).to(x.dtype)
        return y if bias is None else y + bias

    def _widened(self) -> torch.Tensor:
        """The stored numbers, divided by :meth:`_unit`, in a type that the CPU converts quickly."""
        if self.kind == "int8" or self.q.device.type != "cpu":
            return self.q
        bits = self.q.view(torch.int8).to(torch.int16)  # sign and four bits of exponent move to float16's places
        return (bits & 0x7F).bitwise_left_shift_(7).bitwise_or_(bits.bitwise_and_(-0x8000)).view(torch.float16)

    def _unit(self) -> float:
        return 1.0 if self.kind == "int8" or self.q.device.type != "cpu" else _E4M3_IN_FLOAT16

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        return self.q[index].float() * self.scales[index].unsqueeze(1)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"weight": self.q, "scales": self.scales}

    def dequantize(self) -> torch.Tensor:
        return self.q.float() * self.scales.unsqueeze(1)

    def largest_step(self) -> float:
        # between 256 and 448, the largest numbers of e4m3, neighbours are 32 apart
        return float(self.scales.max()) * (1.0 if self.kind == "int8" else 32.0)

    @property
    def path(self) -> str:
        return f"{self.name}: 8-bit activations by token, widened to a {dtype_name(self.dtype)} matmul"
