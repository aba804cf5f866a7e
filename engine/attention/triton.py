"""Attention backend ``triton``: our paged kernels, which read the cache through the block tables without gathering."""

from __future__ import annotations

from engine.attention.paged import PagedAttention, attended_by
from kernels.kv_write import kv_write_triton
from kernels.paged_attention import paged_attention_triton


class TritonAttention(PagedAttention):
    """See :func:`kernels.paged_attention.paged_attention_triton`."""

    name = "triton"
    write = staticmethod(kv_write_triton)
    read = staticmethod(attended_by(paged_attention_triton))
