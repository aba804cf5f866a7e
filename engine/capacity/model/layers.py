"""What layers are made of: a mixer (see :mod:`engine.capacity.model.mixers`) and an MLP, dense or a mixture of experts.

Each lists its weight tensors as a serving engine stores them on one GPU. The one list is behind parameter counts, bytes
and times.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from engine.capacity.formats import WeightPrecision
from engine.capacity.model.mixers import AnyMixer, Attention, LatentAttention
from engine.capacity.model.tensors import Tensor, share


@dataclasses.dataclass(frozen=True, slots=True)
class DenseMLP:
    """``down(act(up(x)))``, or ``down(act(gate(x)) · up(x))`` where it is gated. Width 0: there is none."""

    width: int
    gated: bool = True
    bias: bool = False

    def tensors(self, hidden: int, tp: int, ep: int) -> Iterator[Tensor]:
        """Gate and up fused, and down, split by width."""
        if self.width:
            yield from _mlp("mlp", "mlp", self, hidden, share(self.width, tp))

    @property
    def active_width(self) -> int:
        """Width that a token passes through."""
        return self.width

    def check(self, tp: int, ep: int) -> bool:
        """True if the width can be split."""
        return self.width % tp == 0


@dataclasses.dataclass(frozen=True, slots=True)
class MixtureOfExperts:
    """A router that picks ``top_k`` of ``num_experts`` MLPs for each token, and perhaps MLPs that all tokens share.

    Attributes:
        num_experts, top_k: of the routed experts; width: of one of them.
        shared_width: of all shared experts together, 0 if there are none.
        gated, bias: of the experts, as in :class:`DenseMLP`.
        shared_gate: the shared expert is scaled by a gate of its own; shared_bias: its projections have a bias.
        router_bias: the router's logits have one; correction: a bias an expert that only the choice sees.
        latent: the routed experts work on projections of the hidden state to this width and back (Nemotron 3 Super);
            0: on the hidden state itself. latent_bias: these two projections have one.
    """

    num_experts: int
    top_k: int
    width: int
    shared_width: int = 0
    gated: bool = True
    bias: bool = False
    shared_gate: bool = False
    router_bias: bool = False
    correction: bool = False
    latent: int = 0
    latent_bias: bool = False
    shared_bias: bool = False

    def tensors(self, hidden: int, tp: int, ep: int) -> Iterator[Tensor]:
        """Experts split by width, or whole over ``ep`` GPUs; router on every GPU."""
        local = share(self.num_experts, ep)
        width = self.width if ep > 1 else share(self.width, tp)
        # On average a GPU computes its share of the experts that a token has chosen, never less than one.
        active = min(local, share(self.top_k * local, self.num_experts))
        for tensor in _mlp("experts", "expert", self, self.latent or hidden, width):
            yield dataclasses.replace(tensor, count=local, active=active)
        if self.latent:
            yield Tensor("mlp", "latent_down", self.latent, hidden, linear=True)
            yield Tensor("mlp", "latent_up", hidden, self.latent, linear=True)
            if self.latent_bias:
                yield Tensor("mlp", "bias", 1, self.latent + hidden)
        yield Tensor("router", "router", self.num_experts, hidden)
        if self.router_bias or self.correction:
            yield Tensor("router", "bias", 1, self.num_experts)
        if self.shared_width:
            shared = DenseMLP(self.shared_width, self.gated, self.shared_bias)
            yield from _mlp("mlp", "shared", shared, hidden, share(self.shared_width, tp))
            if self.shared_gate:
                yield Tensor("router", "router", 1, hidden)

    @property
    def active_width(self) -> int:
        """Width of the experts that a token passes through, shared ones included."""
        return self.top_k * self.width + self.shared_width

    def check(self, tp: int, ep: int) -> bool:
        """True if the experts can be split."""
        routed = self.num_experts % ep == 0 if ep > 1 else self.width % tp == 0
        return routed and self.shared_width % tp == 0


def _mlp(part: str, role: str, mlp: DenseMLP | MixtureOfExperts, hidden: int, width: int) -> Iterator[Tensor]:
    slices = 2 if mlp.gated else 1
    yield Tensor(part, f"{role}_up", slices * width, hidden, linear=True, slices=slices)
    yield Tensor(part, f"{role}_down", hidden, width, linear=True)
    if mlp.bias:
        yield Tensor(part, "bias", 1, slices * width)
        yield Tensor(part, "bias", 1, hidden)


AnyMLP = DenseMLP | MixtureOfExperts


@dataclasses.dataclass(frozen=True, slots=True)
class Layer:
    """One layer: a mixer, an MLP, and ``norms`` norms of the hidden width.

    ``formats``: (role, format) of matrices that a quantized checkpoint stores in another format than most. ``extra``:
    tensors besides mixer and MLP, whole on every GPU. ``index_bytes``: what one more token adds to the index (or the
    compressed cache) of a sparse layer, on every GPU and whatever its window; ``reads``: how many tokens it then
    attends to, None for all that the window holds.
    """

    mixer: AnyMixer
    mlp: AnyMLP
    norms: int = 2
    formats: tuple[tuple[str, WeightPrecision], ...] = ()
    extra: tuple[Tensor, ...] = ()
    index_bytes: int = 0
    reads: int | None = None

    def tensors(self, hidden: int, tp: int, ep: int) -> Iterator[Tensor]:
        """Weights of one such layer on one GPU, norms of the hidden width excepted."""
        own = dict(self.formats)
        for tensor in (*self.mixer.tensors(hidden, tp), *self.mlp.tensors(hidden, tp, ep), *self.extra):
            yield dataclasses.replace(tensor, own=own[tensor.role]) if tensor.role in own else tensor

    @property
    def window(self) -> int | None:
        """Positions a query sees, None for all (or where there is no attention)."""
        return self.mixer.window if isinstance(self.mixer, Attention | LatentAttention) else None

    @property
    def attends(self) -> bool:
        """True if it keeps keys and values."""
        own = not (isinstance(self.mixer, Attention) and self.mixer.shares_cache)
        return own and isinstance(self.mixer, Attention | LatentAttention)
