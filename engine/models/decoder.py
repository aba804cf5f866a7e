"""The transformer decoder of the Llama kind: pre-norm blocks of grouped-query attention and a gated MLP.

Tokens arrive flat, ragged over the batch: ``token_ids`` and ``positions`` are [T], whatever sequences they belong to.
Attention is a callback, so the decoder knows nothing of caches, blocks or batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn import functional as F

from engine.layers.linear import Linear
from engine.layers.norm import RMSNorm
from engine.layers.rotary import RotaryEmbedding, apply_rotary
from engine.models.decoder_config import DecoderConfig
from engine.quantization.formats import ModelDtypeFormat

Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(layer_index, query [T, H, D], key [T, KV, D], value [T, KV, D]) → [T, H, D]; query and key are rotated."""

RunLayer = Callable[..., torch.Tensor]
"""(layer, *its arguments) → [T, hidden_size]; how a layer runs, in place of calling it."""

ReadTensor = Callable[[str], torch.Tensor]
"""Checkpoint tensor by its Hugging Face name, in the compute dtype, on the device."""


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); query, key and value in one product, gate and up in one."""

    def __init__(self, config: DecoderConfig, index: int, read: ReadTensor) -> None:
        super().__init__()
        self.index = index
        self.num_heads = config.num_heads
        self.num_kv_heads = config.num_kv_heads
        self.head_dim = config.head_dim
        prefix = f"model.layers.{index}."
        self.input_norm = RMSNorm(read(f"{prefix}input_layernorm.weight"), config.rms_norm_eps)
        self.post_attention_norm = RMSNorm(read(f"{prefix}post_attention_layernorm.weight"), config.rms_norm_eps)
        sources = layer_linear_sources(index)
        self.qkv_proj = _linear(sources["qkv_proj"], config.attention_bias, read)
        self.o_proj = _linear(sources["o_proj"], config.attention_bias, read)
        self.gate_up_proj = _linear(sources["gate_up_proj"], config.mlp_bias, read)
        self.down_proj = _linear(sources["down_proj"], config.mlp_bias, read)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor, attend: Attend) -> torch.Tensor:
        """[T, hidden_size] → [T, hidden_size]."""
        qkv = self.qkv_proj(self.input_norm(x)).view(x.shape[0], -1, self.head_dim)
        num_rotated = self.num_heads + self.num_kv_heads
        rotated = apply_rotary(qkv[:, :num_rotated], cos, signed_sin)
        query, key = rotated[:, : self.num_heads], rotated[:, self.num_heads :]
        attended = attend(self.index, query, key, qkv[:, num_rotated:])
        x = x + self.o_proj(attended.reshape(x.shape[0], -1))
        gate, up = self.gate_up_proj(self.post_attention_norm(x)).chunk(2, dim=-1)
        return x + self.down_proj(F.silu(gate) * up)


class Decoder(nn.Module):
    """Embedding, layers, final norm and head of one model.

    Args:
        config: its shape.
        read: gives each weight by its Hugging Face name; called once per tensor, layer by layer.
    """

    def __init__(self, config: DecoderConfig, read: ReadTensor) -> None:
        super().__init__()
        self.config = config
        self.num_layers = config.num_layers
        self.num_heads = config.num_heads
        self.num_kv_heads = config.num_kv_heads
        self.head_dim = config.head_dim
        self.hidden_size = config.hidden_size
        self.vocab_size = config.vocab_size
        self.layer_windows: list[int | None] = list(config.layer_windows)
        embedding = read("model.embed_tokens.weight")
        self.embed_tokens = nn.Parameter(embedding, requires_grad=False)
        self.layers = nn.ModuleList(DecoderLayer(config, index, read) for index in range(config.num_layers))
        self.norm = RMSNorm(read("model.norm.weight"), config.rms_norm_eps)
        # A tied head is the very tensor of the embedding: one copy in memory.
        self.lm_head = (
            self.embed_tokens
            if config.tie_word_embeddings
            else nn.Parameter(read("lm_head.weight"), requires_grad=False)
        )
        self.rotary = RotaryEmbedding(config.inverse_frequencies().to(embedding.device))

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
        hidden = F.embedding(token_ids, self.embed_tokens)
        cos, signed_sin = self.rotary(positions)
        for layer in self.layers:
            arguments = (hidden, cos, signed_sin, attend)
            hidden = layer(*arguments) if run_layer is None else run_layer(layer, *arguments)
        return self.norm(hidden)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[R, hidden_size] of the rows to be sampled → [R, vocab_size] in the compute dtype."""
        return F.linear(hidden, self.lm_head)

    def attention_scale(self, layer_index: int) -> float:
        """Factor on the attention scores of a layer: head_dim^-0.5."""
        return float(self.head_dim**-0.5)

    def linears(self) -> Iterator[tuple[str, Linear, tuple[str, ...]]]:
        """Every exchangeable linear layer: (name, module, checkpoint tensors stacked in its weight), in layer order."""
        for index, layer in enumerate(self.layers):
            for name, sources in layer_linear_sources(index).items():
                yield f"layers.{index}.{name}", layer.get_submodule(name), sources  # type: ignore[misc]

    def resident_bytes(self) -> int:
        """Bytes of all weights in their present formats; a tied head is counted once."""
        own = {parameter.data_ptr(): parameter.nbytes for parameter in self.parameters()}  # norms, embedding, biases
        return sum(own.values()) + sum(linear.format.nbytes() for _, linear, _ in self.linears())


def layer_linear_sources(index: int) -> dict[str, tuple[str, ...]]:
    """Which checkpoint tensors, stacked by rows, make up each fused linear layer of layer ``index``."""
    prefix = f"model.layers.{index}."
    return {
        "qkv_proj": tuple(f"{prefix}self_attn.{part}_proj.weight" for part in "qkv"),
        "o_proj": (f"{prefix}self_attn.o_proj.weight",),
        "gate_up_proj": (f"{prefix}mlp.gate_proj.weight", f"{prefix}mlp.up_proj.weight"),
        "down_proj": (f"{prefix}mlp.down_proj.weight",),
    }


def read_stacked(sources: tuple[str, ...], read: ReadTensor) -> torch.Tensor:
    """The checkpoint tensors ``sources`` stacked by rows; a single one as it is."""
    return read(sources[0]) if len(sources) == 1 else torch.cat([read(name) for name in sources])


def _linear(sources: tuple[str, ...], has_bias: bool, read: ReadTensor) -> Linear:
    biases = tuple(name.removesuffix("weight") + "bias" for name in sources)
    return Linear(ModelDtypeFormat(read_stacked(sources, read)), read_stacked(biases, read) if has_bias else None)
