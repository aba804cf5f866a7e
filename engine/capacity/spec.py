"""What the planner must know of a model: its shape, read from a Hugging Face ``config.json`` and checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from engine.capacity.families import Family, family_of
from engine.capacity.words import shown
from engine.errors import ConfigError

#: Largest value a dimension may have: far above any model, low enough that arithmetic and messages stay sane.
MAX_DIMENSION = 2**31
MAX_LAYERS = 4096

_REMEDY = "Correct this field, or use the config.json of the model's own repository."


@dataclasses.dataclass(frozen=True, slots=True)
class ModelSpec:
    """The shape of a decoder-only transformer. Sizes are numbers of elements, lengths are tokens.

    >>> spec = ModelSpec.from_hf_config({
    ...     "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "num_hidden_layers": 32,
    ...     "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256,
    ...     "max_position_embeddings": 131072})
    >>> spec.head_dim, spec.group_queries  # Llama 3 herd, table 3: 32 heads share 8 key/value heads
    (128, 4)

    Attributes:
        name: for display.
        architecture: e.g. ``"LlamaForCausalLM"``.
        model_type: e.g. ``"llama"``.
        num_layers, hidden_size, num_heads, num_kv_heads, head_dim, intermediate_size, vocab_size: dimensions;
            ``head_dim`` need not be hidden_size / num_heads.
        tie_word_embeddings: the head is the embedding, one copy.
        max_position: the model's own context length.
        layer_windows: per layer, how many positions a query sees, itself included; None for all.
        attention_bias: query, key and value projections have biases.
        attention_output_bias: the attention's output projection has one.
        mlp_bias: the MLP's projections have them.
        qk_norm: queries and keys are normalized per head.
        torch_dtype: number format of the checkpoint: "bfloat16", "float16" or "float32".
        norms_per_layer: norms of the hidden width in each layer.
        num_experts, expert_size: experts of a mixture layer and the width of one; 0 in a dense model.
        num_mixture_layers: how many layers are mixtures.
    """

    name: str
    architecture: str
    model_type: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    tie_word_embeddings: bool
    max_position: int
    layer_windows: tuple[int | None, ...]
    attention_bias: bool
    attention_output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    torch_dtype: str
    norms_per_layer: int = 2
    num_experts: int = 0
    expert_size: int = 0
    num_mixture_layers: int = 0

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any], name: str | None = None) -> ModelSpec:
        """The spec of a parsed ``config.json``.

        Args:
            config: the parsed file; fields that do not change sizes are ignored.
            name: for display; by default ``_name_or_path`` or the architecture.

        Raises:
            ConfigError: naming the field that is missing, malformed or contradicts another, or the architecture that
                is not supported.
        """
        if not isinstance(config, Mapping):
            raise ConfigError("is not a JSON object.", field="config.json", remedy=_REMEDY)
        family = family_of(config)
        layers = _positive(config, "num_hidden_layers", maximum=MAX_LAYERS)
        hidden = _positive(config, "hidden_size")
        heads = _positive(config, "num_attention_heads")
        kv_heads = _kv_heads(config, family, heads)
        attention_bias = family.biases == "qkv" or _declared_bias(config, "attention_bias", family)
        return cls(
            name=_name(config, name, family),
            architecture=family.architecture,
            model_type=family.model_type,
            num_layers=layers,
            hidden_size=hidden,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=_head_dim(config, family, hidden, heads),
            intermediate_size=_positive(config, "intermediate_size"),
            vocab_size=_positive(config, "vocab_size"),
            tie_word_embeddings=_flag(config, "tie_word_embeddings", family.tied),
            max_position=_positive(config, "max_position_embeddings", family.max_position),
            layer_windows=_layer_windows(config, family, layers),
            attention_bias=attention_bias,
            attention_output_bias=attention_bias and family.biases != "qkv",
            mlp_bias=family.biases == "config" and _flag(config, "mlp_bias", False),
            qk_norm=family.qk_norm,
            torch_dtype=_dtype(config),
            norms_per_layer=family.norms,
            **_mixture(config, family, layers),
        )

    @property
    def sliding_window(self) -> int | None:
        """The window of the layers that slide, or None if no layer does. Tokens."""
        return next((window for window in self.layer_windows if window is not None), None)

    @property
    def num_sliding_layers(self) -> int:
        """How many layers attend to a window only."""
        return sum(window is not None for window in self.layer_windows)

    @property
    def group_queries(self) -> int:
        """How many query heads share one key/value head; 1 is multi-head attention."""
        return self.num_heads // self.num_kv_heads

    @property
    def query_size(self) -> int:
        """Width of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key heads together, which is that of all value heads."""
        return self.num_kv_heads * self.head_dim


def _name(config: Mapping[str, Any], name: str | None, family: Family) -> str:
    stated = name or config.get("_name_or_path")
    return stated if isinstance(stated, str) and stated else family.architecture


def _kv_heads(config: Mapping[str, Any], family: Family, heads: int) -> int:
    # An explicit null means multi-head attention; an absent field means the family's default.
    absent = "num_key_value_heads" not in config
    kv_heads = _positive(config, "num_key_value_heads", (family.num_kv_heads or heads) if absent else heads)
    if heads % kv_heads:
        source = " (this family's default, as the field is absent)" if absent else ""
        raise ConfigError(
            f"{kv_heads:,} key/value heads{source} cannot be shared evenly by num_attention_heads = {heads:,}.",
            field="num_key_value_heads",
            remedy=f"It must divide {heads:,}. {_REMEDY}",
        )
    return kv_heads


def _head_dim(config: Mapping[str, Any], family: Family, hidden: int, heads: int) -> int:
    if config.get("head_dim") is not None:
        return _positive(config, "head_dim")
    if family.head_dim is not None:
        return family.head_dim
    if hidden % heads:
        raise ConfigError(
            f"hidden_size {hidden:,} is not a multiple of num_attention_heads {heads:,}, and head_dim is not given.",
            field="head_dim",
            remedy=_REMEDY,
        )
    return hidden // heads


def _declared_bias(config: Mapping[str, Any], field: str, family: Family) -> bool:
    return family.biases in ("config", "attention") and _flag(config, field, False)


def _layer_windows(config: Mapping[str, Any], family: Family, layers: int) -> tuple[int | None, ...]:
    """Per layer; ``layer_types`` says it where the file has it."""
    window = _window(config, family)
    if window is None:
        return (None,) * layers
    kinds = config.get("layer_types")
    if kinds is not None:
        known = {"sliding_attention": window, "full_attention": None}
        readable = isinstance(kinds, list | tuple) and all(isinstance(kind, str) and kind in known for kind in kinds)
        if not readable or len(kinds) != layers:
            raise ConfigError(
                f"must name sliding_attention or full_attention for each of {layers:,} layers.",
                field="layer_types",
                remedy=_REMEDY,
            )
        return tuple(known[kind] for kind in kinds)
    full = _whole(config, "max_window_layers", 28) if family.sliding == "switch" else 0
    pattern = _positive(config, "sliding_window_pattern", 6) if family.sliding == "pattern" else layers + 1
    return tuple(window if index >= full and (index + 1) % pattern else None for index in range(layers))


def _mixture(config: Mapping[str, Any], family: Family, layers: int) -> dict[str, int]:
    if family.experts is None:
        return {}
    counts, width = family.experts
    name = next((name for name in counts if config.get(name) is not None), counts[-1])
    step, dense = _positive(config, "decoder_sparse_step", 1), config.get("mlp_only_layers") or ()
    return {
        "num_experts": _positive(config, name),
        "expert_size": _positive(config, width),
        "num_mixture_layers": sum((index + 1) % step == 0 and index not in dense for index in range(layers)),
    }


def _window(config: Mapping[str, Any], family: Family) -> int | None:
    if family.sliding == "none":
        return None
    if family.sliding == "switch" and not _flag(config, "use_sliding_window", False):
        return None
    if "sliding_window" in config and config["sliding_window"] is None:
        return None
    if family.window is None and config.get("sliding_window") is None:
        return None
    return _positive(config, "sliding_window", family.window)


def _dtype(config: Mapping[str, Any]) -> str:
    stated = config.get("torch_dtype", config.get("dtype"))
    if stated is None:
        return "bfloat16"
    text = stated.removeprefix("torch.") if isinstance(stated, str) else ""
    if text not in ("bfloat16", "float16", "float32"):
        raise ConfigError(
            f"{shown(stated)} is not a number format of weights.",
            field="torch_dtype",
            remedy="Use bfloat16, float16 or float32.",
        )
    return text


def _positive(config: Mapping[str, Any], field: str, default: int | None = None, maximum: int = MAX_DIMENSION) -> int:
    value = _whole(config, field, default, maximum)
    if value == 0:
        raise ConfigError("0 is not a positive whole number.", field=field, remedy=_REMEDY)
    return value


def _whole(config: Mapping[str, Any], field: str, default: int | None = None, maximum: int = MAX_DIMENSION) -> int:
    value = config.get(field)
    value = default if value is None else value
    if value is None:
        raise ConfigError("is missing.", field=field, remedy=_REMEDY)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ConfigError(f"{shown(value)} is not a positive whole number.", field=field, remedy=_REMEDY)
    if value > maximum:
        raise ConfigError(f"{shown(value)} is above {maximum:,}, beyond any real model.", field=field, remedy=_REMEDY)
    return value


def _flag(config: Mapping[str, Any], field: str, default: bool) -> bool:
    value = config.get(field)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ConfigError(f"{shown(value)} is neither true nor false.", field=field, remedy=_REMEDY)
    return value
