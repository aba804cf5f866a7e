"""The sampler of a batch by our Triton kernels: the same tokens as :func:`engine.sampling.sample`, without sorting."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from engine.outputs import TokenLogprob
from engine.sampling import SamplingRow, logprobs_of, sample
from kernels.sampling import SamplingTensors, sample_triton


def sample_on_device(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> tuple[list[int], list[TokenLogprob | None]]:
    """Choose one token a row; as :func:`engine.sampling.sample`.

    What a row asks for goes to the device in two copies, and the tokens come back in one: nothing else waits.
    """
    if all(row.params.greedy for row in rows):  # one maximum a row: there is nothing to search
        return sample(logits, rows)
    tokens: list[int] = sample_triton(logits, _tensors(logits, rows)).tolist()
    return tokens, logprobs_of(logits, rows, tokens)


def _tensors(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> SamplingTensors:
    params = [row.params for row in rows]
    floats = torch.tensor(
        [
            [item.temperature for item in params],
            [item.top_p for item in params],
            [item.min_p for item in params],
            [item.repetition_penalty for item in params],
        ],
        dtype=torch.float32,
    ).to(logits.device, non_blocking=True)
    seeds = np.array([row.seed for row in rows], dtype=np.uint64).view(np.int64).tolist()
    whole = torch.tensor(
        [seeds, [row.position for row in rows], [max(item.top_k, 0) for item in params]], dtype=torch.int64
    ).to(logits.device, non_blocking=True)
    punished = any(item.repetition_penalty != 1.0 for item in params)
    return SamplingTensors(
        temperature=floats[0],
        top_k=whole[2].to(torch.int32),
        top_p=floats[1],
        min_p=floats[2],
        seeds=whole[0],
        positions=whole[1],
        penalty=floats[3] if punished else None,
        seen=_marks(logits, [row.history if row.params.repetition_penalty != 1.0 else () for row in rows])
        if punished
        else None,
        forbidden=_marks(logits, [row.forbidden for row in rows]) if any(row.forbidden for row in rows) else None,
    )


def _marks(logits: torch.Tensor, tokens: Sequence[Sequence[int]]) -> torch.Tensor:
    """uint8 [R, V], 1 at the tokens of each row."""
    vocab = logits.shape[1]
    flat = [row * vocab + token for row, some in enumerate(tokens) for token in some]
    marks = torch.zeros(logits.shape, dtype=torch.uint8, device=logits.device)
    if flat:
        marks.view(-1)[torch.tensor(flat, device=logits.device)] = 1
    return marks
