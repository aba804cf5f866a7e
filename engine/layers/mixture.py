"""Mixture of experts: a router gives each token to its k best of E experts, each a gated MLP of its own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import nn
from torch.nn import functional as F

from engine.layers.linear import Linear
from engine.layers.mlp import GatedMLP
from engine.quantization.formats import ModelDtypeFormat, WeightFormat


class MixtureMLP(nn.Module):
    """y = Σ over the k chosen experts of weight · expert(x) (Shazeer et al. 2017; routing as Mixtral, eq. 1 and 2).

    Tokens are sorted by expert, so that each expert which has any computes all of them in one dense product:

        chosen experts   token 0: [3, 1]   token 1: [1, 0]   token 2: [3, 2]
        sorted pairs     0: token 1 | 1: tokens 0, 1 | 2: token 2 | 3: tokens 0, 2
        products         one per |  |, on the rows gathered for it

    Which experts have tokens is known on the host only after a copy from the device, one a layer.

    Args:
        router: [E, hidden_size], never quantized.
        experts: the E experts.
        experts_per_token: k.
        normalizes: the k weights are divided by their sum.
    """

    def __init__(
        self, router: torch.Tensor, experts: Iterable[GatedMLP], experts_per_token: int, *, normalizes: bool
    ) -> None:
        super().__init__()
        self.router = nn.Parameter(router, requires_grad=False)
        self.experts = nn.ModuleList(experts)
        self.experts_per_token = experts_per_token
        self.normalizes = normalizes

    def stacked(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The weights [E, 2 · width, hidden_size] and [E, hidden_size, width] if they lie so, and are not quantized."""
        found = [_stacked([linear.format for linear in linears]) for linears in self._products()]
        return None if found[0] is None or found[1] is None else (found[0], found[1])

    def _products(self) -> tuple[list[Linear], list[Linear]]:
        experts = [cast("GatedMLP", expert) for expert in self.experts]
        return [expert.gate_up_proj for expert in experts], [expert.down_proj for expert in experts]

    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[T, hidden_size] → each token's k weights (float32) and experts (int64), [T, k], best first."""
        probabilities = F.softmax(F.linear(x, self.router), dim=-1, dtype=torch.float32)
        weights, chosen = torch.topk(probabilities, self.experts_per_token, dim=-1)
        if self.normalizes:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights, chosen

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, hidden_size] → the same."""
        weights, chosen = self.route(x)
        pairs_of = chosen.flatten()
        order = torch.argsort(pairs_of, stable=True)  # of the T · k pairs, by expert
        rows = x.index_select(0, order // self.experts_per_token)
        # not bincount: on a GPU it waits for the largest of them besides
        counts = chosen.new_zeros(len(self.experts)).scatter_add_(0, pairs_of, torch.ones_like(pairs_of))
        pieces = torch.split(rows, counts.tolist())
        outputs = [expert(piece) for expert, piece in zip(self.experts, pieces, strict=True) if piece.shape[0]]
        # Back in the order of tokens and summed there: the same sum whatever else is in the batch, on every device.
        pairs = torch.empty_like(rows).index_copy_(0, order, torch.cat(outputs))
        pairs = pairs.view(*chosen.shape, -1) * weights.to(x.dtype).unsqueeze(-1)
        return pairs.sum(dim=1)


def _stacked(formats: Sequence[WeightFormat]) -> torch.Tensor | None:
    """The tensor whose consecutive views the weights are; None if they are no such views."""
    plain = [format.weight for format in formats if isinstance(format, ModelDtypeFormat)]
    first = plain[0] if len(plain) == len(formats) else None
    if first is None or not first.is_contiguous():
        return None
    storage, begin = first.untyped_storage().data_ptr(), first.data_ptr()
    for index, weight in enumerate(plain):
        apart = weight.data_ptr() - begin - index * first.nbytes
        if apart or weight.shape != first.shape or weight.untyped_storage().data_ptr() != storage:
            return None
    return first.as_strided((len(plain), *first.shape), (first.numel(), *first.stride()))
