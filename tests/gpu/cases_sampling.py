"""Choosing tokens."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kernels.sampling import SamplingTensors, sample_reference, sample_triton
from tests.gpu.case import Case, Run, Size

FILTERS = {
    "temperature": (0, 1.0, 0.0),
    "top-k 50": (50, 1.0, 0.0),
    "top-p 0.9": (0, 0.9, 0.0),
    "top-k 50, top-p 0.9, min-p 0.05": (50, 0.9, 0.05),
}


def cases(device: torch.device, size: Size) -> Iterator[Case]:
    """Every filter at one row and at 64 (a vocabulary of Llama 3)."""
    full = size == "full"
    vocab = 128256 if full else 50
    for rows in (1, 64) if full else (2,):
        logits = torch.randn(rows, vocab, device=device) * 3
        for name, (top_k, top_p, min_p) in FILTERS.items():
            asked = _tensors(rows, device, top_k, top_p, min_p)
            yield Case(
                "sample",
                f"{name}, {rows} rows of {vocab}",
                lambda x=logits, a=asked: sample_triton(x, a),
                lambda x=logits, a=asked: sample_reference(x, a),
                0.0,
                logits.nbytes,
                peers={"torch, sorted": _sorted(logits, top_k, top_p)},
            )


def _tensors(rows: int, device: torch.device, top_k: int, top_p: float, min_p: float) -> SamplingTensors:
    return SamplingTensors(
        temperature=torch.full((rows,), 0.8, device=device),
        top_k=torch.full((rows,), top_k, dtype=torch.int32, device=device),
        top_p=torch.full((rows,), top_p, device=device),
        min_p=torch.full((rows,), min_p, device=device),
        seeds=torch.arange(rows, device=device) * 7919 + 1,
        positions=torch.arange(rows, device=device),
    )


def _sorted(logits: torch.Tensor, top_k: int, top_p: float) -> Run:
    """The usual way in torch: sort, cut, draw."""

    def run() -> torch.Tensor:
        values, order = logits.sort(dim=-1, descending=True)
        if top_k:
            values[:, top_k:] = -torch.inf
        probabilities = values.softmax(dim=-1)
        if top_p < 1.0:
            before = probabilities.cumsum(dim=-1) - probabilities
            probabilities = probabilities.masked_fill(before >= top_p, 0.0)
        return order.gather(-1, torch.multinomial(probabilities, 1))

    return run
