"""Capability probes of torch's quantized CPU products: does the operator exist here, and does it mean what we think?

Both are internal operators, whose packing depends on the instruction set. A probe multiplies a small matrix and
compares with the plain formula; an operator that is missing or disagrees is not used, and the path says so.
"""

from __future__ import annotations

import functools

import torch

_PROBE_N, _PROBE_K, _PROBE_GROUP = 128, 64, 32
_BLOCK_CANDIDATES = (64, 32, 16)


@functools.cache
def int8_product_works() -> bool:
    """True if ``aten::_weight_int8pack_mm`` computes x (q · scale)ᵀ in bfloat16 on this CPU."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(-127, 128, (_PROBE_N, _PROBE_K), dtype=torch.int8, generator=generator)
    scales = torch.rand(_PROBE_N, generator=generator).bfloat16()
    x = torch.randn(4, _PROBE_K, generator=generator).bfloat16()
    try:
        result = torch.ops.aten._weight_int8pack_mm(x, q, scales)
    except (RuntimeError, NotImplementedError, AttributeError):
        return False
    return _agrees(result, x.float() @ (q.float() * scales.float().unsqueeze(1)).t())


@functools.cache
def int4_block_rows() -> int | None:
    """Output channels per block of the packed INT4 layout on this CPU, or None if the operator cannot be used.

    The layout, found by the probe and relied on when a weight is unpacked for a large batch:

        packed.view(N / B, K, B / 2)[n, k, j] = q[n·B + j, k]  |  q[n·B + B/2 + j, k] << 4
    """
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(0, 16, (_PROBE_N, _PROBE_K), dtype=torch.int32, generator=generator)
    scales = torch.rand(_PROBE_K // _PROBE_GROUP, _PROBE_N, generator=generator).bfloat16()
    zeros = torch.randn(scales.shape, generator=generator).bfloat16()
    x = torch.randn(4, _PROBE_K, generator=generator).bfloat16()
    try:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1)
        scales_and_zeros = torch.stack((scales, zeros), dim=-1)
        result = torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, _PROBE_GROUP, scales_and_zeros)
    except (RuntimeError, NotImplementedError, AttributeError):
        return None
    grid = [parameter.float().repeat_interleave(_PROBE_GROUP, dim=0).t() for parameter in (scales, zeros)]
    if not _agrees(result, x.float() @ ((q - 8) * grid[0] + grid[1]).t()):
        return None
    return next((rows for rows in _BLOCK_CANDIDATES if torch.equal(pack_int4(q.to(torch.uint8), rows), packed)), None)


def pack_int4(q: torch.Tensor, block_rows: int) -> torch.Tensor:
    """Two values a byte in the layout of :func:`int4_block_rows`.

    Args:
        q: uint8 [N, K] in 0 … 15; ``block_rows`` divides N.

    Returns:
        uint8 [N, K / 2] where K is even (its bytes are those of [N / B, K, B / 2]).
    """
    num_rows, num_columns = q.shape
    blocks = q.view(num_rows // block_rows, 2, block_rows // 2, num_columns)
    bytes_ = blocks[:, 0] | (blocks[:, 1] << 4)
    return bytes_.transpose(1, 2).reshape(num_rows, num_columns // 2).contiguous()  # one block alone reshapes to a view


def _agrees(result: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((result.float() - expected).abs().max() <= 0.02 * expected.abs().max())
