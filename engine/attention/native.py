"""Attention backend ``native``: our C++ kernel for the CPU reads the paged cache in place."""

from __future__ import annotations

from engine.attention.paged import PagedAttention
from kernels.cpu.attention import kv_write, paged_attention


class NativeAttention(PagedAttention):
    """See :func:`kernels.cpu.attention.paged_attention`."""

    name = "native"
    write = staticmethod(kv_write)
    read = staticmethod(paged_attention)
