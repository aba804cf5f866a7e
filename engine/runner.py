"""From a schedule to logits: builds the tensors of a step and has the decoder run over them.

The runner knows tensors and nothing of queues; the scheduler knows queues and nothing of tensors; the executor knows
how a forward pass runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from engine.batching.scheduler import ScheduledRequest
from engine.cache.kv_cache import KVCache
from engine.execution import Executor, Step
from engine.layers.attention import AttentionBackend
from engine.step_tensors import build_step_tensors

if TYPE_CHECKING:
    from engine.models import LoadedModel


class Runner:
    """Runs steps of one model over one cache.

    Args:
        model: the loaded model; its weights may be exchanged between two steps.
        cache: keys and values.
        executor: of the same engine.
    """

    def __init__(self, model: LoadedModel, cache: KVCache, executor: Executor) -> None:
        self.model = model
        self.cache = cache
        self.executor = executor

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
        tensors = build_step_tensors(
            token_ids=_token_ids(rows),
            starts=[row.start for row in rows],
            query_lens=[row.num_tokens for row in rows],
            tables=[row.request.block_ids for row in rows],
            sampled=_sampled_positions(rows),
            block_size=self.cache.block_size,
            device=self.model.device,
        )
        context = self.executor.context
        context.enter(attention, self.cache, tensors.batch)
        pure_decode = tensors.batch.num_tokens == len(rows)
        hidden = self.executor.forward(Step(tensors.token_ids, tensors.positions, context, pure_decode))
        if not tensors.sampled.shape[0]:  # a chunk in the middle of a prompt: the head has nothing to do
            return hidden.new_empty(0, self.model.decoder.vocab_size)
        return self.model.decoder.logits(hidden.index_select(0, tensors.sampled))

    @torch.inference_mode()
    def prompt_logits(self, token_ids: Sequence[int], attention: AttentionBackend) -> torch.Tensor:
        """Logits of every position of a text, computed eagerly on a scratch cache of its own.

        Args:
            token_ids: T tokens, T ≥ 1.

        Returns:
            float32 [T, vocab]; row i is the distribution of token i + 1.
        """
        decoder, size, length = self.model.decoder, self.cache.block_size, len(token_ids)
        blocks = -(-length // size)
        scratch = KVCache(
            num_layers=decoder.num_layers,
            num_blocks=blocks,
            block_size=size,
            num_kv_heads=decoder.num_kv_heads,
            head_dim=decoder.head_dim,
            dtype=self.model.dtype,
            device=self.model.device,
        )
        tensors = build_step_tensors(
            token_ids=list(token_ids),
            starts=[0],
            query_lens=[length],
            tables=[list(range(blocks))],
            sampled=[],
            block_size=size,
            device=self.model.device,
        )
        context = self.executor.context
        context.enter(attention, scratch, tensors.batch)  # every step enters its own again
        return decoder.logits(decoder(tensors.token_ids, tensors.positions, context.attend)).float()


def _token_ids(rows: Sequence[ScheduledRequest]) -> list[int]:
    token_ids: list[int] = []
    for row in rows:
        known_end = row.start + row.num_tokens - row.num_drafts
        token_ids.extend(row.request.token_ids[row.start : known_end])
        token_ids.extend(row.request.draft_token_ids[: row.num_drafts])
    return token_ids


def _sampled_positions(rows: Sequence[ScheduledRequest]) -> list[int]:
    """Rows of the flattened batch whose logits are wanted."""
    wanted: list[int] = []
    end = 0
    for row in rows:
        end += row.num_tokens
        if row.samples:
            wanted.extend(range(end - row.num_drafts - 1, end))
    return wanted
