"""From a schedule to logits: builds the tensors of a step and has the decoder run over them.

The runner knows tensors and nothing of queues; the scheduler knows queues and nothing of tensors; the executor knows
how a forward pass runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from engine.attention.base import AttentionBackend
from engine.batching.scheduler import ScheduledRequest
from engine.cache.kv_cache import KVCache
from engine.execution.base import Step
from engine.execution.executor import Executor
from engine.execution.step_tensors import BlockTables, build_step_tensors

if TYPE_CHECKING:
    from engine.models import LoadedModel


class Runner:
    """Runs steps of one model over one cache.

    Args:
        model: the loaded model; its weights may be swapped between two steps.
        cache: keys and values.
        executor: of the same engine.
    """

    def __init__(self, model: LoadedModel, cache: KVCache, executor: Executor) -> None:
        self.model = model
        self.cache = cache
        self.executor = executor
        self._block_tables = BlockTables()

    @torch.inference_mode()
    def run(self, rows: Sequence[ScheduledRequest], attention: AttentionBackend) -> torch.Tensor:
        """Compute one step.

        Args:
            rows: the ragged batch, at least one row.
            attention: the backend to attend with.

        Returns:
            Logits [R, vocab] of the positions at which a token is to be chosen, in row order: for a row that
            samples, its newest known token and every draft (``num_drafts + 1`` positions); none for other rows.
        """
        token_ids, sampled = _flatten(rows)
        tensors = build_step_tensors(
            token_ids=token_ids,
            starts=[row.start for row in rows],
            query_lens=[row.num_tokens for row in rows],
            tables=[row.request.block_ids for row in rows],
            sampled=sampled,
            block_size=self.cache.block_size,
            device=self.model.device,
            block_tables=self._block_tables,
        )
        hidden = self.executor.forward(Step(tensors.token_ids, tensors.positions, tensors.batch, attention))
        if not tensors.sampled.shape[0]:  # a chunk in the middle of a prompt: the head has nothing to do
            return hidden.new_empty(0, self.model.decoder.vocab_size)
        if tensors.sampled.shape[0] != hidden.shape[0]:  # else every position, in order
            hidden = hidden.index_select(0, tensors.sampled)
        return self.model.decoder.logits(hidden)

    @torch.inference_mode()
    def prompt_logits(self, token_ids: Sequence[int], attention: AttentionBackend) -> torch.Tensor:
        """Logits of every position of a text, computed eagerly on a scratch cache in the format of the engine's.

        Args:
            token_ids: T tokens, T ≥ 1.

        Returns:
            float32 [T, vocab]; row i is the distribution of token i + 1.
        """
        decoder, size, length = self.model.decoder, self.cache.block_size, len(token_ids)
        blocks = -(-length // size)
        scratch = self.cache.like(blocks)
        tensors = build_step_tensors(
            token_ids=list(token_ids),
            starts=[0],
            query_lens=[length],
            tables=[list(range(blocks))],
            sampled=[],
            block_size=size,
            device=self.model.device,
        )
        step = Step(tensors.token_ids, tensors.positions, tensors.batch, attention)
        return decoder.logits(self.executor.forward_over(scratch, step)).float()


def _flatten(rows: Sequence[ScheduledRequest]) -> tuple[list[int], list[int]]:
    """The batch's tokens laid end to end, and the places among them whose logits are wanted."""
    token_ids: list[int] = []
    sampled: list[int] = []
    for row in rows:
        start, count, drafts = row.start, row.num_tokens, row.num_drafts
        if count == 1:  # decode without a draft: most rows of most steps
            token_ids.append(row.request.token_ids[start])
        else:
            token_ids += row.request.token_ids[start : start + count - drafts]
            token_ids += row.request.draft_token_ids[:drafts]
        if row.samples:
            end = len(token_ids)
            sampled.extend(range(end - drafts - 1, end))
    return token_ids, sampled
