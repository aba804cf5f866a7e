"""The one place where the engine asks CUDA what no tensor tells: devices, memory, graphs, and copies from the host.

Everything goes through one :class:`CudaRuntime`. Another can take its place (:func:`using`): so the whole engine is
rehearsed on machines without a GPU (``tests/rehearsal``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

# Bytes; every array of a packed buffer begins at a multiple: Triton would compile a kernel again for an address that is
# none of 16.
_WORD = 16
_DTYPES = {np.int64: torch.int64, np.int32: torch.int32, np.float32: torch.float32}
_BFLOAT16_CAPABILITY = (8, 0)
_GRAPH_WARM_UP_RUNS = 2  # allocations and kernel compilation must not fall into the capture


class CudaRuntime:
    """``torch.cuda``, as far as the engine needs it."""

    def count(self) -> int:
        """How many GPUs torch can use."""
        return torch.cuda.device_count() if torch.cuda.is_available() else 0

    def current(self, device: torch.device) -> contextlib.AbstractContextManager[object]:
        """Inside, ``device`` is the thread's current GPU."""
        return torch.cuda.device(device)

    def properties(self, device: torch.device) -> Any:
        """Of a GPU: ``name``, ``total_memory`` in bytes, ``uuid`` where it tells."""
        return torch.cuda.get_device_properties(device)

    def capability(self, device: torch.device) -> tuple[int, int]:
        """Compute capability, e.g. (9, 0)."""
        return torch.cuda.get_device_capability(device)

    def free_and_total(self, device: torch.device) -> tuple[int, int]:
        """Bytes that the driver could still give out, and bytes of the GPU."""
        return torch.cuda.mem_get_info(device)

    def held_in_reserve(self, device: torch.device) -> int:
        """Bytes that torch's allocator has from the driver and no tensor lies in."""
        return torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)

    def release(self) -> None:
        """Give the allocators' reserves back to the driver."""
        torch.cuda.empty_cache()

    def pinned(self, num_bytes: int) -> torch.Tensor:
        """uint8 of page-locked host memory, from torch's own allocator: it is reused only when no copy reads it."""
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def graph_pool(self) -> Any:
        """A memory pool that several captures share."""
        return torch.cuda.graph_pool_handle()

    def capture(self, work: Callable[[], torch.Tensor], pool: Any) -> tuple[Callable[[], None], torch.Tensor]:
        """Record ``work`` on the current GPU: a function that repeats it, and the tensor its result then lies in."""
        cuda: Any = torch.cuda  # its streams have no types
        stream = cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_GRAPH_WARM_UP_RUNS):
                work()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may talk to the device meanwhile (telemetry, another engine): only this one is watched.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            result = work()
        return graph.replay, result


_runtime = CudaRuntime()


@contextlib.contextmanager
def using(runtime: CudaRuntime) -> Iterator[None]:
    """Inside, in every thread, ``runtime`` answers in the place of ``torch.cuda``."""
    global _runtime
    previous, _runtime = _runtime, runtime
    try:
        yield
    finally:
        _runtime = previous


# -- the GPUs of this machine ----------------------------------------------------------------------------------------


def num_gpus() -> int:
    """How many GPUs torch can use here."""
    return _runtime.count()


def gpu_properties(device: torch.device) -> Any:
    """As :meth:`CudaRuntime.properties`."""
    return _runtime.properties(device)


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a GPU, e.g. (9, 0)."""
    return _runtime.capability(device)


def has_bfloat16(device: torch.device) -> bool:
    """True if the GPU has instructions for bfloat16: torch also says yes where it only emulates them."""
    return _runtime.capability(device) >= _BFLOAT16_CAPABILITY


def on_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Inside, kernels of Triton, new streams and captured graphs belong to ``device``.

    torch's operators follow their tensors; these follow the thread's current GPU, which is the first one whatever
    device a model was loaded on.
    """
    return _runtime.current(device) if device.type == "cuda" else contextlib.nullcontext()


# -- memory ------------------------------------------------------------------------------------------------------------


def total_memory(device: torch.device) -> int:
    """Bytes of a GPU."""
    return int(_runtime.properties(device).total_memory)


def available_memory(device: torch.device) -> int:
    """Bytes of a GPU that tensors can still get: what is free and what torch's allocator keeps in reserve."""
    return _runtime.free_and_total(device)[0] + _runtime.held_in_reserve(device)


def used_memory(device: torch.device) -> int:
    """Bytes of a GPU in use, by whomever."""
    free, total = _runtime.free_and_total(device)
    return total - free


def release_gpu_memory() -> None:
    """Give what torch's allocators keep in reserve back to the driver."""
    if _runtime.count():
        _runtime.release()


# -- graphs ------------------------------------------------------------------------------------------------------------


def graph_pool() -> Any:
    """As :meth:`CudaRuntime.graph_pool`."""
    return _runtime.graph_pool()


def capture_graph(work: Callable[[], torch.Tensor], pool: Any) -> tuple[Callable[[], None], torch.Tensor]:
    """As :meth:`CudaRuntime.capture`."""
    return _runtime.capture(work, pool)


# -- from the host to the device -----------------------------------------------------------------------------------


def to_device(arrays: Sequence[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """The arrays as tensors: on the CPU in place, elsewhere by one copy that the host does not wait for.

    ``torch.tensor(numbers, device=…)``, or a list as an index, waits until the copy is done.

    Args:
        arrays: int32, int64 or float32.
    """
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    host = _runtime.pinned(packed_bytes(arrays))
    pack(arrays, host.numpy())
    return unpack(host.to(device, non_blocking=True), arrays)


def packed_bytes(arrays: Sequence[np.ndarray]) -> int:
    """Bytes that :func:`pack` fills."""
    return sum(-(-array.nbytes // _WORD) * _WORD for array in arrays)


def pack(arrays: Sequence[np.ndarray], buffer: np.ndarray) -> None:
    """Write the arrays one behind the other into a buffer of bytes."""
    offset = 0
    for array in arrays:
        buffer[offset : offset + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        offset += -(-array.nbytes // _WORD) * _WORD


def unpack(buffer: torch.Tensor, arrays: Sequence[np.ndarray]) -> list[torch.Tensor]:
    """Views of a packed uint8 buffer with the shapes and dtypes of ``arrays``."""
    tensors, offset = [], 0
    for array in arrays:
        dtype = _DTYPES[array.dtype.type]
        tensors.append(buffer[offset : offset + array.nbytes].view(dtype).view(array.shape))
        offset += -(-array.nbytes // _WORD) * _WORD
    return tensors
