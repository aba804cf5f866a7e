"""The tensors that hold keys and values, one pair a layer, cut into blocks.

keys[layer], values[layer]: [num_blocks, block_size, num_kv_heads, head_dim]
token at position p of a request: block_table[p // block_size], row p % block_size
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch

_CACHE_LINE = 64  # bytes


class BlockCopy(NamedTuple):
    """An order to copy the keys and values of a block's first ``num_tokens`` tokens, in all layers."""

    source: int
    destination: int
    num_tokens: int


class KVCache:
    """Zero-filled paged storage.

    On the CPU the pages of the operating system are touched on first use (``torch.zeros`` would touch them all), so
    an idle engine on a laptop does not hold gigabytes it never wrote to.

    Args:
        num_layers, num_blocks, block_size, num_kv_heads, head_dim: the shape.
        dtype, device: of the tensors.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (num_layers, 2, num_blocks, block_size, num_kv_heads, head_dim)
        self._storage = (
            _lazy_zeros(shape, dtype) if device.type == "cpu" else torch.zeros(shape, dtype=dtype, device=device)
        )
        self.keys = [self._storage[layer, 0] for layer in range(num_layers)]
        self.values = [self._storage[layer, 1] for layer in range(num_layers)]
        self.num_blocks = num_blocks
        self.block_size = block_size

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values of all layers."""
        return self._storage.nbytes

    def copy_blocks(self, copies: Iterable[BlockCopy]) -> None:
        """Carry out copies between blocks, in order. On a GPU they are queued on the current stream: no host sync."""
        for source, destination, length in copies:
            self._storage[:, :, destination, :length].copy_(self._storage[:, :, source, :length], non_blocking=True)


def _lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros that the operating system maps when they are first written, aligned to a cache line."""
    nbytes = math.prod(shape) * dtype.itemsize
    pages = np.zeros(nbytes + _CACHE_LINE, dtype=np.uint8)  # calloc
    offset = -pages.ctypes.data % _CACHE_LINE
    return torch.from_numpy(pages[offset : offset + nbytes]).view(dtype).view(shape)
