"""How far quantized weights are from the originals: the published bound next to what is measured."""

from __future__ import annotations

import dataclasses

import torch

from engine.quantization.formats import WeightFormat


@dataclasses.dataclass(frozen=True, slots=True)
class QuantizationError:
    """Weight error of one layer, in weight units.

    Attributes:
        format: the layer's format, e.g. ``"int4-g64"``.
        max_error: measured maximum of abs(w - Q(w)).
        rms_error: measured root of the mean of its square.
        published_bound: maximum over groups of (max - min) / (2^(b+1) - 2), as commonly published. It holds for an
            asymmetric grid on exactly the group's range; a symmetric grid or rounded scales may exceed it.
        half_step: half the largest step of the grid in use: the bound that does hold for round-to-nearest.
    """

    format: str
    max_error: float
    rms_error: float
    published_bound: float
    half_step: float


def quantization_error(weight: torch.Tensor, format: WeightFormat) -> QuantizationError:
    """Measure one layer.

    Args:
        weight: the original, [N, K], any float dtype and device.
        format: the same weight as it is stored now.
    """
    original = weight.float()
    difference = (original - format.dequantize().to(original.device)).abs()
    return QuantizationError(
        format=format.name,
        max_error=float(difference.max()),
        rms_error=float(difference.square().mean().sqrt()),
        published_bound=_published_bound(original, format),
        half_step=format.largest_step() / 2,
    )


def _published_bound(weight: torch.Tensor, format: WeightFormat) -> float:
    if format.bits is None:
        return 0.0
    groups = weight.view(weight.shape[0], -1, format.group_size or weight.shape[1])
    value_range = groups.amax(dim=2) - groups.amin(dim=2)
    return float(value_range.max() / (2 ** (format.bits + 1) - 2))
