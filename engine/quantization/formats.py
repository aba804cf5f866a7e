"""What a linear layer's weight is kept as: the seam between the decoder and every quantization method.

A new format is a class here or in a file next to this one, and one row in :mod:`engine.quantization.registry`.
"""

from __future__ import annotations

import abc

import torch
from torch.nn import functional as F

from engine.quantization.rows import Weight, row_slices


class WeightFormat(abc.ABC):
    """One stored weight matrix and the way to multiply with it.

    Attributes:
        name: as shown to users and in records, e.g. ``"int4-g64"``.
        shape: (out_features, in_features) of the weight it stands for.
        bits: of one quantized weight; None if it is kept in a float format.
        group_size: input channels that share a scale; None if a whole row does, or nothing is quantized.
    """

    name: str
    shape: tuple[int, int]
    bits: int | None = None
    group_size: int | None = None

    @abc.abstractmethod
    def forward(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x Wᵀ + bias.

        Args:
            x: [M, in_features], in the model's compute dtype.
            bias: [out_features] or None.

        Returns:
            [M, out_features] in the dtype of ``x``.
        """

    @abc.abstractmethod
    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """Rows ``index`` (int64 [T]) of the weight, [T, in_features], float: the lookup of an embedding."""

    @abc.abstractmethod
    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything that is resident for this weight, by role (``weight``, ``scales`` …)."""

    @abc.abstractmethod
    def dequantize(self) -> torch.Tensor:
        """The weight that this format multiplies with, float32 [out_features, in_features], a fresh copy."""

    @property
    @abc.abstractmethod
    def path(self) -> str:
        """What really runs, for the page and the record, e.g. ``"int8: aten _weight_int8pack_mm (M<=8), …"``."""

    def largest_step(self) -> float:
        """Largest distance between neighbours of the quantization grid, in weight units; 0 if there is no grid."""
        return 0.0

    def nbytes(self) -> int:
        """Resident bytes."""
        return sum(tensor.nbytes for tensor in self.tensors().values())


class SameWeights(WeightFormat):
    """Another way to multiply with the tensors of a format; everything but the product is that format's.

    Args:
        plain: the format whose tensors these are.
    """

    def __init__(self, plain: WeightFormat) -> None:
        self.plain = plain
        self.shape = plain.shape

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        return self.plain.rows(index)

    def tensors(self) -> dict[str, torch.Tensor]:
        return self.plain.tensors()

    def dequantize(self) -> torch.Tensor:
        return self.plain.dequantize()

    def largest_step(self) -> float:
        return self.plain.largest_step()


class ModelDtypeFormat(WeightFormat):
    """The weight as loaded, in the model's compute dtype."""

    name = "model"

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight
        self.shape = (weight.shape[0], weight.shape[1])

    @classmethod
    def read(
        cls, weight: Weight, device: torch.device, dtype: torch.dtype, out: torch.Tensor | None = None
    ) -> ModelDtypeFormat:
        """Converted slice by slice into ``out``, [N, K] in ``dtype`` on the device, which is made if not given."""
        target = torch.empty(tuple(weight.shape), dtype=dtype, device=device) if out is None else out
        for rows, values in row_slices(weight, device, dtype):
            target[rows] = values
        return cls(target)

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return F.linear(x, self.weight, bias)

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        return F.embedding(index, self.weight)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"weight": self.weight}

    def dequantize(self) -> torch.Tensor:
        return self.weight.to(torch.float32, copy=True)

    @property
    def path(self) -> str:
        return f"model: {dtype_name(self.weight.dtype)} matmul"


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.bfloat16`` → ``"bfloat16"``."""
    return str(dtype).removeprefix("torch.")
