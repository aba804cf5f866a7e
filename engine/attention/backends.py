"""The attention backends by name: one row of the table for each, and which of them runs here."""

from __future__ import annotations

from collections.abc import Callable

import torch

from engine.attention.base import AttentionBackend
from engine.errors import ConfigError
from kernels.dispatch import choose


def get_backend(
    name: str, device: torch.device | str, dtype: torch.dtype, head_dim: int
) -> tuple[AttentionBackend, str]:
    """The attention backend of that name, and the path that it really takes, for the record.

    Args:
        name: value of the knob ``attention``: auto, native, sdpa, reference or triton.
        device: where model and cache live.
        dtype: of queries and cache.
        head_dim: of one attention head.

    Returns:
        The backend and its path, e.g. ``"sdpa"`` or ``"triton (interpreter)"``.

    Raises:
        ConfigError: if it cannot run here; nothing else is put in its place.
    """
    choice = choose("paged_attention", name, device=device, dtype=dtype, head_dim=head_dim)
    if choice.path is None:
        raise ConfigError(f"{name!r} cannot run here: {choice.reason}", field="attention", remedy=choice.remedy or None)
    return _BACKENDS[choice.path.partition(" ")[0]](), choice.path


# Imported where they are made: Triton and the C++ kernels should load only where they are asked for.


def _make_native() -> AttentionBackend:
    from engine.attention.native import NativeAttention

    return NativeAttention()


def _make_reference() -> AttentionBackend:
    from engine.attention.reference import ReferenceAttention

    return ReferenceAttention()


def _make_sdpa() -> AttentionBackend:
    from engine.attention.sdpa import SdpaAttention

    return SdpaAttention()


def _make_triton() -> AttentionBackend:
    from engine.attention.triton import TritonAttention

    return TritonAttention()


_BACKENDS: dict[str, Callable[[], AttentionBackend]] = {
    "native": _make_native,
    "reference": _make_reference,
    "sdpa": _make_sdpa,
    "triton": _make_triton,
}
"""By the first word of the path that :func:`kernels.dispatch.choose` gives."""
