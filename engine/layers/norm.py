"""Root-mean-square normalization."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x²) + eps) · weight, the mean taken in float32 (Zhang & Sennrich 2019, eq. 4).

    Args:
        weight: [hidden_size], in the dtype of the activations.
        eps: added to the mean square.
    """

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., hidden_size] → the same shape and dtype."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
