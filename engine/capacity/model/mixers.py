"""What passes information between positions: attention of every kind, and recurrent layers.

Each lists its weight tensors as a serving engine stores them on one GPU, and what it keeps of a sequence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Protocol

from engine.capacity.model.tensors import Tensor, share


class Mixer(Protocol):
    """What passes information between positions."""

    def tensors(self, hidden: int, tp: int) -> Iterator[Tensor]:
        """Weights of one layer on one of ``tp`` GPUs."""

    def cached_heads(self, tp: int) -> tuple[int, int]:
        """(number of vectors, elements of each) that one more token adds to one GPU's cache in this layer."""

    def state_elements(self, tp: int) -> tuple[int, int]:
        """Elements of constant state a sequence on one GPU: (recurrent state, convolution window)."""


@dataclasses.dataclass(frozen=True, slots=True)
class Attention:
    """Multi-head, grouped-query or multi-query attention.

    Attributes:
        num_heads, num_kv_heads, head_dim: dimensions.
        window: positions a query sees, itself included; None for all.
        qkv_bias, output_bias: the projections have one.
        qk_norm: "" none, "head" a weight of head_dim for queries and keys each, "full" of all heads' width.
        sinks: a learned logit a head that takes part in the softmax (gpt-oss).
        gated: the query projection also yields a gate of the output (Qwen3-Next).
        value_dim: a value's width where it is not the key's (MiMo-V2).
        key_is_value: there is no value projection: values are the projected keys (Gemma 4).
        shares_cache: queries alone; keys and values are those of an earlier layer (Gemma 4).
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: str = ""
    sinks: bool = False
    gated: bool = False
    value_dim: int | None = None
    key_is_value: bool = False
    shares_cache: bool = False

    def tensors(self, hidden: int, tp: int) -> Iterator[Tensor]:
        """Fused query/key/value, output, biases, norms, sinks.

        >>> sum(tensor.size for tensor in Attention(32, 8, 128).tensors(4096, tp=1))  # Llama-3.1-8B, a layer
        41943040
        """
        heads, kv_heads = share(self.num_heads, tp), share(self.num_kv_heads, tp)
        query, keys = heads * self.head_dim, kv_heads * self.head_dim
        value_dim = self.head_dim if self.value_dim is None else self.value_dim
        values = 0 if self.key_is_value else kv_heads * value_dim
        own = 0 if self.shares_cache else keys + values
        rows = query * (2 if self.gated else 1) + own
        yield Tensor("attention", "qkv", rows, hidden, linear=True, slices=self._projections)
        yield Tensor("attention", "attention_output", hidden, heads * value_dim, linear=True)
        if self.qkv_bias:
            yield Tensor("attention", "bias", 1, rows)
        if self.output_bias:
            yield Tensor("attention", "bias", 1, hidden)
        if self.sinks:
            yield Tensor("attention", "sinks", 1, heads)
        if self.qk_norm == "head":
            yield Tensor("norms", "norm", 1, self.head_dim, 1 if self.shares_cache else 2)
        elif self.qk_norm:
            yield Tensor("norms", "norm", 1, query)
            yield Tensor("norms", "norm", 1, keys)

    def cached_heads(self, tp: int) -> tuple[int, int]:
        """Keys and values of the GPU's heads; heads are replicated where there are more GPUs than heads."""
        if self.shares_cache:
            return 0, self.head_dim
        # Of different widths: two vectors of the mean width have the same bytes.
        width = self.head_dim if self.value_dim is None else -(-(self.head_dim + self.value_dim) // 2)
        return 2 * share(self.num_kv_heads, tp), width

    @property
    def _projections(self) -> int:
        """Of query, key and value, those that the layer has."""
        return 1 if self.shares_cache else 2 if self.key_is_value else 3

    def state_elements(self, tp: int) -> tuple[int, int]:
        """None: everything is in the cache."""
        return 0, 0


@dataclasses.dataclass(frozen=True, slots=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): keys and values are cached as one latent vector.

    Attributes:
        num_heads: heads; query_rank: of the query's compression, None if it is projected directly.
        kv_rank: width of the latent; rope_dim: of the rotary key that all heads share.
        nope_dim, value_dim: a head's width of the unrotated query/key and of the value.
        bias: of the down projections and the output.
    """

    num_heads: int
    query_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    bias: bool = False
    window: int | None = None

    def tensors(self, hidden: int, tp: int) -> Iterator[Tensor]:
        """Down projections are on every GPU, up projections and output are split by heads."""
        heads = share(self.num_heads, tp)
        query = heads * (self.nope_dim + self.rope_dim)
        latent = self.kv_rank + self.rope_dim
        if self.query_rank is None:
            yield Tensor("attention", "query", query, hidden, linear=True)
        else:
            yield Tensor("attention", "query_down", self.query_rank, hidden, linear=True)
            yield Tensor("attention", "query_up", query, self.query_rank, linear=True)
            yield Tensor("norms", "norm", 1, self.query_rank)
        yield Tensor("attention", "kv_down", latent, hidden, linear=True)
        yield Tensor("attention", "kv_up", heads * (self.nope_dim + self.value_dim), self.kv_rank, linear=True)
        yield Tensor("attention", "attention_output", hidden, heads * self.value_dim, linear=True)
        yield Tensor("norms", "norm", 1, self.kv_rank)
        if self.bias:
            yield Tensor("attention", "bias", 1, latent + hidden + (self.query_rank or 0))

    def cached_heads(self, tp: int) -> tuple[int, int]:
        """One latent for all heads, so tensor parallelism does not divide it.

        >>> LatentAttention(128, 1536, 512, 128, 64, 128).cached_heads(tp=8)  # DeepSeek-V3
        (1, 576)
        """
        return 1, self.kv_rank + self.rope_dim

    def state_elements(self, tp: int) -> tuple[int, int]:
        """None: everything is in the cache."""
        return 0, 0


@dataclasses.dataclass(frozen=True, slots=True)
class CompressedAttention(LatentAttention):
    """Attention of DeepSeek-V4: one vector of kv_rank + rope_dim is key and value of all heads, within a window; what
    is farther is kept compressed (the layer's index). The output goes through ``groups`` matrices of ``output_rank``
    rows.
    """

    groups: int = 1
    output_rank: int = 1

    def tensors(self, hidden: int, tp: int) -> Iterator[Tensor]:
        """Down projections are on every GPU, what belongs to heads is split."""
        heads, groups = share(self.num_heads, tp), share(self.groups, tp)
        width, rank = self.kv_rank + self.rope_dim, self.query_rank or hidden
        yield Tensor("attention", "query_down", rank, hidden, linear=True)
        yield Tensor("attention", "query_up", heads * width, rank, linear=True)
        yield Tensor("attention", "kv_down", width, hidden, linear=True)
        inputs = self.num_heads * width // self.groups
        yield Tensor("attention", "output_down", groups * self.output_rank, inputs, linear=True)
        yield Tensor("attention", "attention_output", hidden, groups * self.output_rank, linear=True)
        yield Tensor("attention", "sinks", 1, heads)
        yield Tensor("norms", "norm", 1, rank)
        yield Tensor("norms", "norm", 1, width)


@dataclasses.dataclass(frozen=True, slots=True)
class GatedDeltaNet:
    """Linear attention with a gated delta rule (arXiv:2412.06464), as in Qwen3-Next: constant state, no cache."""

    num_key_heads: int
    num_value_heads: int
    key_dim: int
    value_dim: int
    kernel: int

    def tensors(self, hidden: int, tp: int) -> Iterator[Tensor]:
        """Projections, short convolution, gates, norm."""
        keys = share(self.num_key_heads, tp) * self.key_dim
        heads = share(self.num_value_heads, tp)
        values = heads * self.value_dim
        yield Tensor("recurrent", "recurrent_input", 2 * keys + 2 * values, hidden, linear=True, slices=4)
        yield Tensor("recurrent", "gates", 2 * heads, hidden, linear=True, slices=2)
        yield Tensor("recurrent", "convolution", 2 * keys + values, self.kernel)
        yield Tensor("recurrent", "decay", 1, heads, 2)
        yield Tensor("norms", "norm", 1, self.value_dim)
        yield Tensor("recurrent", "recurrent_output", hidden, values, linear=True)

    def cached_heads(self, tp: int) -> tuple[int, int]:
        """Nothing grows with the sequence."""
        return 0, 0

    def state_elements(self, tp: int) -> tuple[int, int]:
        """A matrix of key_dim · value_dim a head, and the convolution's last inputs."""
        keys = share(self.num_key_heads, tp) * self.key_dim
        heads = share(self.num_value_heads, tp)
        state = heads * self.key_dim * self.value_dim
        return state, (2 * keys + heads * self.value_dim) * (self.kernel - 1)


@dataclasses.dataclass(frozen=True, slots=True)
class Mamba2:
    """State-space layer of Mamba-2 (arXiv:2405.21060): constant state, no cache."""

    num_heads: int
    head_dim: int
    groups: int
    state_dim: int
    kernel: int
    conv_bias: bool = True
    bias: bool = False

    def tensors(self, hidden: int, tp: int) -> Iterator[Tensor]:
        """Input and output projections, convolution, decay, skip, step sizes, norm."""
        heads = share(self.num_heads, tp)
        inner, conv = heads * self.head_dim, self._convolved(tp)
        yield Tensor("recurrent", "recurrent_input", inner + conv + heads, hidden, linear=True, slices=5)
        yield Tensor("recurrent", "convolution", conv, self.kernel + (1 if self.conv_bias else 0))
        yield Tensor("recurrent", "decay", 1, heads, 3)
        yield Tensor("norms", "norm", 1, inner)
        yield Tensor("recurrent", "recurrent_output", hidden, inner, linear=True)
        if self.bias:
            yield Tensor("recurrent", "bias", 1, inner + conv + heads + hidden)

    def cached_heads(self, tp: int) -> tuple[int, int]:
        """Nothing grows with the sequence."""
        return 0, 0

    def state_elements(self, tp: int) -> tuple[int, int]:
        """head_dim · state_dim a head, and the convolution's last inputs.

        >>> Mamba2(128, 64, 8, 128, 4).state_elements(tp=1)  # a layer of Nemotron-H-8B
        (1048576, 30720)
        """
        heads = share(self.num_heads, tp)
        return heads * self.head_dim * self.state_dim, self._convolved(tp) * (self.kernel - 1)

    def _convolved(self, tp: int) -> int:
        return share(self.num_heads, tp) * self.head_dim + 2 * share(self.groups, tp) * self.state_dim


@dataclasses.dataclass(frozen=True, slots=True)
class NoMixer:
    """A layer that is an MLP alone (Nemotron-H)."""

    def tensors(self, hidden: int, tp: int) -> Iterator[Tensor]:
        """None."""
        yield from ()

    def cached_heads(self, tp: int) -> tuple[int, int]:
        """Nothing."""
        return 0, 0

    def state_elements(self, tp: int) -> tuple[int, int]:
        """Nothing."""
        return 0, 0


AnyMixer = Attention | LatentAttention | GatedDeltaNet | Mamba2 | NoMixer
