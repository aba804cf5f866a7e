"""From a schedule to logits: builds the tensors of a step and runs the decoder over them.

The runner knows tensors and nothing of queues; the scheduler knows queues and nothing of tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from engine.batching.scheduler import ScheduledRequest
from engine.cache.kv_cache import KVCache
from engine.layers.attention import AttentionBackend, AttentionBatch

if TYPE_CHECKING:
    from engine.models import LoadedModel


class Runner:
    """Runs steps of one model over one cache.

    Args:
        model: the loaded model; its weights may be exchanged between two steps.
        cache: keys and values.
    """

    def __init__(self, model: LoadedModel, cache: KVCache) -> None:
        self.model = model
        self.cache = cache

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
        token_ids, positions = _tokens_and_positions(rows)
        batch = self._attention_batch(rows)
        hidden = self._forward(self.cache, token_ids, positions, batch, attention)
        wanted = _sampled_positions(rows)
        index = torch.tensor(wanted, dtype=torch.int64, device=self.model.device)
        return self.model.decoder.logits(hidden.index_select(0, index))

    @torch.inference_mode()
    def prompt_logits(self, token_ids: Sequence[int], attention: AttentionBackend) -> torch.Tensor:
        """Logits of every position of a text, computed on a scratch cache of its own.

        Args:
            token_ids: T tokens, T ≥ 1.

        Returns:
            float32 [T, vocab]; row i is the distribution of token i + 1.
        """
        decoder, size = self.model.decoder, self.cache.block_size
        blocks = -(-len(token_ids) // size)
        scratch = KVCache(
            num_layers=decoder.num_layers,
            num_blocks=blocks,
            block_size=size,
            num_kv_heads=decoder.num_kv_heads,
            head_dim=decoder.head_dim,
            dtype=self.model.dtype,
            device=self.model.device,
        )
        length = len(token_ids)
        batch = self._make_batch([length], [length], [list(range(blocks))], list(range(length)))
        hidden = self._forward(scratch, list(token_ids), list(range(length)), batch, attention)
        return decoder.logits(hidden).float()

    def _forward(
        self,
        cache: KVCache,
        token_ids: list[int],
        positions: list[int],
        batch: AttentionBatch,
        attention: AttentionBackend,
    ) -> torch.Tensor:
        decoder, device = self.model.decoder, self.model.device

        def attend(layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            return attention.attend(
                query,
                key,
                value,
                cache.keys[layer],
                cache.values[layer],
                batch,
                scale=decoder.attention_scale(layer),
                window=decoder.layer_windows[layer],
            )

        tokens = torch.tensor(token_ids, dtype=torch.int64, device=device)
        places = torch.tensor(positions, dtype=torch.int64, device=device)
        return decoder(tokens, places, attend)

    def _attention_batch(self, rows: Sequence[ScheduledRequest]) -> AttentionBatch:
        size = self.cache.block_size
        slots: list[int] = []
        for row in rows:
            table = row.request.block_ids
            slots.extend(
                table[position // size] * size + position % size
                for position in range(row.start, row.start + row.num_tokens)
            )
        query_lens = [row.num_tokens for row in rows]
        context_lens = [row.start + row.num_tokens for row in rows]
        return self._make_batch(query_lens, context_lens, [row.request.block_ids for row in rows], slots)

    def _make_batch(
        self, query_lens: list[int], context_lens: list[int], tables: list[list[int]], slots: list[int]
    ) -> AttentionBatch:
        device = self.model.device
        starts = [0]
        for length in query_lens:
            starts.append(starts[-1] + length)
        size = self.cache.block_size
        # A request may hold more blocks than this step reads: cut, so that backends gather no more than they need.
        used = [-(-length // size) for length in context_lens]
        width = max(used)
        padded = [[*table[:count], *([0] * (width - count))] for table, count in zip(tables, used, strict=True)]
        return AttentionBatch(
            query_lens=query_lens,
            context_lens=context_lens,
            query_start=torch.tensor(starts, dtype=torch.int32, device=device),
            context_lens_tensor=torch.tensor(context_lens, dtype=torch.int32, device=device),
            block_tables=torch.tensor(padded, dtype=torch.int32, device=device),
            slot_mapping=torch.tensor(slots, dtype=torch.int64, device=device),
        )


def _tokens_and_positions(rows: Sequence[ScheduledRequest]) -> tuple[list[int], list[int]]:
    token_ids: list[int] = []
    positions: list[int] = []
    for row in rows:
        end = row.start + row.num_tokens
        known_end = end - row.num_drafts
        token_ids.extend(row.request.token_ids[row.start : known_end])
        token_ids.extend(row.request.draft_token_ids[: row.num_drafts])
        positions.extend(range(row.start, end))
    return token_ids, positions


def _sampled_positions(rows: Sequence[ScheduledRequest]) -> list[int]:
    """Rows of the flattened batch whose logits are wanted."""
    wanted: list[int] = []
    end = 0
    for row in rows:
        end += row.num_tokens
        if row.samples:
            wanted.extend(range(end - row.num_drafts - 1, end))
    return wanted
