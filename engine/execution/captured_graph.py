"""The decode batch of one bucket as a captured graph.

A replay reads the same addresses as the capture did, so a step's tensors are copied into static buffers. A batch
smaller than its bucket is padded with sequences of one token whose keys and values go to a *scratch block*, one block
of the cache behind those of the pool, which no request ever owns; nobody samples them.

    bucket 4, three sequences          tokens      a  b  c  0
                                       slots      17 33  5  scratch · block_size
                                       contexts    9 40 12  1
                                       table       …  …  …  scratch, 0, 0 …

**Never run on a GPU yet**: on the CPU a stand-in for :class:`GraphCapture` records every operation and every launch and
repeats these alone (``tests/kernels/recorded_graph.py``).
"""

from __future__ import annotations

import abc
from collections.abc import Callable

import torch

from engine.attention.base import AttentionBackend, AttentionBatch
from engine.device import capture_graph, graph_pool
from engine.execution.base import Execution, PreparedShape, Step, TokenRange
from engine.execution.environment import ExecutionEnvironment


class GraphCapture(abc.ABC):
    """Records work on the device."""

    @abc.abstractmethod
    def capture(self, work: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        """Record ``work``: a function that repeats it, and the tensor in which its result then lies."""


class CudaGraphCapture(GraphCapture):
    """``torch.cuda.CUDAGraph``, all captures from one memory pool."""

    def __init__(self) -> None:
        self._pool = graph_pool()

    def capture(self, work: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        """As :meth:`GraphCapture.capture`."""
        return capture_graph(work, self._pool)


class StaticBuffers:
    """The addresses that a bucket's graph reads, filled with padding until a step is copied in.

    Args:
        size: sequences in the bucket.
        max_blocks: width of the block tables.
        scratch_block: block that padding writes to.
        block_size: tokens a block.
        device: of the model.
    """

    def __init__(self, size: int, max_blocks: int, scratch_block: int, block_size: int, device: torch.device) -> None:
        self._padding_slot, self._scratch_block = scratch_block * block_size, scratch_block
        wide, narrow = {"dtype": torch.int64, "device": device}, {"dtype": torch.int32, "device": device}
        self.token_ids = torch.zeros(size, **wide)  # type: ignore[call-overload]
        self.positions = torch.zeros(size, **wide)  # type: ignore[call-overload]
        self.batch = AttentionBatch(
            query_lens=[1] * size,
            context_lens=[1] * size,
            query_start=torch.arange(size + 1, **narrow),  # type: ignore[call-overload]
            context_lens_tensor=torch.ones(size, **narrow),  # type: ignore[call-overload]
            block_tables=torch.zeros(size, max_blocks, **narrow),  # type: ignore[call-overload]
            slot_mapping=torch.full((size,), self._padding_slot, **wide),  # type: ignore[call-overload]
        )
        self.batch.block_tables[:, 0] = scratch_block

    def fill(self, step: Step) -> None:
        """Copy a step of at most ``size`` decoding sequences in, padding behind it. No synchronisation."""
        count, source = step.num_tokens, step.batch
        self.token_ids[:count].copy_(step.token_ids)
        self.positions[:count].copy_(step.positions)
        self.batch.slot_mapping[:count].copy_(source.slot_mapping)
        self.batch.slot_mapping[count:].fill_(self._padding_slot)
        self.batch.context_lens_tensor[:count].copy_(source.context_lens_tensor)
        self.batch.context_lens_tensor[count:].fill_(1)
        # Columns behind a step's own width are never read: a context says how far its table goes.
        self.batch.block_tables[:count, : source.block_tables.shape[1]].copy_(source.block_tables)
        self.batch.block_tables[count:, 0].fill_(self._scratch_block)


class CapturedGraph(PreparedShape):
    """The captured decode batch of one bucket.

    Args:
        run: the forward pass to capture; it reads weights where they lie now, so after a swap the graph must be
            dropped.
        environment: of the mode.
        attention: the backend that is captured.
        buffers: of the bucket's size.
        capture: records.
        tokens: batch sizes served, the last one the bucket's own.
    """

    name = "graphs"

    def __init__(
        self,
        run: Execution,
        environment: ExecutionEnvironment,
        attention: AttentionBackend,
        buffers: StaticBuffers,
        capture: GraphCapture,
        tokens: TokenRange,
    ) -> None:
        self.tokens = tokens
        self._buffers = buffers
        captured = Step(buffers.token_ids, buffers.positions, buffers.batch, attention)

        def work() -> torch.Tensor:
            environment.enter(captured)
            return run.forward(captured)

        with torch.inference_mode():
            self._replay, self._result = capture.capture(work)

    def forward(self, step: Step) -> torch.Tensor:
        """As :meth:`Execution.forward`; the result is valid until the next replay."""
        self._buffers.fill(step)
        self._replay()
        return self._result[: step.num_tokens]
