"""Layouts of 2025 and later: layers that differ in heads and widths, that index, share caches, or state themselves."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from engine.capacity.model.families import FamilyFields
from engine.capacity.model.fields import MAX_EXPERTS, MAX_LAYERS, REMEDY, flag, indices, names, number, positive, whole
from engine.capacity.model.layer_fields import (
    ATTENTION_KINDS,
    attention_biases,
    attention_of,
    dense_mlp,
    head_dim,
    layer_count,
    mixture_of,
    mlp_bias,
    mlps_of,
    peek,
    seen,
    switches,
)
from engine.capacity.model.layers import AnyMLP, DenseMLP, Layer, MixtureOfExperts
from engine.capacity.model.mixers import AnyMixer, Attention, CompressedAttention, NoMixer
from engine.capacity.model.stated import Stated
from engine.capacity.model.tensors import Tensor
from engine.errors import ConfigError


def mimo(config: Mapping[str, Any], family: FamilyFields) -> tuple[Layer, ...]:
    """MiMo-V2: sliding layers have more key/value heads and sinks; values are narrower than keys."""
    layers = layer_count(config)
    full = dataclasses.replace(attention_of(config, family), value_dim=positive(config, "v_head_dim", 128))
    stated = whole(config, "sliding_window_size", 0)
    seen(config, "sliding_window")
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
    kinds = names(config, "layer_types", ATTENTION_KINDS, layers)
    pattern = switches(config, "hybrid_layer_pattern", layers)
    if kinds is not None:
        slides = [kind == "sliding_attention" for kind in kinds]
    else:
        slides = pattern or [index > 0 and (index + 1) % 6 != 0 for index in range(layers)]
    sparse = switches(config, "moe_layer_freq", layers)
    if sparse is None:
        mlps = mlps_of(config, family, layers)
    else:
        seen(config, "intermediate_size", "mlp_layer_types", "first_k_dense_replace")
        mlps = [mixture_of(config, family) if is_sparse else dense_mlp(config, family) for is_sparse in sparse]
    return tuple(Layer(sliding if slide else full, mlp) for slide, mlp in zip(slides, mlps, strict=True))


def gemma4(config: Mapping[str, Any], family: FamilyFields) -> tuple[Layer, ...]:
    """Gemma 4: full layers have wider heads; the last layers may share the cache of earlier ones; experts next to the
    MLP; an embedding for each layer."""
    layers, hidden = layer_count(config), positive(config, "hidden_size")
    kinds = names(config, "layer_types", ATTENTION_KINDS, layers)
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
    seen(config, "num_global_key_value_heads", "per_layer_config")
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
        seen(config, *fields)
        return DenseMLP(width)
    count, top_k = (positive(config, field, maximum=MAX_EXPERTS) for field in fields[:2])
    if top_k > count:
        raise ConfigError(f"{top_k:,} are more than the {count:,} there are.", field=fields[1], remedy=REMEDY)
    # The MLP of all tokens is there besides the experts.
    return MixtureOfExperts(count, top_k, positive(config, fields[2]), shared_width=width, correction=True)


def _gemma4_extra(config: Mapping[str, Any], hidden: int) -> tuple[tuple[Tensor, ...], int]:
    """(a layer's tensors besides attention and MLP, norms more than usual)."""
    width = whole(config, "hidden_size_per_layer_input", 256)
    experts = flag(config, "enable_moe_block", False)
    tensors = []
    if width:
        tensors.append(Tensor("mlp", "per_layer_gate", width, hidden, linear=True))
        tensors.append(Tensor("mlp", "per_layer_projection", hidden, width, linear=True))
    if experts:
        tensors.append(Tensor("router", "scale", 1, hidden))
    return tuple(tensors), (1 if width else 0) + (3 if experts else 0)


_V4_KINDS = ("sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention")
_V4_RATES = {0: _V4_KINDS[0], 4: _V4_KINDS[1], 128: _V4_KINDS[2]}


def deepseek_v4(config: Mapping[str, Any], family: FamilyFields) -> tuple[Layer, ...]:
    """DeepSeek-V4: a window, and beyond it keys compressed 4 to 1 with an index, or 128 to 1; residual streams that are
    mixed before and after each block."""
    layers, hidden = layer_count(config), positive(config, "hidden_size")
    width = positive(config, "head_dim", 512)
    heads, groups = positive(config, "num_attention_heads", 64), positive(config, "o_groups", 8, 65_536)
    turned = max(1, int(width * number(config, "partial_rotary_factor", 0.125, 0.0, 1.0)))
    if heads * width % groups or turned >= width:
        raise ConfigError(f"{heads:,} heads of {width:,} are no {groups:,} groups.", field="o_groups", remedy=REMEDY)
    mixer = CompressedAttention(
        num_heads=heads,
        query_rank=positive(config, "q_lora_rank", 1024),
        kv_rank=width - turned,
        nope_dim=width - turned,
        rope_dim=turned,
        value_dim=width,
        window=positive(config, "sliding_window", 128),
        groups=groups,
        output_rank=positive(config, "o_lora_rank", 1024),
    )
    streams = positive(config, "hc_mult", 4, 64)
    mixing = (2 + streams) * streams
    hyper = (
        Tensor("norms", "hyper", mixing, streams * hidden, 2),
        Tensor("norms", "hyper", 1, mixing + 3, 2),
    )
    made = {kind: _v4_compressed(config, kind, hidden, width) for kind in _V4_KINDS}
    with_bias = mixture_of(config, family)
    by_hash = dataclasses.replace(with_bias, correction=False)
    mlps = [by_hash if kind == "hash_moe" else with_bias for kind in _v4_mlps(config, layers)]
    return tuple(
        Layer(mixer, mlp, extra=(*hyper, *made[kind][0]), index_bytes=made[kind][1])
        for kind, mlp in zip(_v4_kinds(config, layers), mlps, strict=True)
    )


def _v4_kinds(config: Mapping[str, Any], layers: int) -> list[str]:
    kinds = names(config, "layer_types", _V4_KINDS, layers)
    ratios = config.get("compress_ratios")
    if kinds is None and isinstance(ratios, list | tuple):
        known = [_V4_RATES.get(ratio) if type(ratio) is int else None for ratio in ratios[:layers]]
        kinds = [kind for kind in known if kind is not None]
        if len(kinds) != layers:
            raise ConfigError(
                f"must be 0, 4 or 128 for each of {layers:,} layers.", field="compress_ratios", remedy=REMEDY
            )
    return kinds or [_V4_KINDS[1] if index > 1 and index % 2 else _V4_KINDS[2] for index in range(layers)]


def _v4_mlps(config: Mapping[str, Any], layers: int) -> list[str]:
    hashed = whole(config, "num_hash_layers", 3, MAX_LAYERS)
    kinds = names(config, "mlp_layer_types", ("hash_moe", "moe"), layers)
    return kinds or ["hash_moe" if index < hashed else "moe" for index in range(layers)]


def _v4_compressed(config: Mapping[str, Any], kind: str, hidden: int, width: int) -> tuple[tuple[Tensor, ...], int]:
    """(the compressor's tensors, bytes that a token adds to the compressed cache), in 16 bits."""
    stated = config.get("compress_rates")
    rates = stated if isinstance(stated, Mapping) else {}
    if kind == _V4_KINDS[0]:
        return (), 0
    if kind == _V4_KINDS[2]:
        rate = positive(rates, kind, positive(config, "compress_rate_hca", 128))
        return _v4_compressor(hidden, width, width, rate), -(-2 * width // rate)
    rate = positive(rates, kind, positive(config, "compress_rate_csa", 4))
    heads, index = positive(config, "index_n_heads", 64, 65_536), positive(config, "index_head_dim", 128)
    seen(config, "index_topk")
    tensors = (
        *_v4_compressor(hidden, 2 * width, width, rate),
        *_v4_compressor(hidden, 2 * index, index, rate),
        Tensor("attention", "index_query", heads * index, positive(config, "q_lora_rank", 1024), linear=True),
        Tensor("attention", "index_weights", heads, hidden),
    )
    return tensors, -(-(2 * width + index + 4 * -(-index // 128)) // rate)


def _v4_compressor(hidden: int, rows: int, width: int, rate: int) -> tuple[Tensor, ...]:
    return (
        Tensor("attention", "compress_values", rows, hidden, linear=True),
        Tensor("attention", "compress_gates", rows, hidden, linear=True),
        Tensor("attention", "compress_positions", rate, rows),
        Tensor("norms", "norm", 1, width),
    )


def read_extra(config: Mapping[str, Any], family: FamilyFields) -> tuple[Tensor, ...]:
    """Tensors besides embedding, layers and head: Gemma 4's of each layer, DeepSeek-V4's mixing of streams."""
    if family.layout == "deepseek_v4":
        streams = positive(config, "hc_mult", 4, 64)
        mixing = Tensor("norms", "hyper", streams, streams * positive(config, "hidden_size"))
        return (mixing, Tensor("norms", "hyper", 1, streams + 1))
    if family.layout != "gemma4":
        return ()
    width = whole(config, "hidden_size_per_layer_input", 256)
    vocab = positive(config, "vocab_size_per_layer_input", 262144)
    wide = layer_count(config) * width
    if not width:
        return ()
    return (
        Tensor("embedding", "per_layer_embedding", vocab, wide),
        Tensor("mlp", "per_layer_model_projection", wide, positive(config, "hidden_size"), linear=True),
        Tensor("norms", "norm", 1, width),
    )


def minimax_m3(config: Mapping[str, Any], family: FamilyFields) -> tuple[Layer, ...]:
    """MiniMax-M3: experts or a dense MLP of a width of its own; sparse layers pick blocks of keys by an index."""
    layers, hidden = layer_count(config), positive(config, "hidden_size")
    stated = config.get("sparse_attention_config")
    sparse = Stated(stated, path="sparse_attention_config.") if isinstance(stated, Mapping) else {}
    attention = attention_of(config, family)
    kinds = names(config, "layer_types", ("full_attention", "minimax_m3_sparse"), layers)
    frequencies = switches(sparse, "sparse_attention_freq", layers)
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


def _minimax_m3_mlps(config: Mapping[str, Any], family: FamilyFields, layers: int) -> list[AnyMLP]:
    kinds = names(config, "mlp_layer_types", ("dense", "sparse"), layers)
    frequencies = switches(config, "moe_layer_freq", layers)
    sparse = [kind == "sparse" for kind in kinds] if kinds else frequencies or [True] * layers
    dense = DenseMLP(positive(config, "dense_intermediate_size", 12288))
    mixture = mixture_of(config, family) if any(sparse) else dense
    return [mixture if is_sparse else dense for is_sparse in sparse]


def step(config: Mapping[str, Any], family: FamilyFields) -> tuple[Layer, ...]:
    """Step-3.5 and 3.7: a gate a head, sliding layers with more query heads, experts next to a shared one."""
    layers, hidden = layer_count(config), positive(config, "hidden_size")
    kinds = _padded_names(config, "layer_types", ATTENTION_KINDS, layers) or ["full_attention"] * layers
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


def _step_mlps(config: Mapping[str, Any], family: FamilyFields, layers: int) -> list[AnyMLP]:
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
    if peek(config, "num_local_experts") is not None:
        seen(config, "num_local_experts", "moe_num_experts", "moe_top_k")
    shared = positive(config, "share_expert_dim", positive(config, "share_expert_dims", 1280))
    mixture = MixtureOfExperts(
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


def blocks(config: Mapping[str, Any], family: FamilyFields) -> tuple[Layer, ...]:
    """Nemotron-NAS (DeciLM): each layer states its own attention and MLP, or that it has none (arXiv:2411.19146)."""
    stated = config.get("block_configs")
    if not isinstance(stated, list) or not 0 < len(stated) <= MAX_LAYERS:
        raise ConfigError("must be a list with one object for each layer.", field="block_configs", remedy=REMEDY)
    if layer_count(config) != len(stated):
        raise ConfigError(
            f"names {len(stated):,} layers, but num_hidden_layers is {layer_count(config):,}.",
            field="block_configs",
            remedy=REMEDY,
        )
    hidden, heads = positive(config, "hidden_size"), positive(config, "num_attention_heads")
    width = head_dim(config, family, hidden, heads)
    return tuple(_block(config, family, block, heads, width) for block in stated)


def _block(config: Mapping[str, Any], family: FamilyFields, block: object, heads: int, width: int) -> Layer:
    hidden = positive(config, "hidden_size")
    attention, ffn = (block.get(name) if isinstance(block, Mapping) else None for name in ("attention", "ffn"))
    if not isinstance(attention, Mapping) or not isinstance(ffn, Mapping):
        raise ConfigError("each layer must state attention and ffn.", field="block_configs", remedy=REMEDY)
    mixer: AnyMixer = NoMixer()
    extra: list[Tensor] = []
    if flag(attention, "replace_with_linear", False):
        extra.append(Tensor("attention", "attention_linear", hidden, hidden, linear=True))
    elif not flag(attention, "no_op", False):
        group = positive(attention, "n_heads_in_group", maximum=heads)
        if heads % group:
            raise ConfigError(f"{heads:,} heads are no groups of {group:,}.", field="n_heads_in_group", remedy=REMEDY)
        qkv, output = attention_biases(config, family)
        mixer = Attention(heads, heads // group, width, qkv_bias=qkv, output_bias=output)
    mlp = DenseMLP(0)
    if flag(ffn, "replace_with_linear", False):
        extra.append(Tensor("mlp", "mlp_linear", hidden, hidden, linear=True))
    elif not flag(ffn, "no_op", False):
        share = number(ffn, "ffn_mult", 0.0, 0.0, 1000.0)
        inner = int(2 * share * hidden / 3)
        stated = config.get("intermediate_size") if not inner else None
        rows = positive(config, "intermediate_size") if stated else -(-inner // 256) * 256
        mlp = DenseMLP(rows, bias=mlp_bias(config, family))
    seen(config, "intermediate_size", "mlp_bias", "attention_bias")
    norms = sum(not flag(part, "no_op", False) for part in (attention, ffn))
    return Layer(mixer, mlp, norms, extra=tuple(extra))
