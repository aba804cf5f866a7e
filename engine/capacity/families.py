"""What the fields of a ``config.json`` mean in each model family that the planner knows: one row each.

Only what changes parameter counts or memory is here. Where a ``config.json`` is silent, the defaults are those of the
family's configuration class in transformers, because that is what every engine that reads the file assumes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from engine.capacity.words import shown
from engine.errors import ConfigError


@dataclasses.dataclass(frozen=True, slots=True)
class Family:
    """One row.

    Attributes:
        model_type: value of ``model_type`` in a ``config.json``.
        architecture: value in ``architectures``.
        num_kv_heads: default of ``num_key_value_heads``; None: as many as query heads.
        head_dim: default of ``head_dim``; None: hidden size / heads.
        tied: default of ``tie_word_embeddings``.
        biases: "config" if ``attention_bias`` (query, key, value and output) and ``mlp_bias`` apply, "attention" if
            only the former does, "qkv" if query, key and value always have one, "none".
        qk_norm: queries and keys are normalized per head (a weight of head_dim each).
        sliding: "none", "always" (``sliding_window`` unless null), "switch" (only where ``use_sliding_window``, from
            layer ``max_window_layers`` on) or "pattern" (all but every ``sliding_window_pattern``-th layer).
        max_position: default of ``max_position_embeddings``, tokens.
        window: default of ``sliding_window`` where it applies; None: all positions.
        norms: norms of the hidden width in a layer.
        experts: fields that state a mixture's experts and their width, or None.
    """

    model_type: str
    architecture: str
    num_kv_heads: int | None = None
    head_dim: int | None = None
    tied: bool = False
    biases: str = "none"
    qk_norm: bool = False
    sliding: str = "none"
    window: int | None = 4096
    max_position: int = 32768
    norms: int = 2
    experts: tuple[tuple[str, ...], str] | None = None


FAMILIES: tuple[Family, ...] = (
    Family("llama", "LlamaForCausalLM", biases="config", max_position=2048),
    Family("mistral", "MistralForCausalLM", num_kv_heads=8, sliding="always", max_position=131072),
    Family("qwen2", "Qwen2ForCausalLM", num_kv_heads=32, biases="qkv", sliding="switch"),
    Family(
        "qwen3",
        "Qwen3ForCausalLM",
        num_kv_heads=32,
        head_dim=128,
        biases="attention",
        qk_norm=True,
        sliding="switch",
    ),
    Family(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        num_kv_heads=4,
        biases="attention",
        qk_norm=True,
        sliding="switch",
        experts=(("num_local_experts", "num_experts"), "moe_intermediate_size"),
    ),
    Family(
        "mixtral",
        "MixtralForCausalLM",
        num_kv_heads=8,
        sliding="always",
        window=None,
        max_position=131072,
        experts=(("num_local_experts",), "intermediate_size"),
    ),
    Family(
        "gemma3_text",
        "Gemma3ForCausalLM",
        num_kv_heads=4,
        head_dim=256,
        tied=True,
        biases="attention",
        qk_norm=True,
        sliding="pattern",
        max_position=131072,
        norms=4,
    ),
    Family("phi3", "Phi3ForCausalLM", sliding="always", window=None, max_position=4096),
)


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a parsed ``config.json``, by ``architectures``, else by ``model_type``.

    Raises:
        ConfigError: naming the architecture and what is supported.
    """
    architectures = config.get("architectures")
    if architectures is not None and not (
        isinstance(architectures, list | tuple) and all(isinstance(name, str) for name in architectures)
    ):
        raise ConfigError(
            f"{shown(architectures)} is not a list of names.",
            field="architectures",
            remedy='Write e.g. ["LlamaForCausalLM"].',
        )
    model_type = config.get("model_type")
    for family in FAMILIES:
        if family.architecture in (architectures or ()) or (not architectures and model_type == family.model_type):
            return family
    named = ", ".join(architectures or ()) or (shown(model_type) if model_type is not None else None)
    supported = f"Supported are {', '.join(family.architecture for family in FAMILIES)}."
    if named is None:
        raise ConfigError(
            "neither architectures nor model_type says what kind of model this is.",
            field="architectures",
            remedy=f"Use the config.json of the model's own repository. {supported}",
        )
    raise ConfigError(f"the planner does not know {named} yet.", field="architectures", remedy=supported)
