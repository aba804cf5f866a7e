"""From the fields of a ``config.json`` to its layers, by the layout of the family."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from engine.capacity.families import Family
from engine.capacity.fields import MAX_EXPERTS, MAX_LAYERS, REMEDY, flag, indices, names, number, positive, whole
from engine.capacity.layers import (
    AnyMixer,
    AnyMLP,
    Attention,
    DenseMLP,
    GatedDeltaNet,
    LatentAttention,
    Layer,
    Mamba2,
    MixtureMLP,
    NoMixer,
    Tensor,
)
from engine.capacity.stated import Stated
from engine.capacity.words import shown
from engine.errors import ConfigError

_KINDS = ("sliding_attention", "full_attention")
#: What published files and transformers 5 call layers with a state, and layers with a cache.
_RECURRENT = ("mamba", "linear_attention")
_FULL = ("attention", "full_attention")


def _seen(config: Mapping[str, Any], *fields: str) -> None:
    """Count fields as read that do not apply to this file, because another one switches them off."""
    for field in fields:
        config.get(field)


def read_layers(config: Mapping[str, Any], family: Family) -> tuple[Layer, ...]:
    """The layers, first to last.

    Raises:
        ConfigError: naming the field at fault.
    """
    return _LAYOUTS[family.layout](config, family)


def attention_of(config: Mapping[str, Any], family: Family) -> Attention:
    """The family's attention, without a window."""
    hidden, heads = positive(config, "hidden_size"), positive(config, "num_attention_heads")
    qkv, output = _attention_biases(config, family)
    norm = family.qk_norm
    if norm in ("config", "config_full"):
        norm = norm.replace("config", "head").removeprefix("head_") if flag(config, "use_qk_norm", False) else ""
    return Attention(
        num_heads=heads,
        num_kv_heads=_kv_heads(config, family, heads),
        head_dim=head_dim(config, family, hidden, heads),
        qkv_bias=qkv,
        output_bias=output,
        qk_norm=norm,
        sinks=family.sinks,
    )


def head_dim(config: Mapping[str, Any], family: Family, hidden: int, heads: int) -> int:
    """Stated, the family's, or hidden size / heads."""
    if config.get("head_dim") is not None:
        return positive(config, "head_dim")
    if family.head_dim is not None:
        return family.head_dim
    if hidden % heads:
        raise ConfigError(
            f"hidden_size {hidden:,} is not a multiple of num_attention_heads {heads:,}, and head_dim is not given.",
            field="head_dim",
            remedy=REMEDY,
        )
    return hidden // heads


def _kv_heads(config: Mapping[str, Any], family: Family, heads: int) -> int:
    # An explicit null means multi-head attention; an absent field means the family's default.
    absent = "num_key_value_heads" not in config
    kv_heads = positive(config, "num_key_value_heads", (family.num_kv_heads or heads) if absent else heads)
    if heads % kv_heads:
        source = " (this family's default, as the field is absent)" if absent else ""
        raise ConfigError(
            f"{kv_heads:,} key/value heads{source} cannot be shared evenly by num_attention_heads = {heads:,}.",
            field="num_key_value_heads",
            remedy=f"It must divide {heads:,}. {REMEDY}",
        )
    return kv_heads


def _attention_biases(config: Mapping[str, Any], family: Family) -> tuple[bool, bool]:
    """(query/key/value, output)."""
    if family.biases in ("config", "attention", "config_qkv"):
        stated = flag(config, "attention_bias", False)
        return stated, stated and family.biases != "config_qkv"
    if family.biases == "use_bias":
        return (flag(config, "use_bias", True),) * 2
    if family.biases == "qkv_bias":
        return flag(config, "qkv_bias", True), False
    return family.biases in ("qkv", "all"), family.biases == "all"


def _mlp_bias(config: Mapping[str, Any], family: Family) -> bool:
    if family.biases == "use_bias":
        return flag(config, "use_bias", True)
    return family.biases == "all" or (family.biases == "config" and flag(config, "mlp_bias", False))


def _dense(config: Mapping[str, Any], family: Family) -> DenseMLP:
    return DenseMLP(positive(config, "intermediate_size"), family.gated, _mlp_bias(config, family))


def _mixture(config: Mapping[str, Any], family: Family) -> MixtureMLP:
    stated = family.experts
    assert stated is not None, family
    # transformers 5 writes num_local_experts where published files of the same family say num_experts.
    renamed = config.get(stated.count) is None and config.get("num_local_experts") is not None
    count = positive(config, "num_local_experts" if renamed else stated.count, maximum=MAX_EXPERTS)
    for other in ("num_local_experts", "num_experts", "n_routed_experts"):
        if _peek(config, other) == count:
            _seen(config, other)
    top_k = positive(config, stated.top_k, maximum=MAX_EXPERTS)
    if top_k > count:
        raise ConfigError(
            f"{top_k:,} experts a token are more than the {count:,} there are.", field=stated.top_k, remedy=REMEDY
        )
    width = positive(config, stated.width)
    shared = whole(config, stated.shared_width, 0) if stated.shared_width else 0
    if stated.shared_count:
        shared = width * whole(config, stated.shared_count, 0, MAX_EXPERTS)
    return MixtureMLP(
        num_experts=count,
        top_k=top_k,
        width=width,
        shared_width=shared,
        gated=stated.gated,
        bias=stated.bias,
        shared_gate=stated.shared_gate and shared > 0,
        router_bias=stated.router_bias,
        correction=stated.correction,
        latent=whole(config, stated.latent, 0) if stated.latent else 0,
        latent_bias=bool(stated.latent) and flag(config, "mlp_bias", False),
    )


def _mlps(config: Mapping[str, Any], family: Family, layers: int) -> list[AnyMLP]:
    """The MLP of every layer."""
    _seen(config, "intermediate_size")  # of a mixture's dense layers, if it has any
    if family.experts is None:
        return [_dense(config, family)] * layers
    kinds = names(config, "mlp_layer_types", ("dense", "sparse"), layers)
    if kinds is None:
        sparse = [_is_sparse(config, family.experts.placement, index) for index in range(layers)]
    else:
        _seen(config, "first_k_dense_replace", "moe_layer_freq", "decoder_sparse_step", "mlp_only_layers")
        sparse = [kind == "sparse" for kind in kinds]
    mixture = _mixture(config, family) if any(sparse) else None
    dense = None if all(sparse) else _dense(config, family)
    chosen = [mixture if is_sparse else dense for is_sparse in sparse]
    return [mlp for mlp in chosen if mlp is not None]


def _is_sparse(config: Mapping[str, Any], placement: str, index: int) -> bool:
    if placement == "step":
        step = positive(config, "decoder_sparse_step", 1, MAX_LAYERS)
        return index not in indices(config, "mlp_only_layers") and (index + 1) % step == 0
    if placement == "first_dense":
        every = positive(config, "moe_layer_freq", 1, MAX_LAYERS)
        return index >= whole(config, "first_k_dense_replace", 0, MAX_LAYERS) and index % every == 0
    return True


def _windows(config: Mapping[str, Any], family: Family, layers: int) -> list[int | None]:
    """Per layer; ``layer_types`` says it where the file has it."""
    window = _window(config, family)
    if window is None:
        if family.sliding != "none" or set(_peeked_list(config, "layer_types")) <= {"full_attention"}:
            _seen(config, "layer_types")
        return [None] * layers
    kinds = names(config, "layer_types", _KINDS, layers)
    if kinds is not None:
        return [window if kind == "sliding_attention" else None for kind in kinds]
    if family.sliding == "even":
        return [window if index % 2 == 0 else None for index in range(layers)]
    if family.sliding == "pattern":
        every = positive(config, "sliding_window_pattern", 6, MAX_LAYERS)
        return [None if (index + 1) % every == 0 else window for index in range(layers)]
    full = whole(config, "max_window_layers", 28) if family.sliding == "switch" else 0
    return [None if index < full else window for index in range(layers)]


def _peek(config: Mapping[str, Any], field: str) -> Any:
    """A field's value, without counting it as read."""
    return config.peek(field) if isinstance(config, Stated) else config.get(field)


def _peeked_list(config: Mapping[str, Any], field: str) -> list[str]:
    """The texts of a list, likewise."""
    value = _peek(config, field)
    return [str(item)[:40] for item in value[:MAX_LAYERS]] if isinstance(value, list | tuple) else []


def _window(config: Mapping[str, Any], family: Family) -> int | None:
    if family.sliding == "none":
        return None
    _seen(config, "sliding_window", "max_window_layers", "sliding_window_pattern")
    if family.sliding == "switch" and not flag(config, "use_sliding_window", False):
        return None
    if "sliding_window" in config and config["sliding_window"] is None:
        return None
    if family.window is None and "sliding_window" not in config:
        return None
    return positive(config, "sliding_window", family.window)


def _count(config: Mapping[str, Any]) -> int:
    return positive(config, "num_hidden_layers", maximum=MAX_LAYERS)


def _plain(config: Mapping[str, Any], family: Family) -> tuple[Layer, ...]:
    """Attention and MLP in every layer."""
    layers = _count(config)
    attention = attention_of(config, family)
    windows = _windows(config, family, layers)
    mlps = _mlps(config, family, layers)
    mixers = {window: dataclasses.replace(attention, window=window) for window in set(windows)}
    return tuple(Layer(mixers[window], mlp, family.norms) for window, mlp in zip(windows, mlps, strict=True))


def _latent(config: Mapping[str, Any], family: Family) -> tuple[Layer, ...]:
    """DeepSeek-V2 and V3."""
    return tuple(Layer(_latent_mixer(config), mlp) for mlp in _mlps(config, family, _count(config)))


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


def _indexed(config: Mapping[str, Any], family: Family) -> tuple[Layer, ...]:
    """DeepSeek-V3.2 and GLM-5: latent attention to tokens that an index picks; some layers may take another's pick."""
    layers, hidden = _count(config), positive(config, "hidden_size")
    plain = _latent_mixer(config)
    _seen(config, "layer_types")
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
    mlps = _mlps(config, family, layers)
    return tuple(
        Layer(plain, mlp, extra=index if has_index else (), index_bytes=size if has_index else 0, reads=top_k)
        for has_index, mlp in zip(full, mlps, strict=True)
    )


def _index_of_layers(config: Mapping[str, Any], layers: int) -> list[bool]:
    """Of each layer, whether it has an index of its own."""
    _seen(config, "index_topk_pattern", "index_topk_freq", "index_skip_topk_offset")
    kinds = names(config, "indexer_types", ("full", "shared"), layers)
    if kinds is not None:
        return [kind == "full" for kind in kinds]
    pattern = config.get("index_topk_pattern")
    if isinstance(pattern, str) and len(pattern) == layers and set(pattern) <= {"F", "S"}:
        return [letter == "F" for letter in pattern]
    every = max(whole(config, "index_topk_freq", 1, MAX_LAYERS), 1)
    offset = whole(config, "index_skip_topk_offset", 2, MAX_LAYERS)
    return [max(index - offset + 1, 0) % every == 0 for index in range(layers)]


def _delta(config: Mapping[str, Any], family: Family) -> tuple[Layer, ...]:
    """Qwen3-Next: gated delta nets, and gated attention in every fourth layer."""
    layers = _count(config)
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
    return tuple(Layer(mixer, mlp) for mixer, mlp in zip(mixers, _mlps(config, family, layers), strict=True))


def _granite_hybrid(config: Mapping[str, Any], family: Family) -> tuple[Layer, ...]:
    """Granite 4: Mamba-2 or attention, then experts (perhaps none) and an MLP that all tokens share."""
    layers = _count(config)
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
    mlp: AnyMLP = DenseMLP(positive(config, "shared_intermediate_size", 1024)) if dense else _mixture(config, family)
    return tuple(Layer(mamba if kind in _RECURRENT else attention, mlp) for kind in kinds)


_NEMOTRON_KINDS = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}


def _nemotron_h(config: Mapping[str, Any], family: Family) -> tuple[Layer, ...]:
    """Nemotron-H: every layer is one of Mamba-2, attention, MLP or experts, with one norm."""
    _seen(config, "intermediate_size", "num_hidden_layers")
    nothing = DenseMLP(0)
    made: dict[str, Layer] = {}
    for kind in set(_nemotron_kinds(config)):
        if kind == "mamba":
            made[kind] = Layer(_nemotron_mamba(config), nothing, 1)
        elif kind == "attention":
            made[kind] = Layer(attention_of(config, family), nothing, 1)
        elif kind == "mlp":
            made[kind] = Layer(NoMixer(), _dense(config, family), 1)
        else:
            made[kind] = Layer(NoMixer(), _mixture(config, family), 1)
    return tuple(made[kind] for kind in _nemotron_kinds(config))


def _nemotron_kinds(config: Mapping[str, Any]) -> list[str]:
    stated = config.get("layers_block_type")
    known = (*_NEMOTRON_KINDS.values(), *_RECURRENT, *_FULL)
    if isinstance(stated, list) and 0 < len(stated) <= MAX_LAYERS:
        _seen(config, "hybrid_override_pattern", "layer_types")
        kinds = names(config, "layers_block_type", known, len(stated)) or []
        return ["mamba" if kind in _RECURRENT else "attention" if kind in _FULL else kind for kind in kinds]
    pattern = config.get("hybrid_override_pattern")
    if not isinstance(pattern, str) or not 0 < len(pattern) <= MAX_LAYERS or set(pattern) - set(_NEMOTRON_KINDS):
        raise ConfigError(
            f"{shown(pattern)} is not a sequence of M (Mamba), * (attention), - (MLP) and E (experts).",
            field="hybrid_override_pattern",
            remedy=REMEDY,
        )
    if config.get("num_hidden_layers") is not None and _count(config) != len(pattern):
        raise ConfigError(
            f"names {len(pattern):,} layers, but num_hidden_layers is {_count(config):,}.",
            field="hybrid_override_pattern",
            remedy=REMEDY,
        )
    return [_NEMOTRON_KINDS[letter] for letter in pattern]


def _nemotron_mamba(config: Mapping[str, Any]) -> Mamba2:
    if _peek(config, "mamba_ssm_cache_dtype") == "float32":
        _seen(config, "mamba_ssm_cache_dtype")  # what states are counted in
    return Mamba2(
        num_heads=positive(config, "mamba_num_heads", 128),
        head_dim=positive(config, "mamba_head_dim", 64),
        groups=positive(config, "n_groups", 8),
        state_dim=positive(config, "ssm_state_size", 128),
        kernel=positive(config, "conv_kernel", 4, 1024),
        conv_bias=flag(config, "use_conv_bias", True),
        bias=flag(config, "use_bias", False),
    )


def _falcon(config: Mapping[str, Any], family: Family) -> tuple[Layer, ...]:
    """Falcon: multi-query attention, or groups in the newer form; one or two norms before parallel branches."""
    hidden, heads = positive(config, "hidden_size"), positive(config, "num_attention_heads")
    _seen(config, "num_kv_heads", "parallel_attn", "multi_query", "num_ln_in_parallel_attn")
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
    return (Layer(attention, mlp, norms),) * _count(config)


def _llama4(config: Mapping[str, Any], family: Family) -> tuple[Layer, ...]:
    """Llama 4: chunked attention in three of four layers; experts in every n-th layer."""
    layers = _count(config)
    attention = attention_of(config, family)
    chunk = positive(config, "attention_chunk_size", 8192)
    every = positive(config, "no_rope_layer_interval", 4, MAX_LAYERS)
    step = positive(config, "interleave_moe_layer_step", 1, MAX_LAYERS)
    width = positive(config, "intermediate_size")
    dense = DenseMLP(positive(config, "intermediate_size_mlp", 16384))
    mixture = MixtureMLP(
        num_experts=positive(config, "num_local_experts", 16, MAX_EXPERTS),
        top_k=positive(config, "num_experts_per_tok", 1, MAX_EXPERTS),
        width=width,
        shared_width=width,
    )
    chunked = dataclasses.replace(attention, window=chunk)
    kinds = names(config, "layer_types", ("chunked_attention", "full_attention"), layers)
    turned = _switches(config, "no_rope_layers", layers) if _peek(config, "no_rope_layers") else None
    if kinds is not None:
        turned = [kind == "chunked_attention" for kind in kinds]
        _seen(config, "no_rope_layers")
    slides = turned or [(index + 1) % every != 0 for index in range(layers)]
    listed = indices(config, "moe_layers")
    sparse = [index in listed if listed else (index + 1) % step == 0 for index in range(layers)]
    return tuple(
        Layer(chunked if slide else attention, mixture if is_sparse else dense)
        for slide, is_sparse in zip(slides, sparse, strict=True)
    )


def _mimo(config: Mapping[str, Any], family: Family) -> tuple[Layer, ...]:
    """MiMo-V2: sliding layers have more key/value heads and sinks; values are narrower than keys."""
    layers = _count(config)
    full = dataclasses.replace(attention_of(config, family), value_dim=positive(config, "v_head_dim", 128))
    stated = whole(config, "sliding_window_size", 0)
    window = stated + 1 if stated else positive(config, "sliding_window", 129)
    sliding = dataclasses.replace(
        full,
        num_heads=positive(config, "swa_num_attention_heads", full.num_heads),
        num_kv_heads=positive(config, "swa_num_key_value_heads", 2 * full.num_kv_heads),
        head_dim=positive(config, "swa_head_dim", full.head_dim),
        value_dim=positive(config, "swa_v_head_dim", full.value_dim),
        window=window,
        sinks=flag(config, "add_swa_attention_sink_bias", True),
    )
    full = dataclasses.replace(full, sinks=flag(config, "add_full_attention_sink_bias", False))
    kinds = names(config, "layer_types", _KINDS, layers)
    pattern = _switches(config, "hybrid_layer_pattern", layers)
    if kinds is not None:
        slides = [kind == "sliding_attention" for kind in kinds]
    else:
        slides = pattern or [index > 0 and (index + 1) % 6 != 0 for index in range(layers)]
    sparse = _switches(config, "moe_layer_freq", layers)
    if sparse is None:
        mlps = _mlps(config, family, layers)
    else:
        _seen(config, "intermediate_size", "mlp_layer_types", "first_k_dense_replace")
        mlps = [_mixture(config, family) if is_sparse else _dense(config, family) for is_sparse in sparse]
    return tuple(Layer(sliding if slide else full, mlp) for slide, mlp in zip(slides, mlps, strict=True))


def _switches(config: Mapping[str, Any], field: str, layers: int) -> list[bool] | None:
    """A list of 0 and 1 for each layer; None where the field is absent or no list."""
    value = config.get(field)
    if not isinstance(value, list | tuple):
        return None
    if len(value) != layers or not all(item in (0, 1) for item in value if not isinstance(item, list | dict)):
        raise ConfigError(f"must be 0 or 1 for each of {layers:,} layers.", field=field, remedy=REMEDY)
    return [bool(item) for item in value]


def _gemma4(config: Mapping[str, Any], family: Family) -> tuple[Layer, ...]:
    """Gemma 4: full layers have wider heads; the last layers may share the cache of earlier ones; experts beside the
    MLP; an embedding for each layer."""
    layers, hidden = _count(config), positive(config, "hidden_size")
    kinds = names(config, "layer_types", _KINDS, layers)
    if kinds is None:
        kinds = ["full_attention" if (index + 1) % 6 == 0 else "sliding_attention" for index in range(layers)]
    kinds[-1] = "full_attention"
    sliding = dataclasses.replace(attention_of(config, family), window=positive(config, "sliding_window", 512))
    same = flag(config, "attention_k_eq_v", False)
    stated = config.get("num_global_key_value_heads") if same else None
    full = dataclasses.replace(
        sliding,
        window=None,
        head_dim=positive(config, "global_head_dim", 512),
        num_kv_heads=sliding.num_kv_heads if stated is None else positive(config, "num_global_key_value_heads"),
        key_is_value=same,
    )
    _seen(config, "num_global_key_value_heads", "per_layer_config")
    first_shared = layers - whole(config, "num_kv_shared_layers", 0, layers)
    wide = 2 if flag(config, "use_double_wide_mlp", False) else 1
    width = positive(config, "intermediate_size")
    extra, norms = _gemma4_extra(config, hidden)
    made: dict[tuple[str, bool], Layer] = {}
    for kind in set(kinds):
        for shares in (False, True):
            mixer = dataclasses.replace(full if kind == "full_attention" else sliding, shares_cache=shares)
            mlp = _gemma4_mlp(config, width * (wide if shares else 1))
            made[kind, shares] = Layer(mixer, mlp, family.norms + norms, extra=extra)
    return tuple(made[kind, index >= first_shared] for index, kind in enumerate(kinds))


def _gemma4_mlp(config: Mapping[str, Any], width: int) -> AnyMLP:
    fields = ("num_experts", "top_k_experts", "moe_intermediate_size")
    if not flag(config, "enable_moe_block", False):
        _seen(config, *fields)
        return DenseMLP(width)
    count, top_k = (positive(config, field, maximum=MAX_EXPERTS) for field in fields[:2])
    if top_k > count:
        raise ConfigError(f"{top_k:,} are more than the {count:,} there are.", field=fields[1], remedy=REMEDY)
    # The MLP of all tokens stands beside the experts.
    return MixtureMLP(count, top_k, positive(config, fields[2]), shared_width=width, correction=True)


def _gemma4_extra(config: Mapping[str, Any], hidden: int) -> tuple[tuple[Tensor, ...], int]:
    """(a layer's tensors beside attention and MLP, norms more than usual)."""
    width = whole(config, "hidden_size_per_layer_input", 256)
    experts = flag(config, "enable_moe_block", False)
    tensors = []
    if width:
        tensors.append(Tensor("mlp", "per_layer_gate", width, hidden, linear=True))
        tensors.append(Tensor("mlp", "per_layer_projection", hidden, width, linear=True))
    if experts:
        tensors.append(Tensor("router", "scale", 1, hidden))
    return tuple(tensors), (1 if width else 0) + (3 if experts else 0)


def read_extra(config: Mapping[str, Any], family: Family) -> tuple[Tensor, ...]:
    """Tensors beside embedding, layers and head: Gemma 4's embeddings of each layer."""
    if family.layout != "gemma4":
        return ()
    width = whole(config, "hidden_size_per_layer_input", 256)
    vocab = positive(config, "vocab_size_per_layer_input", 262144)
    wide = _count(config) * width
    if not width:
        return ()
    return (
        Tensor("embedding", "per_layer_embedding", vocab, wide),
        Tensor("mlp", "per_layer_model_projection", wide, positive(config, "hidden_size"), linear=True),
        Tensor("norms", "norm", 1, width),
    )


def _minimax_m3(config: Mapping[str, Any], family: Family) -> tuple[Layer, ...]:
    """MiniMax-M3: experts or a dense MLP of a width of its own; sparse layers pick blocks of keys by an index."""
    layers, hidden = _count(config), positive(config, "hidden_size")
    stated = config.get("sparse_attention_config")
    sparse = Stated(stated, path="sparse_attention_config.") if isinstance(stated, Mapping) else {}
    attention = attention_of(config, family)
    kinds = names(config, "layer_types", ("full_attention", "minimax_m3_sparse"), layers)
    frequencies = _switches(sparse, "sparse_attention_freq", layers)
    indexed = [kind == "minimax_m3_sparse" for kind in kinds] if kinds else frequencies or [False] * layers
    heads, width, size, blocks = (
        positive(sparse, old, positive(config, new, default))
        for old, new, default in (
            ("sparse_num_index_heads", "index_n_heads", 4),
            ("sparse_index_dim", "index_head_dim", 128),
            ("sparse_block_size", "index_block_size", 128),
            ("sparse_topk_blocks", "index_topk_blocks", 16),
        )
    )
    near = positive(sparse, "sparse_local_block", positive(config, "index_local_blocks", 1))
    index = (
        Tensor("attention", "index_query", heads * width, hidden, linear=True),
        Tensor("attention", "index_key", width, hidden, linear=True),
        Tensor("norms", "norm", 1, width, 2),
    )
    mlps = _minimax_m3_mlps(config, family, layers)
    picks = {"extra": index, "index_bytes": 2 * width, "reads": size * (blocks + near)}
    return tuple(
        Layer(attention, mlp, **(picks if has_index else {}))  # type: ignore[arg-type]
        for has_index, mlp in zip(indexed, mlps, strict=True)
    )


def _minimax_m3_mlps(config: Mapping[str, Any], family: Family, layers: int) -> list[AnyMLP]:
    kinds = names(config, "mlp_layer_types", ("dense", "sparse"), layers)
    frequencies = _switches(config, "moe_layer_freq", layers)
    sparse = [kind == "sparse" for kind in kinds] if kinds else frequencies or [True] * layers
    dense = DenseMLP(positive(config, "dense_intermediate_size", 12288))
    mixture = _mixture(config, family) if any(sparse) else dense
    return [mixture if is_sparse else dense for is_sparse in sparse]


def _step(config: Mapping[str, Any], family: Family) -> tuple[Layer, ...]:
    """Step-3.5 and 3.7: a gate a head, sliding layers with more query heads, experts beside a shared one."""
    layers, hidden = _count(config), positive(config, "hidden_size")
    kinds = _padded_names(config, "layer_types", _KINDS, layers) or ["full_attention"] * layers
    full = attention_of(config, family)
    groups = config.get("num_attention_groups")
    if groups is not None:
        full = dataclasses.replace(full, num_kv_heads=positive(config, "num_attention_groups"))
    other = config.get("attention_other_setting")
    other = other if isinstance(other, Mapping) else {}
    heads = positive(config, "num_sliding_attention_heads", positive(other, "num_attention_heads", full.num_heads))
    for number_of in (full.num_heads, heads):
        if number_of % full.num_kv_heads:
            raise ConfigError(
                f"{full.num_kv_heads:,} key/value heads cannot be shared evenly by {number_of:,} heads.",
                field="num_key_value_heads",
                remedy=REMEDY,
            )
    window = None if config.get("sliding_window") is None else positive(config, "sliding_window")
    sliding = dataclasses.replace(full, num_heads=heads, window=window)
    mlps = _step_mlps(config, family, layers)
    made = []
    for kind, mlp in zip(kinds, mlps, strict=True):
        mixer = full if kind == "full_attention" else sliding
        made.append(Layer(mixer, mlp, extra=(Tensor("attention", "head_gate", mixer.num_heads, hidden),)))
    return tuple(made)


def _step_mlps(config: Mapping[str, Any], family: Family, layers: int) -> list[AnyMLP]:
    kinds = _padded_names(config, "mlp_layer_types", ("dense", "sparse"), layers)
    stated = config.get("moe_layers_enum")
    if isinstance(stated, str):
        stated = [int(item) for item in stated.split(",") if item.strip().isascii() and item.strip().isdigit()]
    if kinds is None and stated is not None:
        chosen = indices({"moe_layers_enum": stated}, "moe_layers_enum")
        kinds = ["sparse" if index in chosen else "dense" for index in range(layers)]
    if kinds is None:
        kinds = ["sparse" if index >= 3 else "dense" for index in range(layers)]
    bias = flag(config, "mlp_bias", False)
    dense = DenseMLP(positive(config, "intermediate_size", 11264), bias=bias)
    if "sparse" not in kinds:
        return [dense] * layers
    old = {"n_routed_experts": "moe_num_experts", "num_experts_per_tok": "moe_top_k"}
    count, top_k = (
        positive(config, new if config.get(new) is not None else older, maximum=MAX_EXPERTS)
        for new, older in old.items()
    )
    if top_k > count:
        raise ConfigError(
            f"{top_k:,} experts a token are more than the {count:,} there are.",
            field="num_experts_per_tok",
            remedy=REMEDY,
        )
    if _peek(config, "num_local_experts") is not None:
        _seen(config, "num_local_experts", "moe_num_experts", "moe_top_k")
    shared = positive(config, "share_expert_dim", positive(config, "share_expert_dims", 1280))
    mixture = MixtureMLP(
        count,
        top_k,
        positive(config, "moe_intermediate_size", 1280),
        shared_width=shared,
        shared_bias=bias,
        correction=True,
    )
    return [mixture if kind == "sparse" else dense for kind in kinds]


def _padded_names(config: Mapping[str, Any], field: str, known: tuple[str, ...], layers: int) -> list[str] | None:
    """As :func:`names`; layers of multi-token prediction may stand at the end."""
    more = whole(config, "num_nextn_predict_layers", 0, MAX_LAYERS)
    value = config.get(field)
    padded = isinstance(value, list) and more > 0 and len(value) == layers + more
    found = names(config, field, known, layers + more if padded else layers)
    return None if found is None else found[:layers]


def _blocks(config: Mapping[str, Any], family: Family) -> tuple[Layer, ...]:
    """Nemotron-NAS (DeciLM): each layer states its own attention and MLP, or that it has none (arXiv:2411.19146)."""
    stated = config.get("block_configs")
    if not isinstance(stated, list) or not 0 < len(stated) <= MAX_LAYERS:
        raise ConfigError("must be a list with one object for each layer.", field="block_configs", remedy=REMEDY)
    if _count(config) != len(stated):
        raise ConfigError(
            f"names {len(stated):,} layers, but num_hidden_layers is {_count(config):,}.",
            field="block_configs",
            remedy=REMEDY,
        )
    hidden, heads = positive(config, "hidden_size"), positive(config, "num_attention_heads")
    width = head_dim(config, family, hidden, heads)
    return tuple(_block(config, family, block, heads, width) for block in stated)


def _block(config: Mapping[str, Any], family: Family, block: object, heads: int, width: int) -> Layer:
    hidden = positive(config, "hidden_size")
    parts = [block.get(name) if isinstance(block, Mapping) else None for name in ("attention", "ffn")]
    if not all(isinstance(part, Mapping) for part in parts):
        raise ConfigError("each layer must state attention and ffn.", field="block_configs", remedy=REMEDY)
    attention, ffn = parts
    mixer: AnyMixer = NoMixer()
    extra: list[Tensor] = []
    if flag(attention, "replace_with_linear", False):
        extra.append(Tensor("attention", "attention_linear", hidden, hidden, linear=True))
    elif not flag(attention, "no_op", False):
        group = positive(attention, "n_heads_in_group", maximum=heads)
        if heads % group:
            raise ConfigError(f"{heads:,} heads are no groups of {group:,}.", field="n_heads_in_group", remedy=REMEDY)
        qkv, output = _attention_biases(config, family)
        mixer = Attention(heads, heads // group, width, qkv_bias=qkv, output_bias=output)
    mlp = DenseMLP(0)
    if flag(ffn, "replace_with_linear", False):
        extra.append(Tensor("mlp", "mlp_linear", hidden, hidden, linear=True))
    elif not flag(ffn, "no_op", False):
        share = number(ffn, "ffn_mult", 0.0, 0.0, 1000.0)
        inner = int(2 * share * hidden / 3)
        stated = config.get("intermediate_size") if not inner else None
        rows = positive(config, "intermediate_size") if stated else -(-inner // 256) * 256
        mlp = DenseMLP(rows, bias=_mlp_bias(config, family))
    _seen(config, "intermediate_size", "mlp_bias", "attention_bias")
    norms = sum(not flag(part, "no_op", False) for part in (attention, ffn))
    return Layer(mixer, mlp, norms, extra=tuple(extra))


_LAYOUTS: dict[str, Callable[[Mapping[str, Any], Family], tuple[Layer, ...]]] = {
    "plain": _plain,
    "latent": _latent,
    "delta": _delta,
    "granite_hybrid": _granite_hybrid,
    "nemotron_h": _nemotron_h,
    "falcon": _falcon,
    "llama4": _llama4,
    "indexed": _indexed,
    "mimo": _mimo,
    "gemma4": _gemma4,
    "blocks": _blocks,
    "minimax_m3": _minimax_m3,
    "step": _step,
}
