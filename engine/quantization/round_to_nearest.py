"""Round-to-nearest: each weight goes to the closest point of its group's grid, with no regard to activations.

Grid parameters are rounded to bfloat16 *before* the weights are assigned to them, since that is how they are stored;
steps are rounded up, so the grid covers the whole group and abs(w - Q(w)) <= step / 2 holds exactly.
"""

from __future__ import annotations

import torch

GRID_DTYPE = torch.bfloat16


def quantize_symmetric_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """8 bits, one scale per output channel, zero maps to zero: w ≈ q · scale.

    Args:
        weight: float32 [N, K].

    Returns:
        q int8 [N, K] in -127 … 127, and scales bfloat16 [N].
    """
    scales = _round_up(weight.abs().amax(dim=1) / 127)
    q = torch.round(weight / _safe(scales).unsqueeze(1)).clamp_(-127, 127)
    return q.to(torch.int8), scales


def quantize_asymmetric_int4(weight: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """4 bits, one scale and one zero point per group of input channels: w ≈ (q - 8) · scale + zero.

    That is the convention of torch's ``_weight_int4pack_mm``: the zero point is a weight value (that of q = 8), not an
    integer, so a group need not straddle zero.

    Args:
        weight: float32 [N, K].
        group_size: divides K.

    Returns:
        q uint8 [N, K] in 0 … 15; scales and zeros, bfloat16 [K / group_size, N].
    """
    groups = weight.view(weight.shape[0], -1, group_size)
    low, high = groups.amin(dim=2), groups.amax(dim=2)
    zeros = (low + (high - low) * (8 / 15)).to(GRID_DTYPE)
    # The rounded zero has shifted the grid: the step must reach both ends from where it is now.
    scales = _round_up(torch.maximum((zeros.float() - low) / 8, (high - zeros.float()) / 7))
    q = (groups - zeros.float().unsqueeze(2)) / _safe(scales).unsqueeze(2)
    q = torch.round(q).add_(8).clamp_(0, 15).to(torch.uint8).view(weight.shape)
    return q, scales.t().contiguous(), zeros.t().contiguous()


def _round_up(values: torch.Tensor) -> torch.Tensor:
    """Float32 to bfloat16, never below the value: the upper 16 bits, plus one where bits were lost (values ≥ 0)."""
    bits = values.contiguous().view(torch.int32)
    return ((bits + 0xFFFF) >> 16).to(torch.int16).view(GRID_DTYPE)


def _safe(scales: torch.Tensor) -> torch.Tensor:
    """Scales as float32 with 1 in place of 0, the scale of a constant group, whose deviations are 0 anyway."""
    scales = scales.float()
    return torch.where(scales > 0, scales, torch.ones_like(scales))
