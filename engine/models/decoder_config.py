"""The shape of a decoder, read from a Hugging Face style configuration and checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from engine.layers.mlp import ACTIVATIONS
from engine.layers.rotary import Rope
from engine.models.config_fields import (
    MOST_EXPERTS,
    MOST_LAYERS,
    bad_field,
    flag,
    number,
    optional_number,
    positive,
    shown,
    whole,
)
from engine.models.families import Family, LayerLayout, MixtureFields, WindowFields
from engine.models.rope_config import read_ropes, served_context


@dataclasses.dataclass(frozen=True, slots=True)
class MixtureConfig:
    """The experts of a mixture layer.

    Attributes:
        num_experts: E.
        experts_per_token: how many of them each token passes through.
        intermediate_size: width of one expert.
        normalizes: the weights of the chosen experts are divided by their sum.
    """

    num_experts: int
    experts_per_token: int
    intermediate_size: int
    normalizes: bool


@dataclasses.dataclass(frozen=True, slots=True)
class DecoderConfig:
    """Everything the decoder's construction and forward pass depend on, besides the weights.

    Attributes:
        max_position: tokens of the longest sequence that is served.
        qkv_bias, output_bias, mlp_bias: which linear layers have one.
        activation: of the MLP's gate, a name in :data:`~engine.layers.mlp.ACTIVATIONS`.
        attention_scale: factor on the attention scores.
        embedding_scale: factor on the token embeddings.
        final_logit_softcap: logits are bent to ±c by c·tanh(logits / c); None: they are not.
        layer_windows: per layer, how many positions a query sees, itself included; None for all.
        layer_ropes: per layer, its rotary embedding.
        mixture: experts of the mixture layers; None if there are none.
        mixture_layers: indices of the layers whose MLP is a mixture.
        layout: how a checkpoint names the parts of a layer, and which norms there are.
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    activation: str
    attention_scale: float
    embedding_scale: float
    final_logit_softcap: float | None
    layer_windows: tuple[int | None, ...]
    layer_ropes: tuple[Rope, ...]
    mixture: MixtureConfig | None
    mixture_layers: frozenset[int]
    layout: LayerLayout


def read_decoder_config(stated: Mapping[str, Any], family: Family) -> DecoderConfig:
    """The decoder's shape from the fields of a ``config.json``.

    Args:
        stated: the parsed file.
        family: what the fields mean, and what holds where they are absent.

    Raises:
        ModelLoadError: naming the field that is missing, malformed or not supported.
    """
    config = family.complete(stated)
    _refuse_what_is_not_computed(config)
    num_layers = positive(config, "num_hidden_layers", most=MOST_LAYERS)
    hidden_size = positive(config, "hidden_size")
    num_heads, num_kv_heads, head_dim = _heads(config, hidden_size)
    windows = _windows(config, num_layers, family.windows)
    everywhere, local = read_ropes(config, family, head_dim)
    attention_bias = family.biases in ("config", "attention") and flag(config, "attention_bias")
    scalar = number(config, family.attention_scalar) if family.attention_scalar else float(head_dim)
    mixture = None if family.mixture is None else _mixture(config, family.mixture)
    return DecoderConfig(
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=positive(config, "intermediate_size"),
        vocab_size=positive(config, "vocab_size"),
        max_position=served_context(config),
        rms_norm_eps=number(config, "rms_norm_eps", 1e-6),
        tie_word_embeddings=flag(config, "tie_word_embeddings"),
        qkv_bias=attention_bias or family.biases == "qkv",
        output_bias=attention_bias,
        mlp_bias=family.biases == "config" and flag(config, "mlp_bias"),
        activation=_activation(config, family.activation),
        attention_scale=scalar**-0.5,
        embedding_scale=hidden_size**0.5 if family.scales_embedding else 1.0,
        final_logit_softcap=optional_number(config, "final_logit_softcapping"),
        layer_windows=windows,
        layer_ropes=tuple(everywhere if window is None else local for window in windows),
        mixture=mixture,
        mixture_layers=_mixture_layers(config, num_layers, family.mixture),
        layout=family.layout,
    )


def _refuse_what_is_not_computed(config: Mapping[str, Any]) -> None:
    quantization = config.get("quantization_config")
    if quantization:
        method = (
            str(quantization.get("quant_method", "unknown"))[:80] if isinstance(quantization, Mapping) else "unknown"
        )
        raise bad_field("quantization_config", f"checkpoints quantized with {method!r} are not supported yet")
    if config.get("attn_logit_softcapping") is not None:
        raise bad_field("attn_logit_softcapping", "a soft cap on attention scores is not supported")
    if config.get("use_bidirectional_attention"):
        raise bad_field("use_bidirectional_attention", "attention to later tokens is not supported")


def _heads(config: Mapping[str, Any], hidden_size: int) -> tuple[int, int, int]:
    """(query heads, key/value heads, head_dim)."""
    num_heads = positive(config, "num_attention_heads")
    num_kv_heads = positive(config, "num_key_value_heads", num_heads)
    head_dim = positive(config, "head_dim", hidden_size // num_heads)
    if num_heads % num_kv_heads:
        raise bad_field("num_key_value_heads", f"{num_kv_heads} does not divide num_attention_heads {num_heads}")
    if head_dim % 2:
        raise bad_field("head_dim", f"{head_dim} is odd, which rotary embeddings cannot split in halves")
    return num_heads, num_kv_heads, head_dim


def _activation(config: Mapping[str, Any], field: str) -> str:
    name = config.get(field) or "silu"
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise bad_field(field, f"{shown(name)} is not supported; supported are {', '.join(ACTIVATIONS)}")
    return name


def _windows(config: Mapping[str, Any], num_layers: int, fields: WindowFields | None) -> tuple[int | None, ...]:
    """``layer_types`` names each layer's attention where the file has it, else the family's own fields do."""
    if fields is None or (fields.switched and not flag(config, "use_sliding_window")):
        return (None,) * num_layers
    if config.get("sliding_window") is None:
        return (None,) * num_layers
    window = positive(config, "sliding_window")
    kinds = config.get("layer_types")
    if kinds is not None:
        known = {"sliding_attention": window, "full_attention": None}
        if not isinstance(kinds, list) or len(kinds) != num_layers or any(kind not in tuple(known) for kind in kinds):
            raise bad_field(
                "layer_types", f"must name full_attention or sliding_attention for each of {num_layers} layers"
            )
        return tuple(known[kind] for kind in kinds)
    newer = "_sliding_window_pattern"  # its name in files that have layer_types next to it
    name = newer if config.get(newer) is not None else "sliding_window_pattern"
    pattern = positive(config, name) if fields.patterned else num_layers + 1
    first = whole(config, "max_window_layers", 28) if fields.after_full_layers else 0
    return tuple(window if index >= first and (index + 1) % pattern else None for index in range(num_layers))


def _mixture(config: Mapping[str, Any], fields: MixtureFields) -> MixtureConfig:
    name = next((name for name in fields.num_experts if config.get(name) is not None), fields.num_experts[-1])
    num_experts = positive(config, name, most=MOST_EXPERTS)
    experts_per_token = positive(config, "num_experts_per_tok")
    if experts_per_token > num_experts:
        raise bad_field("num_experts_per_tok", f"{experts_per_token} are more than the {num_experts} experts")
    return MixtureConfig(
        num_experts=num_experts,
        experts_per_token=experts_per_token,
        intermediate_size=positive(config, fields.expert_width),
        normalizes=fields.normalizes is None or flag(config, fields.normalizes),
    )


def _mixture_layers(config: Mapping[str, Any], num_layers: int, fields: MixtureFields | None) -> frozenset[int]:
    if fields is None:
        return frozenset()
    if not fields.placed:
        return frozenset(range(num_layers))
    step = positive(config, "decoder_sparse_step", 1)
    dense = config.get("mlp_only_layers") or []
    if not isinstance(dense, list):
        raise bad_field("mlp_only_layers", "must be a list of layer indices")
    return frozenset(index for index in range(num_layers) if (index + 1) % step == 0 and index not in dense)
