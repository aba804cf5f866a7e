"""Rotary position embedding (Su et al. 2021), in the half-split layout of the Hugging Face checkpoints."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from engine.layers.rope_scaling import RopeScaling


@dataclasses.dataclass(frozen=True, slots=True)
class Rope:
    """One rotary embedding; layers may have different ones.

    Attributes:
        dim: how many of a head's leading dimensions are rotated; even.
        theta: base of the frequencies.
        scaling: how they are stretched, or None.
    """

    dim: int
    theta: float
    scaling: RopeScaling | None = None

    def inverse_frequencies(self) -> torch.Tensor:
        """float32 [dim / 2], scaling applied."""
        if self.scaling is None:
            return inverse_frequencies(self.dim, self.theta)
        return self.scaling.inverse_frequencies(_periods(self.dim, self.theta), self.theta)

    @property
    def attention_factor(self) -> float:
        """Factor on cos and sin."""
        return 1.0 if self.scaling is None else self.scaling.attention_factor


def inverse_frequencies(dim: int, theta: float) -> torch.Tensor:
    """theta^(-2i / dim) for i = 0 … dim/2 - 1, float32."""
    return 1.0 / _periods(dim, theta)


def _periods(dim: int, theta: float) -> torch.Tensor:
    return theta ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim)


class RotaryEmbedding(nn.Module):
    """cos and sin of every token's angles, computed once a step and shared by all layers; no table to keep or outgrow.

    Rotating (a, b), the halves of a head, by angle t gives (a·cos t - b·sin t, b·cos t + a·sin t). With the sine
    returned as (-sin, +sin) that is x·cos + swap_halves(x)·sin: the products and sums of the usual ``rotate_half``.

    Args:
        inv_freq: float32 [dim / 2], scaling already applied.
        attention_factor: multiplies cos and sin.
    """

    def __init__(self, inv_freq: torch.Tensor, attention_factor: float = 1.0) -> None:
        super().__init__()
        self.inv_freq = inv_freq
        self.attention_factor = attention_factor

    def forward(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Angles of ``positions`` (int64 [T], in any order) as cos and signed sin, float32 [T, 1, dim]."""
        angles = positions.to(torch.float32).unsqueeze(-1) * self.inv_freq
        cos, sin = angles.cos(), angles.sin()
        if self.attention_factor != 1.0:
            cos, sin = cos * self.attention_factor, sin * self.attention_factor
        return torch.cat((cos, cos), dim=-1).unsqueeze(1), torch.cat((-sin, sin), dim=-1).unsqueeze(1)


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor) -> torch.Tensor:
    """Rotate each head of ``x`` by its token's position, computed in float32.

    Args:
        x: [T, heads, head_dim].
        cos, signed_sin: float32 [T, 1, dim] from :class:`RotaryEmbedding`; dimensions beyond dim are left alone.

    Returns:
        the shape and dtype of ``x``.
    """
    dim = cos.shape[-1]
    if dim < x.shape[-1]:
        return torch.cat((apply_rotary(x[..., :dim], cos, signed_sin), x[..., dim:]), dim=-1)
    swapped = torch.roll(x, dim // 2, dims=-1)
    return torch.addcmul(x * cos, swapped, signed_sin).to(x.dtype)
