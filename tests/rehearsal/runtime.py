"""What a machine with simulated GPUs answers where the engine asks CUDA."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch

from engine.device import CudaRuntime
from tests.rehearsal.simulated_gpu import Simulation, capturing

TOTAL_BYTES = 1 << 30


class SimulatedRuntime(CudaRuntime):
    """See :class:`engine.device.CudaRuntime`.

    Args:
        capability: of all GPUs.

    Attributes:
        current_device: where launches go.
        free_bytes, reserved_bytes: see :meth:`free_and_total` and :meth:`held_in_reserve`.
    """

    def __init__(self, simulation: Simulation, capability: tuple[int, int] = (9, 0)) -> None:
        self.simulation = simulation
        self.compute_capability = capability
        self.free_bytes, self.reserved_bytes, self.released = TOTAL_BYTES // 2, 0, 0
        self.current_device = torch.device("cuda", 0)  # of the one thread that a rehearsal has
        self.compiled: set[tuple[Any, ...]] = set()  # what Triton would have compiled so far

    def count(self) -> int:
        return self.simulation.count

    @contextlib.contextmanager
    def current(self, device: torch.device) -> Iterator[None]:
        previous, self.current_device = self.current_device, torch.device("cuda", device.index or 0)
        try:
            yield
        finally:
            self.current_device = previous

    def properties(self, device: torch.device) -> Any:
        return SimpleNamespace(name="Simulated GPU", total_memory=TOTAL_BYTES, uuid=f"simulated-{device.index}")

    def capability(self, device: torch.device) -> tuple[int, int]:
        return self.compute_capability

    def free_and_total(self, device: torch.device) -> tuple[int, int]:
        return self.free_bytes, TOTAL_BYTES

    def held_in_reserve(self, device: torch.device) -> int:
        return self.reserved_bytes

    def release(self) -> None:
        self.released += 1

    def graph_pool(self) -> Any:
        return object()

    def capture(self, work: Callable[[], torch.Tensor], pool: Any) -> tuple[Callable[[], None], torch.Tensor]:
        """As strict as a capture; a replay asks Python again, unlike one (tests/kernels/recorded_graph.py does not)."""
        work()
        with capturing(self.simulation):
            result: Any = work()

        def replay() -> None:
            again: Any = work()
            result.inner.copy_(again.inner)

        return replay, result
