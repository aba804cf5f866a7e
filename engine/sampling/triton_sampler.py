"""The sampler of a batch by our Triton kernels, without sorting: the tokens of :mod:`engine.sampling.torch_sampler`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch

from engine.device import to_device
from engine.outputs import TokenLogprob
from engine.sampling.params import SamplingParams, SamplingRow
from engine.sampling.torch_sampler import logprobs_of, sample
from kernels.sampling import SamplingTensors, sample_triton

# A probability that the likeliest of any vocabulary exceeds: below it top-p keeps that one alone, and float32 would
# lose numbers that are smaller still.
_LEAST_TOP_P = 1e-9


def sample_on_device(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> tuple[list[int], list[TokenLogprob | None]]:
    """Choose one token a row; as :func:`engine.sampling.torch_sampler.sample`.

    What a row asks for goes to the device in one copy, and the tokens come back in one: nothing else waits.
    """
    if all(_takes_the_largest(row) for row in rows):  # one maximum a row: there is nothing to search
        return sample(logits, rows)
    tokens: list[int] = sample_triton(logits, _tensors(logits, rows)).tolist()
    return tokens, logprobs_of(logits, rows, tokens)


def warm_up(logits: torch.Tensor) -> None:
    """Launch the kernels in each of the ways that rows can ask for, for logits [1, vocab]. Nothing is read back."""
    for penalty, forbidden in itertools.product((1.0, 2.0), ((), (0,))):
        params = SamplingParams(temperature=1.0, repetition_penalty=penalty)
        sample_triton(logits, _tensors(logits, [SamplingRow(params, 0, 0, (0,), forbidden)]))


def _takes_the_largest(row: SamplingRow) -> bool:
    return row.params.greedy and row.params.repetition_penalty == 1.0 and not row.forbidden


def _tensors(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> SamplingTensors:
    params, vocab = [row.params for row in rows], logits.shape[1]
    seeds = np.array([row.seed for row in rows], dtype=np.uint64).view(np.int64)
    temperature, top_k, top_p, min_p, penalty, seeds_there, positions = to_device(
        [
            np.array([0.0 if item.greedy else item.temperature for item in params], np.float32),
            np.array([min(max(item.top_k, 0), vocab) for item in params], np.int32),
            np.array([max(item.top_p, _LEAST_TOP_P) for item in params], np.float32),
            np.array([item.min_p for item in params], np.float32),
            np.array([item.repetition_penalty for item in params], np.float32),
            seeds,
            np.array([row.position for row in rows], np.int64),
        ],
        logits.device,
    )
    penalized = any(item.repetition_penalty != 1.0 for item in params)
    return SamplingTensors(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seeds=seeds_there,
        positions=positions,
        penalty=penalty if penalized else None,
        seen=_marks(logits, [row.history if row.params.repetition_penalty != 1.0 else () for row in rows])
        if penalized
        else None,
        forbidden=_marks(logits, [row.forbidden for row in rows]) if any(row.forbidden for row in rows) else None,
    )


def _marks(logits: torch.Tensor, tokens: Sequence[Sequence[int]]) -> torch.Tensor:
    """uint8 [R, V], 1 at the tokens of each row."""
    vocab = logits.shape[1]
    flat = [row * vocab + token for row, some in enumerate(tokens) for token in some]
    marks = torch.zeros(logits.shape, dtype=torch.uint8, device=logits.device)
    if flat:
        (places,) = to_device([np.array(flat, np.int64)], logits.device)
        marks.view(-1).index_fill_(0, places, 1)
    return marks
