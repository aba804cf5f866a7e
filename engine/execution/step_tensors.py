"""The tensors of a step: computed with numpy on the host, brought to the device in one copy.

What it costs: ``python -m tests.benchmarks.overhead``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from engine.attention.base import AttentionBatch
from engine.device import to_device


@dataclasses.dataclass(frozen=True, slots=True)
class StepTensors:
    """What a forward pass reads.

    Attributes:
        token_ids, positions: int64 [T], the ragged batch laid end to end.
        sampled: int64 [R], rows of the batch whose logits are wanted.
        batch: layout for attention.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    sampled: torch.Tensor
    batch: AttentionBatch


class BlockTables:
    """The block tables of one step as an array, kept for the next: a decode step changes one row in ``block_size``.

    A list of blocks only grows or gives way to another list, so the same list of the same length has the same blocks.
    """

    def __init__(self) -> None:
        self._array = np.zeros((0, 0), np.int32)
        self._tables: list[list[int]] = []  # the lists themselves, of which a row is a copy
        self._lengths: list[int] = []

    def lay_out(self, tables: Sequence[list[int]], used: Sequence[int]) -> np.ndarray:
        """int32 [B, max(used)]: each row begins with the blocks that its sequence uses; what follows is not read.

        The array is a view that holds until the next call.

        Args:
            tables: block ids of each sequence, in order.
            used: how many of them the step reads.
        """
        lengths = list(map(len, tables))
        self._make_room(len(tables), max(lengths))
        array, known, known_lengths = self._array, self._tables, self._lengths
        for row, (table, length) in enumerate(zip(tables, lengths, strict=True)):
            if known[row] is not table or known_lengths[row] != length:
                array[row, :length] = table
                known[row], known_lengths[row] = table, length
        return array[: len(tables), : max(used)]

    def _make_room(self, rows: int, columns: int) -> None:
        """Forget everything where it does not fit any more; twice as much fits then."""
        if rows > self._array.shape[0] or columns > self._array.shape[1]:
            shape = max(2 * rows, self._array.shape[0]), max(2 * columns, self._array.shape[1])
            self._array = np.zeros(shape, np.int32)
            self._tables, self._lengths = [[] for _ in range(shape[0])], [0] * shape[0]


def build_step_tensors(
    *,
    token_ids: list[int],
    starts: list[int],
    query_lens: list[int],
    tables: Sequence[list[int]],
    sampled: list[int],
    block_size: int,
    device: torch.device,
    block_tables: BlockTables | None = None,
) -> StepTensors:
    """Lay out a step.

    Args:
        token_ids: T tokens, sequence after sequence.
        starts: position of each sequence's first token computed now.
        query_lens: tokens each sequence computes now, T in all.
        tables: block ids of each sequence, in order; at least as many as its context needs.
        sampled: rows whose logits are wanted.
        block_size: tokens a block.
        device: where the tensors are to be.
        block_tables: of the step before, in which this one's are laid out; on the CPU the result is valid until then.
    """
    # Plain integers for what is one a sequence: numpy costs a microsecond and more for each operation.
    context_lens = [start + length for start, length in zip(starts, query_lens, strict=True)]
    # A request may hold more blocks than this step reads: cut, so that backends gather no more than they need.
    padded = (block_tables or BlockTables()).lay_out(tables, [-(-length // block_size) for length in context_lens])
    if len(token_ids) == len(starts):  # every sequence decodes
        query_start = np.arange(len(starts) + 1, dtype=np.int32)
        positions = np.array(starts, np.int64)
        slots = np.array(
            [table[at // block_size] * block_size + at % block_size for table, at in zip(tables, starts, strict=True)],
            np.int64,
        )
    else:
        first, lengths = np.array(starts, np.int64), np.array(query_lens, np.int64)
        query_start = np.zeros(len(starts) + 1, np.int32)
        np.cumsum(lengths, out=query_start[1:])
        sequence = np.repeat(np.arange(len(starts)), lengths)
        positions = np.arange(len(token_ids)) + (first - query_start[:-1])[sequence]
        slots = padded[sequence, positions // block_size] * np.int64(block_size) + positions % block_size
    wide = [np.array(token_ids, np.int64), positions, slots, np.array(sampled, np.int64)]
    narrow = [query_start, np.array(context_lens, np.int32), padded]
    tokens, places, mapping, rows, start, context, table_tensor = to_device([*wide, *narrow], device)
    batch = AttentionBatch(query_lens, context_lens, start, context, table_tensor, mapping)
    return StepTensors(tokens, places, rows, batch)
