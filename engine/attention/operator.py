"""Attention as one opaque operator, so that a compiled layer serves every layout of the batch and every backend.

A compiled layer is a fixed program over tensors; which sequences are in the batch, where their blocks lie and which
backend attends changes from step to step. None of that goes through the program: it is looked up here, by the handle of
the engine's own :class:`AttendContext`, so that two engines in one process cannot mix.

Why the operator may write the cache without declaring it (``mutates_args`` of a torch custom op): the cache is no
argument of the program, so no other operation in it can be moved across the write; the operator appears once in each
layer's program, so there is no twin to merge it with; and the layer's result depends on its output, so it cannot be
dropped. The order of layers is the order of calls.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence

import torch

from engine.attention.base import AttentionBackend, AttentionBatch, AttentionLayer, NewTokens
from engine.cache.kv_cache import KVCache

_library = torch.library.Library("headroom", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("attend(Tensor query, Tensor key, Tensor value, Tensor where) -> Tensor")  # type: ignore[no-untyped-call]
_handles = itertools.count()
# The one thing shared by all engines: which handle is whose. An entry goes when its engine does.
_contexts: weakref.WeakValueDictionary[int, AttendContext] = weakref.WeakValueDictionary()


class AttendContext:
    """How the layers of one engine reach its cache in the present step.

    Args:
        scales: factor on the attention scores, by layer.
        windows: sliding window, by layer; None where all positions are visible.
    """

    def __init__(self, scales: Sequence[float], windows: Sequence[int | None]) -> None:
        self.handle = next(_handles)
        self._scales, self._windows = list(scales), list(windows)
        self._backend: AttentionBackend | None = None
        self._cache: KVCache | None = None
        self._batch: AttentionBatch | None = None
        self._layers: list[AttentionLayer] = []  # of the present cache
        _contexts[self.handle] = self

    def enter(self, backend: AttentionBackend, cache: KVCache, batch: AttentionBatch) -> None:
        """Set what the following calls of :meth:`attend` use."""
        if cache is not self._cache:
            self._layers = [
                AttentionLayer(keys, values, cache.scales(layer), self._scales[layer], self._windows[layer])
                for layer, (keys, values) in enumerate(zip(cache.keys, cache.values, strict=True))
            ]
        self._backend, self._cache, self._batch = backend, cache, batch

    @property
    def batch(self) -> AttentionBatch:
        """The layout of the present step."""
        assert self._batch is not None, "attention outside of a step"
        return self._batch

    @property
    def backend(self) -> AttentionBackend:
        """The backend of the present step."""
        assert self._backend is not None, "attention outside of a step"
        return self._backend

    @property
    def cache(self) -> KVCache:
        """The cache of the present step: the engine's own, or the scratch one of a text that is looked at."""
        assert self._cache is not None, "attention outside of a step"
        return self._cache

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """:meth:`AttentionBackend.attend` of one layer under the present step's layout."""
        return self.backend.attend(NewTokens(query, key, value), self._layers[layer], self.batch)

    def scale(self, layer: int) -> float:
        """Factor on the attention scores of a layer."""
        return self._scales[layer]

    def window(self, layer: int) -> int | None:
        """Positions that a query of a layer sees, itself included; None for all."""
        return self._windows[layer]

    def where(self, layer: int) -> torch.Tensor:
        """int64 [2] on the CPU, the operator's address of a layer of this engine: handle, layer."""
        return torch.tensor([self.handle, layer], dtype=torch.int64)


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """The operator as a compiled program calls it.

    Args:
        query: [T, num_heads, head_dim]; key, value: [T, num_kv_heads, head_dim].
        where: see :meth:`AttendContext.where`.

    Returns:
        [T, num_heads, head_dim].
    """
    result: torch.Tensor = torch.ops.headroom.attend(query, key, value, where)
    return result


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    handle, layer = where.tolist()  # a tensor of the host: no device is waited for
    # The program was promised a dense result; a backend may give a view.
    return _contexts[handle].attend(layer, query, key, value).contiguous()


def _attend_shape(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    return torch.empty(query.shape, dtype=query.dtype, device=query.device)


_library.impl("attend", _attend, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("headroom::attend", _attend_shape, lib=_library)
