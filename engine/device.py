"""The device that launches go to."""

from __future__ import annotations

import contextlib

import torch


def on_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Inside, kernels of Triton, new streams and captured graphs belong to ``device``.

    torch's operators follow their tensors; these follow the thread's current GPU, which is the first one whatever
    device a model was loaded on.
    """
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
