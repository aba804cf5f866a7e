"""The products of a mixture against a loop over its experts."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kernels.expert_linear import Routing, expert_linear_reference, expert_linear_triton, sort_by_expert
from tests.gpu.case import Case, Size


def cases(device: torch.device, size: Size) -> Iterator[Case]:
    """The gate and up product of Qwen3-30B-A3B, and the weighted one back to the tokens at the smaller size."""
    full = size == "full"
    experts, per_token, outputs, inputs = (128, 8, 1536, 2048) if full else (4, 2, 33, 40)
    dtype = torch.bfloat16 if full else torch.float32
    weight = torch.randn(experts, outputs, inputs, device=device).to(dtype)
    for tokens in (16, 256, 4096) if full else (3,):
        routing = sort_by_expert(torch.rand(tokens, experts, device=device).topk(per_token).indices, experts)
        x = torch.randn(tokens, inputs, device=device).to(dtype)
        used = min(experts, tokens * per_token)
        yield Case(
            "expert_linear",
            f"{experts} experts of {outputs}x{inputs}, {tokens} tokens, {per_token} each",
            lambda r=routing, x=x: expert_linear_triton(x, weight, r, of_tokens=True),
            lambda r=routing, x=x: expert_linear_reference(x, weight, r, of_tokens=True),
            0.02 if full else 1e-5,
            used * outputs * inputs * dtype.itemsize + x.nbytes + tokens * per_token * outputs * dtype.itemsize,
            2 * tokens * per_token * outputs * inputs,
            peers={"a loop of matmuls": lambda r=routing, x=x: _loop(x, weight, r)},
        )


def _loop(x: torch.Tensor, weight: torch.Tensor, routing: Routing) -> torch.Tensor:
    """As torch would do it: counts on the host, a product for each expert."""
    counts = routing.offsets.diff().tolist()
    rows = x[routing.order // routing.per_token].split(counts)
    return torch.cat([piece @ weight[expert].t() for expert, piece in enumerate(rows)])
