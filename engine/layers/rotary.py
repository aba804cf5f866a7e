"""Rotary position embedding (Su et al. 2021), in the half-split layout of the Hugging Face checkpoints."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import nn


@dataclasses.dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Llama 3.1's scaling by frequency: long wavelengths are stretched, short ones kept, a ramp between.

    Attributes:
        factor: how much the longest wavelengths are stretched.
        low_freq_factor, high_freq_factor: the ramp lies between original_max_position / these wavelengths.
        original_max_position: context length of the pre-training, in tokens.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int

    def apply(self, inv_freq: torch.Tensor) -> torch.Tensor:
        """Scaled inverse frequencies, float32 [head_dim / 2]."""
        wavelength = 2 * math.pi / inv_freq
        rotations = self.original_max_position / wavelength
        ramp = (rotations - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        ramp = ramp.clamp(0, 1)
        return (1 - ramp) * inv_freq / self.factor + ramp * inv_freq


def inverse_frequencies(head_dim: int, theta: float) -> torch.Tensor:
    """theta^(-2i / head_dim) for i = 0 … head_dim/2 - 1, float32."""
    return 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim))


class RotaryEmbedding(nn.Module):
    """cos and sin of every token's angles, computed once a step and shared by all layers; no table to keep or outgrow.

    Rotating (a, b), the halves of a head, by angle t gives (a·cos t - b·sin t, b·cos t + a·sin t). With the sine
    returned as (-sin, +sin) that is x·cos + swap_halves(x)·sin: the products and sums of the usual ``rotate_half``.

    Args:
        inv_freq: float32 [head_dim / 2], scaling already applied.
    """

    def __init__(self, inv_freq: torch.Tensor) -> None:
        super().__init__()
        self.inv_freq = inv_freq

    def forward(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Angles of ``positions`` (int64 [T], in any order) as cos and signed sin, float32 [T, 1, head_dim]."""
        angles = positions.to(torch.float32).unsqueeze(-1) * self.inv_freq
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((cos, cos), dim=-1).unsqueeze(1), torch.cat((-sin, sin), dim=-1).unsqueeze(1)


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor) -> torch.Tensor:
    """Rotate each head of ``x`` by its token's position, computed in float32.

    Args:
        x: [T, heads, head_dim].
        cos, signed_sin: float32 [T, 1, head_dim] from :class:`RotaryEmbedding`.

    Returns:
        the shape and dtype of ``x``.
    """
    swapped = torch.roll(x, x.shape[-1] // 2, dims=-1)
    return torch.addcmul(x * cos, swapped, signed_sin).to(x.dtype)
