"""The linear layer: it owns a weight format, which can be swapped while the model is loaded."""

from __future__ import annotations

import torch
from torch import nn

from engine.quantization.formats import WeightFormat


class Linear(nn.Module):
    """y = x Wᵀ + b, where W is kept in a swappable :class:`~engine.quantization.formats.WeightFormat`.

    Args:
        format: the weight, [out_features, in_features], in its present format.
        bias: [out_features] in the activations' dtype, or None. It is never quantized.
        sources: names of the checkpoint's tensors that the weight consists of, stacked by rows.
    """

    swaps = 0
    """How often any linear layer of the process was given a format: who keeps what it derived from formats looks here
    first."""

    def __init__(self, format: WeightFormat, bias: torch.Tensor | None = None, sources: tuple[str, ...] = ()) -> None:
        super().__init__()
        self._format = format
        self.sources = sources
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @property
    def format(self) -> WeightFormat:
        """The weight in its present format."""
        return self._format

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[M, in_features] → [M, out_features] in the dtype of ``x``."""
        return self._format.forward(x, self.bias)

    def swap(self, format: WeightFormat) -> None:
        """Use another format of the same weight from the next call on; the previous one is dropped.

        Raises:
            ValueError: if the shape differs; nothing is swapped then.
        """
        if format.shape != self.format.shape:
            raise ValueError(f"weight of shape {format.shape} cannot replace {self.format.shape}")
        self._format = format
        Linear.swaps += 1

    def nbytes(self) -> int:
        """Resident bytes of weight and bias."""
        return self.format.nbytes() + (0 if self.bias is None else self.bias.nbytes)
