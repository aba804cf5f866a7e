"""A layer's keys or values in any format, as tensors of their own."""

from __future__ import annotations

import torch

from kernels.kv_formats import KVFormat


def empty_cache(
    format: KVFormat,
    num_blocks: int,
    block_size: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Payload and scales, uninitialised; ``head_dim`` is a multiple of what a payload element holds."""
    slots = (num_blocks, block_size, num_kv_heads)
    width = head_dim // format.values_per_element
    payload = torch.empty((*slots, width), dtype=format.dtype or dtype, device=device)
    if not format.num_scales:
        return payload, None
    return payload, torch.empty((*slots, format.num_scales), dtype=torch.float16, device=device)
