"""Kernels that nothing calls yet (:mod:`kernels.waiting`), measured with ``python -m tests.gpu.run --waiting``."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kernels.attention_mass import attention_mass_reference, attention_mass_triton
from kernels.paged_attention import paged_attention_triton
from kernels.verification import verify_reference, verify_triton
from tests.gpu.case import Case, Size
from tests.gpu.cases_paged_attention import Batch, make_batch


def cases(device: torch.device, size: Size) -> Iterator[Case]:
    """Masses of four verified drafts of 32 (heads of Llama-3.1-8B), and a verification of ragged drafts."""
    full = size == "full"
    heads, query_lens, context_lens = ((32, 8, 128), [32] * 4, [1024] * 4) if full else ((4, 2, 16), [3], [20])
    yield _mass(make_batch(device, full, query_lens, context_lens, *heads, "model"))
    yield _verification(device, 64 if full else 3)


def _mass(made: Batch) -> Case:
    query, keys, _, tables, starts, lengths, scale = made.arguments()
    _, lse = paged_attention_triton(*made.arguments())  # type: ignore[arg-type]
    asked = (query, keys, tables, starts, lengths, lse, scale)
    return Case(
        "attention_mass",
        f"{lengths.shape[0]} of context {int(lengths[0])}, {query.shape[0]} queries",  # type: ignore[attr-defined]
        lambda: attention_mass_triton(*asked),  # type: ignore[arg-type]
        lambda: attention_mass_reference(*asked),  # type: ignore[arg-type]
        0.03 if made.query.dtype == torch.bfloat16 else 1e-4,
        made.caches[0].nbytes,
    )


def _verification(device: torch.device, num_seqs: int) -> Case:
    counts = torch.arange(num_seqs) % 5
    starts = torch.cat((torch.zeros(1, dtype=torch.int64), counts.cumsum(0))).to(torch.int32).to(device)
    total = int(counts.sum())
    sampled = torch.randint(0, 2, (total + num_seqs,), device=device)
    drafts = torch.randint(0, 2, (total,), device=device)
    return Case(
        "verify",
        f"{num_seqs} sequences of up to 4 drafts",
        lambda: verify_triton(sampled, drafts, starts, 4),
        lambda: verify_reference(sampled, drafts, starts, 4),
        0.0,
        sampled.nbytes + drafts.nbytes + starts.nbytes,
    )
