"""The tensors that hold keys and values, one pair a layer, cut into blocks.

keys[layer], values[layer]: [num_blocks, block_size, num_kv_heads, head_dim], INT4 half as wide
token at position p of a request: block_table[p // block_size], row p % block_size

:mod:`kernels.kv_formats` says what a slot holds in each number format; a quantized cache has scales next to it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch

from kernels.kv_formats import KV_FORMATS, KVFormat
from kernels.kv_write import KVScales

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
        dtype: of the model.
        device: where it lies.
        format: how keys and values are stored; by default in the dtype of the model.

    Raises:
        ValueError: if the format packs more dimensions into a byte than divide ``head_dim``.
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
        format: KVFormat = KV_FORMATS["model"],
    ) -> None:
        if head_dim % format.values_per_element:
            raise ValueError(f"head_dim must be a multiple of {format.values_per_element} for {format.name}")
        slots = (num_layers, 2, num_blocks, block_size, num_kv_heads)
        payload = _zeros((*slots, head_dim // format.values_per_element), format.dtype or dtype, device)
        self._storage = [payload]
        self._scales: list[KVScales | None] = [None] * num_layers
        if format.num_scales:
            scales = _zeros((*slots, format.num_scales), torch.float16, device)
            self._storage.append(scales)
            self._scales = [(scales[layer, 0], scales[layer, 1]) for layer in range(num_layers)]
        self.keys = [payload[layer, 0] for layer in range(num_layers)]
        self.values = [payload[layer, 1] for layer in range(num_layers)]
        self.format = format
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._shape = {"num_layers": num_layers, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
        self._dtype, self._device = dtype, device

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values of all layers, scales included."""
        return sum(tensor.nbytes for tensor in self._storage)

    def scales(self, layer: int) -> KVScales | None:
        """The scales of a layer's keys and of its values; None where the format has none."""
        return self._scales[layer]

    def like(self, num_blocks: int) -> KVCache:
        """An empty cache of another size and the same format."""
        return KVCache(
            num_blocks=num_blocks,
            block_size=self.block_size,
            dtype=self._dtype,
            device=self._device,
            format=self.format,
            **self._shape,
        )

    def copy_blocks(self, copies: Iterable[BlockCopy]) -> None:
        """Carry out copies between blocks, in order. On a GPU they are queued on the current stream: no host sync."""
        for source, destination, length in copies:
            for tensor in self._storage:
                tensor[:, :, destination, :length].copy_(tensor[:, :, source, :length], non_blocking=True)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return _lazy_zeros(shape, dtype)


def _lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros that the operating system maps when they are first written, aligned to a cache line."""
    nbytes = math.prod(shape) * dtype.itemsize
    pages = np.zeros(nbytes + _CACHE_LINE, dtype=np.uint8)  # calloc
    offset = -pages.ctypes.data % _CACHE_LINE
    return torch.from_numpy(pages[offset : offset + nbytes]).view(dtype).view(shape)
