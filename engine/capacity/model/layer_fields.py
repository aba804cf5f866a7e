"""What the fields of most families mean for a layer: attention, MLPs, windows, and which layers have which."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.capacity.model.families import FamilyFields
from engine.capacity.model.fields import MAX_EXPERTS, MAX_LAYERS, REMEDY, flag, indices, names, positive, whole
from engine.capacity.model.layers import AnyMLP, DenseMLP, MixtureOfExperts
from engine.capacity.model.mixers import Attention
from engine.capacity.model.stated import Stated
from engine.errors import ConfigError

ATTENTION_KINDS = ("sliding_attention", "full_attention")


def seen(config: Mapping[str, Any], *fields: str) -> None:
    """Count fields as read that do not apply to this file, because another one switches them off."""
    for field in fields:
        config.get(field)


def attention_of(config: Mapping[str, Any], family: FamilyFields) -> Attention:
    """The family's attention, without a window."""
    hidden, heads = positive(config, "hidden_size"), positive(config, "num_attention_heads")
    qkv, output = attention_biases(config, family)
    norm = family.qk_norm
    if norm in ("config", "config_full"):
        norm = norm.replace("config", "head").removeprefix("head_") if flag(config, "use_qk_norm", False) else ""
    return Attention(
        num_heads=heads,
        num_kv_heads=kv_heads_of(config, family, heads),
        head_dim=head_dim(config, family, hidden, heads),
        qkv_bias=qkv,
        output_bias=output,
        qk_norm=norm,
        sinks=family.sinks,
    )


def head_dim(config: Mapping[str, Any], family: FamilyFields, hidden: int, heads: int) -> int:
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


def kv_heads_of(config: Mapping[str, Any], family: FamilyFields, heads: int) -> int:
    """Key/value heads: stated, or the family's."""
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


def attention_biases(config: Mapping[str, Any], family: FamilyFields) -> tuple[bool, bool]:
    """(query/key/value, output)."""
    if family.biases in ("config", "attention", "config_qkv"):
        stated = flag(config, "attention_bias", False)
        return stated, stated and family.biases != "config_qkv"
    if family.biases == "use_bias":
        return (flag(config, "use_bias", True),) * 2
    if family.biases == "config_out":
        return flag(config, "attention_bias", False), flag(config, "attention_out_bias", False)
    if family.biases == "qkv_bias":
        return flag(config, "qkv_bias", True), False
    return family.biases in ("qkv", "all"), family.biases == "all"


def mlp_bias(config: Mapping[str, Any], family: FamilyFields) -> bool:
    """The projections of an MLP have a bias."""
    if family.biases == "use_bias":
        return flag(config, "use_bias", True)
    return family.biases == "all" or (family.biases in ("config", "config_out") and flag(config, "mlp_bias", False))


def dense_mlp(config: Mapping[str, Any], family: FamilyFields) -> DenseMLP:
    """The MLP of a dense layer."""
    return DenseMLP(positive(config, "intermediate_size"), family.gated, mlp_bias(config, family))


def mixture_of(config: Mapping[str, Any], family: FamilyFields) -> MixtureOfExperts:
    """The experts of a sparse layer."""
    stated = family.experts
    assert stated is not None, family
    # transformers 5 writes num_local_experts where published files of the same family say num_experts.
    renamed = config.get(stated.count) is None and config.get("num_local_experts") is not None
    count = positive(config, "num_local_experts" if renamed else stated.count, maximum=MAX_EXPERTS)
    for other in ("num_local_experts", "num_experts", "n_routed_experts"):
        if peek(config, other) == count:
            seen(config, other)
    top_k = positive(config, stated.top_k, maximum=MAX_EXPERTS)
    if top_k > count:
        raise ConfigError(
            f"{top_k:,} experts a token are more than the {count:,} there are.", field=stated.top_k, remedy=REMEDY
        )
    width = positive(config, stated.width)
    shared = whole(config, stated.shared_width, 0) if stated.shared_width else 0
    if stated.shared_count:
        shared = width * whole(config, stated.shared_count, 0, MAX_EXPERTS)
    return MixtureOfExperts(
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


def mlps_of(config: Mapping[str, Any], family: FamilyFields, layers: int) -> list[AnyMLP]:
    """The MLP of every layer."""
    seen(config, "intermediate_size")  # of a mixture's dense layers, if it has any
    if family.experts is None:
        return [dense_mlp(config, family)] * layers
    kinds = names(config, "mlp_layer_types", ("dense", "sparse"), layers)
    if kinds is None:
        sparse = [is_sparse(config, family.experts.placement, index) for index in range(layers)]
    else:
        seen(config, "first_k_dense_replace", "moe_layer_freq", "decoder_sparse_step", "mlp_only_layers")
        sparse = [kind == "sparse" for kind in kinds]
    mixture = mixture_of(config, family) if any(sparse) else None
    dense = None if all(sparse) else dense_mlp(config, family)
    chosen = [mixture if is_sparse else dense for is_sparse in sparse]
    return [mlp for mlp in chosen if mlp is not None]


def is_sparse(config: Mapping[str, Any], placement: str, index: int) -> bool:
    """True if that layer is a mixture, by the placement of the family."""
    if placement == "step":
        step = positive(config, "decoder_sparse_step", 1, MAX_LAYERS)
        return index not in indices(config, "mlp_only_layers") and (index + 1) % step == 0
    if placement == "first_dense":
        every = positive(config, "moe_layer_freq", 1, MAX_LAYERS)
        return index >= whole(config, "first_k_dense_replace", 0, MAX_LAYERS) and index % every == 0
    return True


def windows_of(config: Mapping[str, Any], family: FamilyFields, layers: int) -> list[int | None]:
    """Per layer; ``layer_types`` says it where the file has it."""
    window = window_of(config, family)
    if window is None:
        if family.sliding != "none" or set(peeked_list(config, "layer_types")) <= {"full_attention"}:
            seen(config, "layer_types")
        return [None] * layers
    kinds = names(config, "layer_types", ATTENTION_KINDS, layers)
    if kinds is not None:
        return [window if kind == "sliding_attention" else None for kind in kinds]
    if family.sliding == "even":
        return [window if index % 2 == 0 else None for index in range(layers)]
    if family.sliding == "pattern":
        every = positive(config, "sliding_window_pattern", 6, MAX_LAYERS)
        return [None if (index + 1) % every == 0 else window for index in range(layers)]
    full = whole(config, "max_window_layers", 28) if family.sliding == "switch" else 0
    return [None if index < full else window for index in range(layers)]


def peek(config: Mapping[str, Any], field: str) -> Any:
    """A field's value, without counting it as read."""
    return config.peek(field) if isinstance(config, Stated) else config.get(field)


def peeked_list(config: Mapping[str, Any], field: str) -> list[str]:
    """The texts of a list, likewise."""
    value = peek(config, field)
    return [str(item)[:40] for item in value[:MAX_LAYERS]] if isinstance(value, list | tuple) else []


def window_of(config: Mapping[str, Any], family: FamilyFields) -> int | None:
    """The window of the layers that slide; None where none does."""
    if family.sliding == "none":
        return None
    seen(config, "sliding_window", "max_window_layers", "sliding_window_pattern")
    if family.sliding == "switch" and not flag(config, "use_sliding_window", False):
        return None
    if "sliding_window" in config and config["sliding_window"] is None:
        return None
    if family.window is None and "sliding_window" not in config:
        return None
    return positive(config, "sliding_window", family.window)


def layer_count(config: Mapping[str, Any]) -> int:
    """How many layers there are."""
    return positive(config, "num_hidden_layers", maximum=MAX_LAYERS)


def switches(config: Mapping[str, Any], field: str, layers: int) -> list[bool] | None:
    """A list of 0 and 1 for each layer; None where the field is absent or no list."""
    value = config.get(field)
    if not isinstance(value, list | tuple):
        return None
    if len(value) != layers or not all(item in (0, 1) for item in value if not isinstance(item, list | dict)):
        raise ConfigError(f"must be 0 or 1 for each of {layers:,} layers.", field=field, remedy=REMEDY)
    return [bool(item) for item in value]
