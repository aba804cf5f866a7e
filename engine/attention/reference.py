"""Attention backend ``reference``: plain softmax in float32, to check the others against."""

from __future__ import annotations

from engine.attention.paged import PagedAttention, attended_by
from kernels.kv_write import kv_write_reference
from kernels.paged_attention import paged_attention_reference


class ReferenceAttention(PagedAttention):
    """See :func:`kernels.paged_attention.paged_attention_reference`."""

    name = "reference"
    write = staticmethod(kv_write_reference)
    read = staticmethod(attended_by(paged_attention_reference))
