"""The model families that our decoder runs: one row each.

A row says which configurations belong to a family, what their fields mean, what holds where they are silent, and how
a checkpoint names the parts of a layer. Everything else is derived: the decoder builds each block from what the layout
names (a norm that is not named is not there), so a new family of known parts is one new row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from engine.errors import ModelLoadError

Biases = Literal["none", "config", "attention", "qkv"]


@dataclasses.dataclass(frozen=True, slots=True)
class LayerLayout:
    """Names of a layer's tensors below ``model.layers.N.``, as published checkpoints have them.

    The block is x + output_norm(attention(norm(x))), then the same with the MLP; a norm without a name is left out.

    Attributes:
        input_norm, attention_output_norm, mlp_norm, mlp_output_norm: the four places of a norm.
        query_norm, key_norm: norm of each query and key head before the rotation.
        qkv, output, gate_up, down: linear layers; several names are stacked by rows.
        router: of a mixture layer.
        expert_gate_up, expert_down: of expert ``{expert}`` of a mixture layer.
    """

    input_norm: str | None = "input_layernorm"
    attention_output_norm: str | None = None
    mlp_norm: str | None = "post_attention_layernorm"
    mlp_output_norm: str | None = None
    query_norm: str | None = None
    key_norm: str | None = None
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    output: str = "self_attn.o_proj"
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    router: str = "mlp.gate"
    expert_gate_up: tuple[str, ...] = ("mlp.experts.{expert}.gate_proj", "mlp.experts.{expert}.up_proj")
    expert_down: str = "mlp.experts.{expert}.down_proj"


_PLAIN_LAYOUT = LayerLayout()
_QK_NORM_LAYOUT = LayerLayout(query_norm="self_attn.q_norm", key_norm="self_attn.k_norm")


@dataclasses.dataclass(frozen=True, slots=True)
class WindowFields:
    """Which layers slide, where the configuration has no ``layer_types`` that say it.

    Attributes:
        switched: only where ``use_sliding_window`` is true.
        after_full_layers: only from layer ``max_window_layers`` on.
        patterned: every ``sliding_window_pattern``-th layer attends to everything.
    """

    switched: bool = False
    after_full_layers: bool = False
    patterned: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class MixtureFields:
    """Fields that describe a mixture of experts.

    Attributes:
        num_experts: names of the field for E; old and new files differ.
        expert_width: name of the field for an expert's intermediate size.
        normalizes: name of the flag for weights that sum to one; None: they always do.
        placed: ``decoder_sparse_step`` and ``mlp_only_layers`` say which layers are mixtures; else all are.
    """

    num_experts: tuple[str, ...]
    expert_width: str
    normalizes: str | None = None
    placed: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Family:
    """One row.

    Attributes:
        name: ``model_type`` of the configuration, as recorded, e.g. ``"llama"``.
        architectures: entries of ``architectures`` in a ``config.json`` that belong to it.
        defaults: what fields mean that a ``config.json`` leaves out: those of the family's configuration class in
            transformers, because every engine that reads the file assumes them.
        gguf_architectures: values of ``general.architecture`` in a GGUF file that belong to it.
        gguf_names: names of layer tensors in a GGUF file that differ from the usual ones.
        gguf_permuted: the GGUF conversion interleaved the rows of the query and key projections.
        layout: names of a layer's tensors.
        windows: which layers slide; None: ``sliding_window`` does not apply.
        biases: "config" if ``attention_bias`` (query, key, value and output) and ``mlp_bias`` apply, "attention" if
            only the previous does, "qkv" if query, key and value always have one, "none".
        activation: name of the field for the MLP's activation.
        norm_offset: added to every norm weight of a checkpoint; GGUF conversions have added it already.
        scales_embedding: token embeddings are multiplied by sqrt(hidden_size).
        attention_scalar: name of the field whose value^-0.5 scales attention scores; None: head_dim^-0.5.
        local_rope: layers that slide have a rotary embedding of their own.
        partial_rotary: ``partial_rotary_factor`` applies.
        mixture: its experts' fields, or None if no layer is a mixture.
    """

    name: str
    architectures: tuple[str, ...]
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    gguf_architectures: tuple[str, ...] = ()
    gguf_names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    gguf_permuted: bool = False
    layout: LayerLayout = _PLAIN_LAYOUT
    windows: WindowFields | None = None
    biases: Biases = "none"
    activation: str = "hidden_act"
    norm_offset: float = 0.0
    scales_embedding: bool = False
    attention_scalar: str | None = None
    local_rope: bool = False
    partial_rotary: bool = False
    mixture: MixtureFields | None = None

    def complete(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """``config`` with the family's defaults where it is silent; an explicit null stays."""
        return {**self.defaults, **config}


FAMILIES: tuple[Family, ...] = (
    Family(
        name="llama",
        architectures=("LlamaForCausalLM",),
        defaults={"max_position_embeddings": 2048},
        gguf_architectures=("llama",),
        gguf_permuted=True,
        biases="config",
    ),
    Family(
        name="mistral",
        architectures=("MistralForCausalLM",),
        defaults={"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
        gguf_architectures=("mistral",),
        gguf_permuted=True,
        windows=WindowFields(),
    ),
    Family(
        name="qwen2",
        architectures=("Qwen2ForCausalLM",),
        defaults={"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096},
        gguf_architectures=("qwen2",),
        windows=WindowFields(switched=True, after_full_layers=True),
        biases="qkv",
    ),
    Family(
        name="qwen3",
        architectures=("Qwen3ForCausalLM",),
        defaults={
            "num_key_value_heads": 32,
            "head_dim": 128,
            "max_position_embeddings": 32768,
            "sliding_window": 4096,
        },
        gguf_architectures=("qwen3",),
        layout=_QK_NORM_LAYOUT,
        windows=WindowFields(switched=True, after_full_layers=True),
        biases="attention",
    ),
    Family(
        name="qwen3_moe",
        architectures=("Qwen3MoeForCausalLM",),
        defaults={
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "sliding_window": 4096,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
        },
        layout=_QK_NORM_LAYOUT,
        windows=WindowFields(switched=True),
        biases="attention",
        mixture=MixtureFields(
            ("num_local_experts", "num_experts"), "moe_intermediate_size", normalizes="norm_topk_prob", placed=True
        ),
    ),
    Family(
        name="mixtral",
        architectures=("MixtralForCausalLM",),
        defaults={
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
        layout=LayerLayout(
            router="block_sparse_moe.gate",
            expert_gate_up=("block_sparse_moe.experts.{expert}.w1", "block_sparse_moe.experts.{expert}.w3"),
            expert_down="block_sparse_moe.experts.{expert}.w2",
        ),
        windows=WindowFields(),
        mixture=MixtureFields(("num_local_experts",), "intermediate_size"),
    ),
    Family(
        name="gemma3_text",
        architectures=("Gemma3ForCausalLM",),
        defaults={
            "num_key_value_heads": 4,
            "head_dim": 256,
            "max_position_embeddings": 131072,
            "tie_word_embeddings": True,
            "hidden_activation": "gelu_pytorch_tanh",
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            "sliding_window": 4096,
            "sliding_window_pattern": 6,
            "query_pre_attn_scalar": 256,
        },
        gguf_architectures=("gemma3",),
        gguf_names={
            "post_attention_norm": "post_attention_layernorm",
            "ffn_norm": "pre_feedforward_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        },
        layout=LayerLayout(
            attention_output_norm="post_attention_layernorm",
            mlp_norm="pre_feedforward_layernorm",
            mlp_output_norm="post_feedforward_layernorm",
            query_norm="self_attn.q_norm",
            key_norm="self_attn.k_norm",
        ),
        windows=WindowFields(patterned=True),
        biases="attention",
        activation="hidden_activation",
        norm_offset=1.0,
        scales_embedding=True,
        attention_scalar="query_pre_attn_scalar",
        local_rope=True,
    ),
    Family(
        name="phi3",
        architectures=("Phi3ForCausalLM",),
        defaults={
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
        },
        layout=LayerLayout(qkv=("self_attn.qkv_proj",), gate_up=("mlp.gate_up_proj",)),
        windows=WindowFields(),
        partial_rotary=True,
    ),
)


def family_of(config: Mapping[str, Any]) -> Family | None:
    """The family of a parsed ``config.json``, by ``architectures``, else by ``model_type``; None if it has no row.

    Raises:
        ModelLoadError: if the file does not say what it is.
    """
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list):
        raise unsupported("architectures", str(architectures))
    model_type = config.get("model_type")
    for family in FAMILIES:
        if any(name in family.architectures for name in architectures) or (
            not architectures and model_type == family.name
        ):
            return family
    if not architectures and model_type is None:
        raise unsupported("architectures", "None")
    return None


def family_of_gguf(architecture: str) -> Family:
    """The family of a GGUF file's ``general.architecture``.

    Raises:
        ModelLoadError: naming the architecture and what is supported.
    """
    for family in FAMILIES:
        if architecture in family.gguf_architectures:
            return family
    raise unsupported("general.architecture", architecture)


def unsupported(field: str, architecture: str, reason: str = "") -> ModelLoadError:
    """The error for a model that cannot be run, with what could be."""
    supported = ", ".join(name for family in FAMILIES for name in family.architectures)
    return ModelLoadError(
        f"architecture {architecture!r} is not supported{reason and ': '}{reason}.",
        field=field,
        remedy=f"Supported are {supported}, and in folders of safetensors every causal LM of transformers that is "
        "made of plain attention.",
    )
