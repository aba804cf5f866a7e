"""The gated MLP, and the activations that a gate may have."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from engine.layers.linear import Linear

Activation = Callable[[torch.Tensor], torch.Tensor]

_gelu_tanh: Activation = functools.partial(F.gelu, approximate="tanh")

ACTIVATIONS: dict[str, Activation] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": _gelu_tanh,
    "gelu_new": _gelu_tanh,
    "relu": F.relu,
}
"""By the name that a ``config.json`` gives them."""


class GatedMLP(nn.Module):
    """y = down(activation(gate(x)) · up(x)) (Shazeer 2020), gate and up in one product.

    Args:
        gate_up_proj: [2 · width, hidden_size].
        down_proj: [hidden_size, width].
        activation: name in :data:`ACTIVATIONS`.
    """

    def __init__(self, gate_up_proj: Linear, down_proj: Linear, activation: str) -> None:
        super().__init__()
        self.gate_up_proj = gate_up_proj
        self.down_proj = down_proj
        self.activation_name = activation
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, hidden_size] → the same."""
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        result: torch.Tensor = self.down_proj(self.activation(gate) * up)
        return result
