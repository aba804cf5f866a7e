"""The shape of a decoder, read from a Hugging Face style configuration and checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from engine.errors import ModelLoadError
from engine.layers.rotary import Llama3Scaling, inverse_frequencies
from engine.models.families import Family


@dataclasses.dataclass(frozen=True, slots=True)
class DecoderConfig:
    """Everything the decoder's construction and forward pass depend on, besides the weights.

    Attributes:
        layer_windows: per layer, how many positions a query sees, itself included; None for all.
        rope_theta: base of the rotary frequencies.
        rope_linear_factor: positions are divided by it ("linear" scaling); 1 for none.
        rope_llama3: Llama 3.1's scaling by frequency, or None.
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
    attention_bias: bool
    mlp_bias: bool
    layer_windows: tuple[int | None, ...]
    rope_theta: float
    rope_linear_factor: float = 1.0
    rope_llama3: Llama3Scaling | None = None

    def inverse_frequencies(self) -> torch.Tensor:
        """Rotary inverse frequencies with the model's scaling, float32 [head_dim / 2]."""
        inv_freq = inverse_frequencies(self.head_dim, self.rope_theta) / self.rope_linear_factor
        return inv_freq if self.rope_llama3 is None else self.rope_llama3.apply(inv_freq)


def read_decoder_config(config: Mapping[str, Any], family: Family) -> DecoderConfig:
    """The decoder's shape from the fields of a ``config.json`` of the Llama kind.

    Args:
        config: the parsed file.
        family: what the fields mean.

    Raises:
        ModelLoadError: naming the field that is missing, malformed or not supported.
    """
    num_layers = _positive(config, "num_hidden_layers")
    num_heads = _positive(config, "num_attention_heads")
    hidden_size = _positive(config, "hidden_size")
    num_kv_heads = _positive(config, "num_key_value_heads", num_heads)
    head_dim = _positive(config, "head_dim", hidden_size // num_heads)
    if num_heads % num_kv_heads:
        raise _bad("num_key_value_heads", f"{num_kv_heads} does not divide num_attention_heads {num_heads}")
    if head_dim % 2:
        raise _bad("head_dim", f"{head_dim} is odd, which rotary embeddings cannot split in halves")
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise _bad("hidden_act", f"{config['hidden_act']!r} is not supported, only silu")
    if config.get("quantization_config"):
        method = str(config["quantization_config"].get("quant_method", "unknown"))
        raise _bad("quantization_config", f"checkpoints quantized with {method!r} are not supported yet")
    theta, linear_factor, llama3 = _rope(config)
    return DecoderConfig(
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=_positive(config, "intermediate_size"),
        vocab_size=_positive(config, "vocab_size"),
        max_position=_positive(config, "max_position_embeddings", 2048),
        rms_norm_eps=_number(config, "rms_norm_eps", 1e-6),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        attention_bias=family.biases and bool(config.get("attention_bias", False)),
        mlp_bias=family.biases and bool(config.get("mlp_bias", False)),
        layer_windows=_windows(config, num_layers, family),
        rope_theta=theta,
        rope_linear_factor=linear_factor,
        rope_llama3=llama3,
    )


def _windows(config: Mapping[str, Any], num_layers: int, family: Family) -> tuple[int | None, ...]:
    """``layer_types`` names each layer's attention where the file has it; else all layers slide if a window is set."""
    if not family.slides:
        return (None,) * num_layers
    window = config.get("sliding_window", family.default_window)
    if window is not None:
        window = _positive(config, "sliding_window", window)
    kinds = config.get("layer_types")
    if kinds is None:
        return (window,) * num_layers
    known = {"sliding_attention": window, "full_attention": None}
    if not isinstance(kinds, list) or len(kinds) != num_layers or any(kind not in known for kind in kinds):
        raise _bad("layer_types", f"must name full_attention or sliding_attention for each of {num_layers} layers")
    return tuple(known[kind] for kind in kinds)


def _rope(config: Mapping[str, Any]) -> tuple[float, float, Llama3Scaling | None]:
    """(theta, linear factor, llama3 scaling), from ``rope_parameters`` or the older two fields."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise _bad("rope_scaling", "must be an object")
    theta = _number(rope, "rope_theta", _number(config, "rope_theta", 10000.0))
    if _number(rope, "partial_rotary_factor", _number(config, "partial_rotary_factor", 1.0)) != 1.0:
        raise _bad("partial_rotary_factor", "rotating only a part of each head is not supported")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, 1.0, None
    if kind == "linear":
        return theta, _number(rope, "factor"), None
    if kind == "llama3":
        field = "original_max_position_embeddings"
        original = {field: rope.get(field, config.get(field))}
        scaling = Llama3Scaling(
            factor=_number(rope, "factor"),
            low_freq_factor=_number(rope, "low_freq_factor"),
            high_freq_factor=_number(rope, "high_freq_factor"),
            original_max_position=_positive(original, field),
        )
        return theta, 1.0, scaling
    raise _bad("rope_scaling", f"RoPE scaling {kind!r} is not supported; supported are default, linear and llama3")


def _positive(config: Mapping[str, Any], field: str, default: int | None = None) -> int:
    value = config.get(field)
    value = default if value is None else value
    if value is None:
        raise _bad(field, "is missing")
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise _bad(field, f"{value!r} is not a positive whole number")
    return value


def _number(config: Mapping[str, Any], field: str, default: float | None = None) -> float:
    value = config.get(field)
    value = default if value is None else value
    if value is None:
        raise _bad(field, "is missing")
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise _bad(field, f"{value!r} is not a positive number")
    return float(value)


def _bad(field: str, what: str) -> ModelLoadError:
    remedy = "Use a model that the engine supports, or mend this field of config.json."
    return ModelLoadError(f"{what}.", field=field, remedy=remedy)
