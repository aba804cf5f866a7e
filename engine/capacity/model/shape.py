"""A model's shape entered by hand, for architectures that the planner does not read a ``config.json`` of."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from engine.capacity.formats import ComputeDtype, compute_dtype
from engine.capacity.model.fields import MAX_EXPERTS, MAX_LAYERS
from engine.capacity.model.layers import AnyMLP, DenseMLP, Layer, MixtureOfExperts
from engine.capacity.model.mixers import AnyMixer, Attention, LatentAttention
from engine.capacity.model.parameters import parameter_count
from engine.capacity.model.spec import ModelSpec
from engine.capacity.text import shown
from engine.errors import ConfigError

_WIDEST = 2**20
_MOST_PARAMETERS = 10**15
_LONGEST_CONTEXT = 2**31
#: Widths that are derived from a number of parameters are multiples of this, so that GPUs can share them.
_WIDTH_STEP = 64


@dataclasses.dataclass(frozen=True, slots=True)
class ShapeField:
    """One field of a shape: a whole number, or a switch.

    Attributes:
        name: as the command line and documents spell it.
        label, help: for display.
        low, high: bounds of a number; equal for a switch.
        default: None if it must be given, or follows from others.
        group: heading under which it stands.
    """

    name: str
    label: str
    help: str
    low: int = 0
    high: int = 0
    default: int | bool | None = None
    group: str = "Layers"

    @property
    def is_switch(self) -> bool:
        """True if it is on or off."""
        return isinstance(self.default, bool)


SHAPE_FIELDS: tuple[ShapeField, ...] = (
    ShapeField("layers", "Layers", "Decoder layers.", 1, MAX_LAYERS, 32),
    ShapeField("hidden", "Hidden size", "Width of the residual stream.", 1, _WIDEST, 4096),
    ShapeField("intermediate", "MLP width", "Of a dense layer; empty: from the number of parameters.", 1, _WIDEST),
    ShapeField("vocab", "Vocabulary", "Rows of the embedding.", 1, 2**24, 128256),
    ShapeField("context", "Context (tokens)", "The longest the model was made for.", 1, _LONGEST_CONTEXT, 131072),
    ShapeField("parameters", "Parameters", "In all; the MLP's width follows where it is empty.", 1, _MOST_PARAMETERS),
    ShapeField("tied", "Tied embeddings", "The head is the embedding: one copy.", default=False),
    ShapeField("gated", "Gated MLP", "Three matrices (SwiGLU), not two.", default=True),
    ShapeField("heads", "Query heads", "Attention heads.", 1, 65536, 32, "Attention"),
    ShapeField("kv_heads", "Key/value heads", "Empty: as many as query heads.", 1, 65536, None, "Attention"),
    ShapeField("head_dim", "Head width", "Empty: hidden size / query heads.", 1, 65536, None, "Attention"),
    ShapeField("window", "Sliding window", "Tokens that sliding layers see; 0: none slide.", 0, 2**31, 0, "Attention"),
    ShapeField(
        "full_every",
        "Full every n-th layer",
        "Every n-th layer attends to all; 0: all slide.",
        0,
        MAX_LAYERS,
        0,
        "Attention",
    ),
    ShapeField(
        "bias", "Biases of query, key and value", "These projections have one.", default=False, group="Attention"
    ),
    ShapeField("qk_norm", "Norms of query and key", "A weight a head dimension.", default=False, group="Attention"),
    ShapeField("experts", "Experts", "Routed ones of a layer; 0: a dense model.", 0, MAX_EXPERTS, 0, "Experts"),
    ShapeField("experts_per_token", "Experts a token", "Chosen by the router.", 1, MAX_EXPERTS, 8, "Experts"),
    ShapeField("expert_intermediate", "Width of an expert", "Empty: as the MLP.", 1, _WIDEST, None, "Experts"),
    ShapeField("shared_experts", "Shared experts", "That all tokens use.", 0, 1024, 0, "Experts"),
    ShapeField("dense_layers", "Dense layers first", "Without experts.", 0, MAX_LAYERS, 0, "Experts"),
    ShapeField("kv_rank", "Latent width (MLA)", "Of the cached latent; 0: plain attention.", 0, _WIDEST, 0, "Latent"),
    ShapeField("q_rank", "Query rank", "Of the compressed query; 0: not compressed.", 0, _WIDEST, 0, "Latent"),
    ShapeField("nope_dim", "Unrotated width", "Of query and key.", 1, 65536, 128, "Latent"),
    ShapeField("rope_dim", "Rotary width", "Of the key that all heads share.", 1, 65536, 64, "Latent"),
    ShapeField("value_dim", "Value width", "Of a head.", 1, 65536, 128, "Latent"),
)
_BY_NAME = {field.name: field for field in SHAPE_FIELDS}


def spec_of_shape(stated: Mapping[str, Any], name: str = "model entered by hand") -> ModelSpec:
    """The spec of a shape.

    Args:
        stated: values by the names of :data:`SHAPE_FIELDS`; ``dtype`` (bfloat16 by default) may stand among them.
        name: for display.

    >>> spec = spec_of_shape({"layers": 32, "hidden": 4096, "heads": 32, "kv_heads": 8, "intermediate": 14336,
    ...                       "vocab": 128256})
    >>> parameter_count(spec).total  # Llama-3.1-8B
    8030261248

    Raises:
        ConfigError: naming the field at fault and what would work.
    """
    if not isinstance(stated, Mapping):
        raise ConfigError("is not an object of fields.", field="shape", remedy=_remedy())
    values = {field.name: _value(stated, field) for field in SHAPE_FIELDS}
    unknown = [key for key in stated if key not in _BY_NAME and key not in ("dtype", "name")]
    if unknown:
        raise ConfigError(f"{shown(unknown[0])} is no field of a shape.", field="shape", remedy=_remedy())
    if values["intermediate"] is None and values["parameters"] is None and not _all_sparse(values):
        raise ConfigError(
            "neither the MLP's width nor the number of parameters is given.",
            field="intermediate",
            remedy="Give one of the two.",
        )
    dtype = compute_dtype(stated.get("dtype") or "bfloat16")
    own = stated.get("name")
    return _sized(values, dtype, own if isinstance(own, str) and own else name)


def _remedy() -> str:
    return f"The fields are {', '.join((*_BY_NAME, 'dtype', 'name'))}."


def _value(stated: Mapping[str, Any], field: ShapeField) -> Any:
    value = stated.get(field.name)
    if value is None:
        return field.default
    if field.is_switch:
        if not isinstance(value, bool):
            raise ConfigError(f"{shown(value)} is neither true nor false.", field=field.name, remedy=field.help)
        return value
    if isinstance(value, bool) or not isinstance(value, int) or not field.low <= value <= field.high:
        raise ConfigError(
            f"{shown(value)} is not possible.",
            field=field.name,
            remedy=f"Give a whole number from {field.low:,} to {field.high:,}. {field.help}",
        )
    return value


def _all_sparse(values: Mapping[str, Any]) -> bool:
    return bool(values["experts"] and not values["dense_layers"] and values["expert_intermediate"])


def _sized(values: dict[str, Any], dtype: ComputeDtype, name: str) -> ModelSpec:
    """The spec; a width that is not given follows from the number of parameters."""
    wanted, width = values["parameters"], values["intermediate"]
    if width is not None or _all_sparse(values):
        spec = _spec(values, dtype, name)
        count = parameter_count(spec).total
        if wanted is None or abs(count / wanted - 1.0) < 0.01:
            return spec
        note = f"The shape has {count:,} parameters, not the {wanted:,} given: the shape is what is planned."
        return dataclasses.replace(spec, notes=(note,))
    one, two = (
        parameter_count(_spec({**values, "intermediate": size}, dtype, name)).total
        for size in (_WIDTH_STEP, 2 * _WIDTH_STEP)
    )
    steps = round((wanted - one) / (two - one)) + 1
    if not 1 <= steps <= _WIDEST // _WIDTH_STEP:
        raise ConfigError(
            f"{wanted:,} parameters do not go with the other fields: without any MLP there are {2 * one - two:,}.",
            field="parameters",
            remedy="Correct the number, or the fields.",
        )
    spec = _spec({**values, "intermediate": steps * _WIDTH_STEP}, dtype, name)
    note = (
        f"The MLP's width of {steps * _WIDTH_STEP:,} follows from the number of parameters: {wanted:,} given, "
        f"{parameter_count(spec).total:,} planned."
    )
    return dataclasses.replace(spec, notes=(note,))


def _spec(values: Mapping[str, Any], dtype: ComputeDtype, name: str) -> ModelSpec:
    layers, kinds, pattern = values["layers"], [], []
    mixers, mlps = _mixers(values), _mlps(values)
    for index in range(layers):
        layer = Layer(mixers[index], mlps[index])
        if layer not in kinds:
            kinds.append(layer)
        pattern.append(kinds.index(layer))
    return ModelSpec(
        name=name,
        architecture="entered by hand",
        model_type="shape",
        hidden_size=values["hidden"],
        vocab_size=values["vocab"],
        kinds=tuple(kinds),
        pattern=tuple(pattern),
        tie_word_embeddings=values["tied"],
        head_bias=False,
        norm_bias=False,
        max_position=values["context"],
        torch_dtype=dtype.name,
    )


def _mixers(values: Mapping[str, Any]) -> list[AnyMixer]:
    layers, heads = values["layers"], values["heads"]
    if values["kv_rank"]:
        latent = LatentAttention(
            num_heads=heads,
            query_rank=values["q_rank"] or None,
            kv_rank=values["kv_rank"],
            nope_dim=values["nope_dim"],
            rope_dim=values["rope_dim"],
            value_dim=values["value_dim"],
        )
        return [latent] * layers
    kv_heads = values["kv_heads"] or heads
    if heads % kv_heads:
        raise ConfigError(
            f"{kv_heads:,} key/value heads cannot be shared evenly by {heads:,} query heads.",
            field="kv_heads",
            remedy=f"Give a number that divides {heads:,}.",
        )
    width = values["head_dim"]
    if width is None and values["hidden"] % heads:
        raise ConfigError(
            f"hidden = {values['hidden']:,} is not a multiple of heads = {heads:,}.",
            field="head_dim",
            remedy="Give the head's width.",
        )
    norm = "head" if values["qk_norm"] else ""
    full = Attention(heads, kv_heads, width or values["hidden"] // heads, qkv_bias=values["bias"], qk_norm=norm)
    if not values["window"]:
        return [full] * layers
    slides, every = dataclasses.replace(full, window=values["window"]), values["full_every"]
    return [full if every and (index + 1) % every == 0 else slides for index in range(layers)]


def _mlps(values: Mapping[str, Any]) -> list[AnyMLP]:
    width, layers = values["intermediate"], values["layers"]
    if not values["experts"]:
        return [DenseMLP(width, values["gated"])] * layers
    if values["experts_per_token"] > values["experts"]:
        raise ConfigError(
            f"{values['experts_per_token']:,} experts a token are more than the {values['experts']:,} there are.",
            field="experts_per_token",
            remedy=f"Give at most {values['experts']:,}.",
        )
    expert = values["expert_intermediate"] or width
    mixture = MixtureOfExperts(
        num_experts=values["experts"],
        top_k=values["experts_per_token"],
        width=expert,
        shared_width=values["shared_experts"] * expert,
        gated=values["gated"],
    )
    dense = min(values["dense_layers"], layers)
    return [*([DenseMLP(width or expert, values["gated"])] * dense), *([mixture] * (layers - dense))]
