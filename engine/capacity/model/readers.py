"""From the fields of a ``config.json`` to its layers, by the layout of the family."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from engine.capacity.model.families import FamilyFields
from engine.capacity.model.fields import MAX_EXPERTS, MAX_LAYERS, REMEDY, flag, indices, names, positive, whole
from engine.capacity.model.layer_fields import (
    attention_of,
    dense_mlp,
    head_dim,
    layer_count,
    mixture_of,
    mlps_of,
    peek,
    seen,
    switches,
    windows_of,
)
from engine.capacity.model.layers import AnyMLP, DenseMLP, Layer, MixtureOfExperts
from engine.capacity.model.mixers import AnyMixer, Attention, GatedDeltaNet, LatentAttention, Mamba2, NoMixer
from engine.capacity.model.recent_readers import blocks, deepseek_v4, gemma4, mimo, minimax_m3, step
from engine.capacity.model.tensors import Tensor
from engine.capacity.text import shown
from engine.errors import ConfigError

#: What published files and transformers 5 call layers with a state, and layers with a cache.
_RECURRENT = ("mamba", "linear_attention")
_FULL = ("attention", "full_attention")


def read_layers(config: Mapping[str, Any], family: FamilyFields) -> tuple[Layer, ...]:
    """The layers, first to last.

    Raises:
        ConfigError: naming the field at fault.
    """
    return _LAYOUTS[family.layout](config, family)


def _plain(config: Mapping[str, Any], family: FamilyFields) -> tuple[Layer, ...]:
    """Attention and MLP in every layer."""
    layers = layer_count(config)
    attention = attention_of(config, family)
    windows = windows_of(config, family, layers)
    mlps = mlps_of(config, family, layers)
    mixers = {window: dataclasses.replace(attention, window=window) for window in set(windows)}
    return tuple(Layer(mixers[window], mlp, family.norms) for window, mlp in zip(windows, mlps, strict=True))


def _latent(config: Mapping[str, Any], family: FamilyFields) -> tuple[Layer, ...]:
    """DeepSeek-V2 and V3."""
    return tuple(Layer(_latent_mixer(config), mlp) for mlp in mlps_of(config, family, layer_count(config)))


def _latent_mixer(config: Mapping[str, Any]) -> LatentAttention:
    compressed = config.get("q_lora_rank", 1536) is not None
    return LatentAttention(
        num_heads=positive(config, "num_attention_heads"),
        query_rank=positive(config, "q_lora_rank", 1536) if compressed else None,
        kv_rank=positive(config, "kv_lora_rank", 512),
        nope_dim=positive(config, "qk_nope_head_dim", 128),
        rope_dim=positive(config, "qk_rope_head_dim", 64),
        value_dim=positive(config, "v_head_dim", 128),
        bias=flag(config, "attention_bias", False),
    )


def _indexed(config: Mapping[str, Any], family: FamilyFields) -> tuple[Layer, ...]:
    """DeepSeek-V3.2 and GLM-5: latent attention to tokens that an index picks; some layers may take another's pick."""
    layers, hidden = layer_count(config), positive(config, "hidden_size")
    plain = _latent_mixer(config)
    seen(config, "layer_types")
    heads, width = positive(config, "index_n_heads", maximum=65_536), positive(config, "index_head_dim", 128)
    top_k = positive(config, "index_topk", 2048)
    if plain.query_rank is None:
        raise ConfigError("an index needs compressed queries.", field="q_lora_rank", remedy=REMEDY)
    index = (
        Tensor("attention", "index_query", heads * width, plain.query_rank, linear=True),
        Tensor("attention", "index_key", width, hidden, linear=True),
        Tensor("attention", "index_weights", heads, hidden),
        Tensor("norms", "norm", 2, width),
    )
    # Its keys are kept in FP8, with a scale of 4 bytes for each 128.
    size = width + 4 * -(-width // 128)
    full = _index_of_layers(config, layers)
    mlps = mlps_of(config, family, layers)
    return tuple(
        Layer(plain, mlp, extra=index if has_index else (), index_bytes=size if has_index else 0, reads=top_k)
        for has_index, mlp in zip(full, mlps, strict=True)
    )


def _index_of_layers(config: Mapping[str, Any], layers: int) -> list[bool]:
    """Of each layer, whether it has an index of its own."""
    seen(config, "index_topk_pattern", "index_topk_freq", "index_skip_topk_offset")
    kinds = names(config, "indexer_types", ("full", "shared"), layers)
    if kinds is not None:
        return [kind == "full" for kind in kinds]
    pattern = config.get("index_topk_pattern")
    if isinstance(pattern, str) and len(pattern) == layers and set(pattern) <= {"F", "S"}:
        return [letter == "F" for letter in pattern]
    every = max(whole(config, "index_topk_freq", 1, MAX_LAYERS), 1)
    offset = whole(config, "index_skip_topk_offset", 2, MAX_LAYERS)
    return [max(index - offset + 1, 0) % every == 0 for index in range(layers)]


def _delta(config: Mapping[str, Any], family: FamilyFields) -> tuple[Layer, ...]:
    """Qwen3-Next: gated delta nets, and gated attention in every fourth layer."""
    layers = layer_count(config)
    full = dataclasses.replace(attention_of(config, family), gated=True)
    linear = GatedDeltaNet(
        num_key_heads=positive(config, "linear_num_key_heads", 16),
        num_value_heads=positive(config, "linear_num_value_heads", 32),
        key_dim=positive(config, "linear_key_head_dim", 128),
        value_dim=positive(config, "linear_value_head_dim", 128),
        kernel=positive(config, "linear_conv_kernel_dim", 4, 1024),
    )
    kinds = names(config, "layer_types", ("linear_attention", "full_attention"), layers)
    if kinds is None:
        every = positive(config, "full_attention_interval", 4, MAX_LAYERS)
        kinds = ["linear_attention" if (index + 1) % every else "full_attention" for index in range(layers)]
    mixers: list[AnyMixer] = [linear if kind == "linear_attention" else full for kind in kinds]
    return tuple(Layer(mixer, mlp) for mixer, mlp in zip(mixers, mlps_of(config, family, layers), strict=True))


def _granite_hybrid(config: Mapping[str, Any], family: FamilyFields) -> tuple[Layer, ...]:
    """Granite 4: Mamba-2 or attention, then experts (perhaps none) and an MLP that all tokens share."""
    layers = layer_count(config)
    hidden = positive(config, "hidden_size")
    heads = positive(config, "mamba_n_heads", 128)
    stated = config.get("mamba_d_head")
    inner = positive(config, "mamba_expand", 2, 64) * hidden
    mamba = Mamba2(
        num_heads=heads,
        head_dim=inner // heads or 1 if stated in (None, "auto") else positive(config, "mamba_d_head"),
        groups=positive(config, "mamba_n_groups", 1),
        state_dim=positive(config, "mamba_d_state", 256),
        kernel=positive(config, "mamba_d_conv", 4, 1024),
        conv_bias=flag(config, "mamba_conv_bias", True),
        bias=flag(config, "mamba_proj_bias", False),
    )
    attention = attention_of(config, family)
    kinds = names(config, "layer_types", (*_RECURRENT, *_FULL), layers) or ["mamba"] * layers
    dense = whole(config, "num_local_experts", 8) == 0
    mlp: AnyMLP = DenseMLP(positive(config, "shared_intermediate_size", 1024)) if dense else mixture_of(config, family)
    return tuple(Layer(mamba if kind in _RECURRENT else attention, mlp) for kind in kinds)


_NEMOTRON_KINDS = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}


def _nemotron_h(config: Mapping[str, Any], family: FamilyFields) -> tuple[Layer, ...]:
    """Nemotron-H: every layer is one of Mamba-2, attention, MLP or experts, with one norm."""
    seen(config, "intermediate_size", "num_hidden_layers")
    nothing = DenseMLP(0)
    made: dict[str, Layer] = {}
    for kind in set(_nemotron_kinds(config)):
        if kind == "mamba":
            made[kind] = Layer(_nemotron_mamba(config), nothing, 1)
        elif kind == "attention":
            made[kind] = Layer(attention_of(config, family), nothing, 1)
        elif kind == "mlp":
            made[kind] = Layer(NoMixer(), dense_mlp(config, family), 1)
        else:
            made[kind] = Layer(NoMixer(), mixture_of(config, family), 1)
    return tuple(made[kind] for kind in _nemotron_kinds(config))


def _nemotron_kinds(config: Mapping[str, Any]) -> list[str]:
    stated = config.get("layers_block_type")
    known = (*_NEMOTRON_KINDS.values(), *_RECURRENT, *_FULL)
    if isinstance(stated, list) and 0 < len(stated) <= MAX_LAYERS:
        seen(config, "hybrid_override_pattern", "layer_types")
        kinds = names(config, "layers_block_type", known, len(stated)) or []
        return ["mamba" if kind in _RECURRENT else "attention" if kind in _FULL else kind for kind in kinds]
    pattern = config.get("hybrid_override_pattern")
    if not isinstance(pattern, str) or not 0 < len(pattern) <= MAX_LAYERS or set(pattern) - set(_NEMOTRON_KINDS):
        raise ConfigError(
            f"{shown(pattern)} is not a sequence of M (Mamba), * (attention), - (MLP) and E (experts).",
            field="hybrid_override_pattern",
            remedy=REMEDY,
        )
    if config.get("num_hidden_layers") is not None and layer_count(config) != len(pattern):
        raise ConfigError(
            f"names {len(pattern):,} layers, but num_hidden_layers is {layer_count(config):,}.",
            field="hybrid_override_pattern",
            remedy=REMEDY,
        )
    return [_NEMOTRON_KINDS[letter] for letter in pattern]


def _nemotron_mamba(config: Mapping[str, Any]) -> Mamba2:
    if peek(config, "mamba_ssm_cache_dtype") == "float32":
        seen(config, "mamba_ssm_cache_dtype")  # what states are counted in
    return Mamba2(
        num_heads=positive(config, "mamba_num_heads", 128),
        head_dim=positive(config, "mamba_head_dim", 64),
        groups=positive(config, "n_groups", 8),
        state_dim=positive(config, "ssm_state_size", 128),
        kernel=positive(config, "conv_kernel", 4, 1024),
        conv_bias=flag(config, "use_conv_bias", True),
        bias=flag(config, "use_bias", False),
    )


def _falcon(config: Mapping[str, Any], family: FamilyFields) -> tuple[Layer, ...]:
    """Falcon: multi-query attention, or groups in the newer form; one or two norms before parallel branches."""
    hidden, heads = positive(config, "hidden_size"), positive(config, "num_attention_heads")
    seen(config, "num_kv_heads", "parallel_attn", "multi_query", "num_ln_in_parallel_attn")
    newer = flag(config, "new_decoder_architecture", False)
    older = 1 if flag(config, "multi_query", True) else heads
    kv_heads = positive(config, "num_kv_heads", heads) if newer else older
    if heads % kv_heads:
        raise ConfigError(
            f"{kv_heads:,} key/value heads cannot be shared evenly by {heads:,} heads.",
            field="num_kv_heads",
            remedy=f"It must divide {heads:,}. {REMEDY}",
        )
    bias = flag(config, "bias", False)
    attention = Attention(heads, kv_heads, head_dim(config, family, hidden, heads), qkv_bias=bias, output_bias=bias)
    norms = whole(config, "num_ln_in_parallel_attn", 2 if newer else 1, 2)
    if not newer:
        norms = 1 if flag(config, "parallel_attn", True) else 2
    mlp = DenseMLP(positive(config, "ffn_hidden_size", 4 * hidden), gated=False, bias=bias)
    return (Layer(attention, mlp, norms),) * layer_count(config)


def _llama4(config: Mapping[str, Any], family: FamilyFields) -> tuple[Layer, ...]:
    """Llama 4: chunked attention in three of four layers; experts in every n-th layer."""
    layers = layer_count(config)
    attention = attention_of(config, family)
    chunk = positive(config, "attention_chunk_size", 8192)
    every = positive(config, "no_rope_layer_interval", 4, MAX_LAYERS)
    step = positive(config, "interleave_moe_layer_step", 1, MAX_LAYERS)
    width = positive(config, "intermediate_size")
    dense = DenseMLP(positive(config, "intermediate_size_mlp", 16384))
    mixture = MixtureOfExperts(
        num_experts=positive(config, "num_local_experts", 16, MAX_EXPERTS),
        top_k=positive(config, "num_experts_per_tok", 1, MAX_EXPERTS),
        width=width,
        shared_width=width,
    )
    chunked = dataclasses.replace(attention, window=chunk)
    kinds = names(config, "layer_types", ("chunked_attention", "full_attention"), layers)
    turned = switches(config, "no_rope_layers", layers) if peek(config, "no_rope_layers") else None
    if kinds is not None:
        turned = [kind == "chunked_attention" for kind in kinds]
        seen(config, "no_rope_layers")
    slides = turned or [(index + 1) % every != 0 for index in range(layers)]
    listed = indices(config, "moe_layers")
    sparse = [index in listed if listed else (index + 1) % step == 0 for index in range(layers)]
    return tuple(
        Layer(chunked if slide else attention, mixture if is_sparse else dense)
        for slide, is_sparse in zip(slides, sparse, strict=True)
    )


_LAYOUTS: dict[str, Callable[[Mapping[str, Any], FamilyFields], tuple[Layer, ...]]] = {
    "plain": _plain,
    "latent": _latent,
    "delta": _delta,
    "granite_hybrid": _granite_hybrid,
    "nemotron_h": _nemotron_h,
    "falcon": _falcon,
    "llama4": _llama4,
    "indexed": _indexed,
    "mimo": mimo,
    "gemma4": gemma4,
    "blocks": blocks,
    "minimax_m3": minimax_m3,
    "step": step,
    "deepseek_v4": deepseek_v4,
}
