"""The weight formats that can be chosen, one row each: the values of the knob ``weights``."""

from __future__ import annotations

from collections.abc import Callable

import torch

from engine.errors import ConfigError
from engine.quantization.formats import ModelDtypeFormat, WeightFormat
from engine.quantization.int4 import GROUP_SIZES, Int4Format, largest_group_size
from engine.quantization.int8 import Int8Format

MakeFormat = Callable[[torch.Tensor, int, torch.device, torch.dtype], WeightFormat]
"""(weight float32 [N, K] on the CPU, group size, device, compute dtype) → the format."""


def _make_int8(weight: torch.Tensor, group_size: int, device: torch.device, dtype: torch.dtype) -> WeightFormat:
    return Int8Format(weight, device, dtype)


def _make_int4(weight: torch.Tensor, group_size: int, device: torch.device, dtype: torch.dtype) -> WeightFormat:
    """The group size asked for, else the largest that divides the width, else unquantized; the path says which."""
    fitting = largest_group_size(weight.shape[1], group_size)
    if fitting is None or weight.shape[0] % 2:
        return ModelDtypeFormat(weight.to(device=device, dtype=dtype))
    return Int4Format(weight, fitting, device, dtype)


QUANTIZED_FORMATS: dict[str, MakeFormat] = {"int8": _make_int8, "int4": _make_int4}


def format_label(weights: str, group_size: int) -> str:
    """``("int4", 64)`` → ``"int4-g64"``; formats without groups are their own label.

    Raises:
        ConfigError: if there is no such format or group size.
    """
    if weights not in ("model", *QUANTIZED_FORMATS):
        choices = ", ".join(("model", *QUANTIZED_FORMATS))
        raise ConfigError(f"{weights!r} is not available.", field="weights", remedy=f"Choose one of: {choices}.")
    if weights != "int4":
        return weights
    if group_size not in GROUP_SIZES:
        choices = ", ".join(map(str, sorted(GROUP_SIZES)))
        raise ConfigError(f"{group_size} is not available.", field="group_size", remedy=f"Choose one of: {choices}.")
    return f"int4-g{group_size}"
