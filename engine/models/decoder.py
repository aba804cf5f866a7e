"""The transformer decoder: blocks of grouped-query attention and a gated MLP or a mixture of them.

What a block consists of (norms before and after, norms of queries and keys, biases, activation, window, rotary
embedding, experts) is data in :class:`DecoderConfig`; which family has what is a row of :mod:`engine.models.families`.

Tokens arrive flat, ragged over the batch: ``token_ids`` and ``positions`` are [T], whatever sequences they belong to.
Attention is a callback, so the decoder knows nothing of caches, blocks or batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

from engine.layers.linear import Linear
from engine.layers.mixture import MixtureMLP
from engine.layers.mlp import GatedMLP
from engine.layers.rotary import RotaryEmbedding, apply_rotary
from engine.models.decoder_config import DecoderConfig, MixtureConfig
from engine.models.weight_reader import Part, WeightReader, WeightSource

Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(layer_index, query [T, H, D], key [T, KV, D], value [T, KV, D]) → [T, H, D]; query and key are rotated."""

RunLayer = Callable[..., torch.Tensor]
"""(layer, *its arguments) → [T, hidden_size]; how a layer runs, in place of calling it."""


class DecoderLayer(nn.Module):
    """x + norm(attention(norm(x))), then the same with the MLP; norms that the family does not have are the identity.

    Query, key and value are one product, gate and up another.
    """

    def __init__(self, config: DecoderConfig, index: int, source: WeightSource) -> None:
        super().__init__()
        self.index = index
        self.num_heads = config.num_heads
        self.head_dim = config.head_dim
        self.num_rotated = config.num_heads + config.num_kv_heads
        layout, hidden, eps = config.layout, config.hidden_size, config.rms_norm_eps
        weights = WeightReader(source, f"model.layers.{index}.")
        self.input_norm = weights.norm(layout.input_norm, hidden, eps)
        self.attention_output_norm = weights.norm(layout.attention_output_norm, hidden, eps)
        self.mlp_norm = weights.norm(layout.mlp_norm, hidden, eps)
        self.mlp_output_norm = weights.norm(layout.mlp_output_norm, hidden, eps)
        self.normalizes_heads = layout.query_norm is not None
        self.query_norm = weights.norm(layout.query_norm, config.head_dim, eps)
        self.key_norm = weights.norm(layout.key_norm, config.head_dim, eps)
        rows = (self.num_rotated + config.num_kv_heads) * config.head_dim
        self.qkv_proj = weights.linear(layout.qkv, rows, hidden, label="qkv_proj", bias=config.qkv_bias)
        width = config.num_heads * config.head_dim
        self.o_proj = weights.linear((layout.output,), hidden, width, label="o_proj", bias=config.output_bias)
        self.mlp = _make_mlp(config, index, weights)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor, attend: Attend) -> torch.Tensor:
        """[T, hidden_size] → [T, hidden_size]."""
        x = x + self.attention_output_norm(self._attention(self.input_norm(x), cos, signed_sin, attend))
        mixed: torch.Tensor = self.mlp_output_norm(self.mlp(self.mlp_norm(x)))
        return x + mixed

    def _attention(self, x: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor, attend: Attend) -> torch.Tensor:
        heads = self.qkv_proj(x).view(x.shape[0], -1, self.head_dim)
        rotated = heads[:, : self.num_rotated]
        if self.normalizes_heads:
            query, key = heads[:, : self.num_heads], heads[:, self.num_heads : self.num_rotated]
            rotated = torch.cat((self.query_norm(query), self.key_norm(key)), dim=1)
        rotated = apply_rotary(rotated, cos, signed_sin)
        query, key = rotated[:, : self.num_heads], rotated[:, self.num_heads :]
        attended = attend(self.index, query, key, heads[:, self.num_rotated :])
        output: torch.Tensor = self.o_proj(attended.reshape(x.shape[0], -1))
        return output


class Decoder(nn.Module):
    """Embedding, layers, final norm and head of one model.

    Args:
        config: its shape.
        source: gives each weight by its Hugging Face name, in its format; asked once per tensor, layer by layer.

    Raises:
        ModelLoadError: if a tensor is missing or its shape contradicts the configuration.
    """

    swaps_weights = True
    """Its linear layers can be given another weight format."""

    def __init__(self, config: DecoderConfig, source: WeightSource) -> None:
        super().__init__()
        self.config = config
        self.num_layers = config.num_layers
        self.num_heads = config.num_heads
        self.num_kv_heads = config.num_kv_heads
        self.head_dim = config.head_dim
        self.hidden_size = config.hidden_size
        self.vocab_size = config.vocab_size
        self.layer_windows: list[int | None] = list(config.layer_windows)
        self.dtype = source.dtype
        weights = WeightReader(source)
        # A tied head is the very module of the embedding: one copy in memory, whatever its format.
        tied = config.tie_word_embeddings
        self.embed_tokens = _read_table(config, weights, "model.embed_tokens", "head" if tied else "embedding")
        # In the weights' dtype, as the model was trained with it: sqrt(640) is 25.25 in bfloat16.
        self.embedding_scale = float(torch.tensor(config.embedding_scale, dtype=self.dtype))
        self.layers = nn.ModuleList(DecoderLayer(config, index, source) for index in range(config.num_layers))
        self.norm = weights.norm("model.norm", config.hidden_size, config.rms_norm_eps)
        self.lm_head = self.embed_tokens if tied else _read_table(config, weights, "lm_head", "head")
        ropes = list(dict.fromkeys(config.layer_ropes))
        self.rotaries = [
            RotaryEmbedding(rope.inverse_frequencies().to(source.device), rope.attention_factor) for rope in ropes
        ]
        self.layer_rotaries = [ropes.index(rope) for rope in config.layer_ropes]

    def forward(
        self, token_ids: torch.Tensor, positions: torch.Tensor, attend: Attend, run_layer: RunLayer | None = None
    ) -> torch.Tensor:
        """Hidden states of a step's tokens, final norm applied.

        Args:
            token_ids: int64 [T], the ragged batch laid end to end.
            positions: int64 [T], each token's position in its own sequence.
            attend: writes keys and values to the cache and attends; called once per layer, in order.
            run_layer: runs a layer where it is not simply called (compiled execution).

        Returns:
            [T, hidden_size] in the compute dtype.
        """
        hidden = self.embed(token_ids)
        rotations = [rotary(positions) for rotary in self.rotaries]
        for layer, rotary_index in zip(self.layers, self.layer_rotaries, strict=True):
            arguments = (hidden, *rotations[rotary_index], attend)
            hidden = layer(*arguments) if run_layer is None else run_layer(layer, *arguments)
        normed: torch.Tensor = self.norm(hidden)
        return normed

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """int64 [T] → [T, hidden_size] in the compute dtype."""
        hidden = self.embed_tokens.format.rows(token_ids).to(self.dtype)
        return hidden if self.embedding_scale == 1.0 else hidden * self.embedding_scale

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[R, hidden_size] of the rows to be sampled → [R, vocab_size] in the compute dtype."""
        logits = self.lm_head(hidden)
        cap = self.config.final_logit_softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def attention_scale(self, layer_index: int) -> float:
        """Factor on the attention scores of a layer."""
        return self.config.attention_scale

    def divide_frequencies(self, factors: torch.Tensor) -> None:
        """Divide every rotary frequency by a factor of its own, float32 [head_dim / 2], as some GGUF files ask."""
        for rotary in self.rotaries:
            rotary.inv_freq = rotary.inv_freq / factors.to(rotary.inv_freq.device)

    def linears(self) -> Iterator[tuple[str, Linear, tuple[str, ...]]]:
        """Linear layers of the blocks, in order: (name, module, checkpoint tensors stacked in its weight)."""
        for name, module in self.layers.named_modules(prefix="layers"):
            if isinstance(module, Linear):
                yield name, module, module.sources

    def tables(self) -> Iterator[tuple[str, Linear, tuple[str, ...]]]:
        """The embedding and the head, as :meth:`linears`; one if they are tied. The head comes last."""
        yield "embed_tokens", self.embed_tokens, self.embed_tokens.sources
        if self.lm_head is not self.embed_tokens:
            yield "lm_head", self.lm_head, self.lm_head.sources

    def resident_bytes(self) -> int:
        """Bytes of all weights in their present formats; a tied head is counted once."""
        own = {parameter.data_ptr(): parameter.nbytes for parameter in self.parameters()}  # norms, biases, routers
        weights = sum(linear.format.nbytes() for _, linear, _ in (*self.linears(), *self.tables()))
        return sum(own.values()) + weights

    def describe_path(self) -> str:
        """What computes the model, for the page and the record."""
        return "own decoder"


def _read_table(config: DecoderConfig, weights: WeightReader, name: str, part: Part) -> Linear:
    return weights.linear((name,), config.vocab_size, config.hidden_size, label=name, part=part)


def _make_mlp(config: DecoderConfig, index: int, weights: WeightReader) -> nn.Module:
    layout = config.layout
    if config.mixture is not None and index in config.mixture_layers:
        return _make_mixture(config, config.mixture, weights)
    return _make_gated_mlp(config, layout.gate_up, layout.down, config.intermediate_size, weights)


def _make_gated_mlp(
    config: DecoderConfig,
    gate_up: tuple[str, ...],
    down: str,
    width: int,
    weights: WeightReader,
    rooms: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
) -> GatedMLP:
    hidden, bias = config.hidden_size, config.mlp_bias
    return GatedMLP(
        weights.linear(gate_up, 2 * width, hidden, label="gate_up_proj", bias=bias, out=rooms[0]),
        weights.linear((down,), hidden, width, label="down_proj", bias=bias, out=rooms[1]),
        config.activation,
    )


def _make_mixture(config: DecoderConfig, mixture: MixtureConfig, weights: WeightReader) -> MixtureMLP:
    layout, width, hidden = config.layout, mixture.intermediate_size, config.hidden_size
    # All experts' weights side by side, of which each has a view, for kernels that take them all at once.
    up_rooms = weights.room(mixture.num_experts, 2 * width, hidden)
    down_rooms = weights.room(mixture.num_experts, hidden, width)
    experts = [
        _make_gated_mlp(
            config,
            tuple(name.format(expert=expert) for name in layout.expert_gate_up),
            layout.expert_down.format(expert=expert),
            width,
            weights,
            (up_rooms[expert], down_rooms[expert]),
        )
        for expert in range(mixture.num_experts)
    ]
    router = weights.tensor(layout.router, mixture.num_experts, hidden)
    return MixtureMLP(router, experts, mixture.experts_per_token, normalizes=mixture.normalizes)
