"""What the kernels ask a GPU: its compute capability and its name."""

from __future__ import annotations

import torch


def capability(device: torch.device | str) -> tuple[int, int]:
    """Compute capability of a CUDA device, e.g. (9, 0)."""
    return torch.cuda.get_device_capability(device)


def gpu_name(index: int) -> str:
    """As the driver has it, e.g. ``"NVIDIA H200"``."""
    return torch.cuda.get_device_name(index)
