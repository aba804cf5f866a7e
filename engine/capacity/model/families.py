"""What the fields of a ``config.json`` mean in each model family that the planner knows: one row each.

Only what changes parameter counts, memory or time is here. Where a ``config.json`` is silent, the defaults are those of
the family's configuration class in transformers, because that is what every engine that reads the file assumes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from engine.capacity.text import shown
from engine.errors import ConfigError


@dataclasses.dataclass(frozen=True, slots=True)
class Experts:
    """Where a mixture-of-experts family states its experts: names of fields, "" where it has no such thing.

    Attributes:
        count, top_k, width: experts, experts a token, width of one.
        shared_width: width of all shared experts together; shared_count: or their number, of ``width`` each.
        latent: the width that routed experts work on, where it is not the hidden size.
        shared_gate, bias, router_bias, correction: see :class:`engine.capacity.model.layers.MixtureOfExperts`.
        gated: experts have a gate projection.
        placement: which layers are mixtures: "all", "step" (every ``decoder_sparse_step``-th, except
            ``mlp_only_layers``) or "first_dense" (from layer ``first_k_dense_replace`` on).
    """

    count: str = "num_experts"
    top_k: str = "num_experts_per_tok"
    width: str = "moe_intermediate_size"
    shared_width: str = ""
    shared_count: str = ""
    latent: str = ""
    shared_gate: bool = False
    bias: bool = False
    router_bias: bool = False
    correction: bool = False
    gated: bool = True
    placement: str = "all"


@dataclasses.dataclass(frozen=True, slots=True)
class FamilyFields:
    """One row.

    Attributes:
        model_type: value of ``model_type`` in a ``config.json``.
        architecture: value in ``architectures``.
        num_kv_heads: default of ``num_key_value_heads``; None: as many as query heads.
        head_dim: default of ``head_dim``; None: hidden size / heads.
        tied: default of ``tie_word_embeddings``.
        biases: "config" if ``attention_bias`` (query, key, value and output) and ``mlp_bias`` apply, "attention" if
            only the previous does, "config_qkv" if it means query, key and value alone, "config_out" if the output's is
            ``attention_out_bias``, "qkv" if these always have one, "qkv_bias" if that field says so, "use_bias" if that
            field switches all of them, "none".
        qk_norm: queries and keys are normalized: "head" by a weight of head_dim each, "full" over all heads, "config"
            and "config_full" if ``use_qk_norm`` says so.
        sliding: "none", "always" (``sliding_window`` unless null), "switch" (only where ``use_sliding_window``, from
            layer ``max_window_layers`` on), "even" (layers 0, 2, …) or "pattern" (all but every
            ``sliding_window_pattern``-th).
        window: default of ``sliding_window`` where it applies; None: all positions.
        max_position: default of ``max_position_embeddings``, tokens.
        norms: norms of the hidden width a layer; norm_bias: they have one (LayerNorm).
        gated: the MLP has a gate projection.
        sinks: attention has a learned sink a head.
        head_bias: the language-model head has one; "config": if ``lm_head_bias`` says so.
        experts: where the experts are stated, for a mixture.
        layout: "plain", or the layer structure of its own that :mod:`engine.capacity.model.readers` knows by this name.
        text: the architecture that wraps a language model stated under ``text_config``; False for a language model.
        defaults: other fields' defaults.
        aliases: other values of ``model_type`` or ``architectures`` that mean this family.
        unused: fields of the family's configuration that change no size in it, whatever they say.
    """

    model_type: str
    architecture: str
    num_kv_heads: int | None = None
    head_dim: int | None = None
    tied: bool = False
    biases: str = "none"
    qk_norm: str = ""
    sliding: str = "none"
    window: int | None = 4096
    max_position: int = 32768
    norms: int = 2
    norm_bias: bool = False
    gated: bool = True
    sinks: bool = False
    head_bias: bool | str = False
    experts: Experts | None = None
    layout: str = "plain"
    text: bool = False
    defaults: tuple[tuple[str, Any], ...] = ()
    aliases: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()


_QWEN_EXPERTS = Experts(placement="step")
_QWEN2_EXPERTS = Experts(shared_width="shared_expert_intermediate_size", shared_gate=True, placement="step")
_LOCAL_EXPERTS = Experts(count="num_local_experts", width="intermediate_size")
_GPT_OSS_EXPERTS = Experts(count="num_local_experts", width="intermediate_size", bias=True, router_bias=True)
_DEEPSEEK2_EXPERTS = Experts(count="n_routed_experts", shared_count="n_shared_experts", placement="first_dense")
_DEEPSEEK3_EXPERTS = dataclasses.replace(_DEEPSEEK2_EXPERTS, correction=True)
#: Heads of keys are those of queries, of nope + rope dimensions.
_LATENT_UNUSED = ("num_key_value_heads", "head_dim", "qk_head_dim")
_QWEN35 = (("full_attention_interval", 4), ("partial_rotary_factor", 0.25))
#: Heads for multi-token prediction are left out, as everywhere; output gates are always there.
_QWEN35_UNUSED = ("attn_output_gate", "mtp_num_hidden_layers", "mtp_use_dedicated_embeddings", "mamba_ssm_dtype")
_MINIMAX_UNUSED = (
    "use_qk_norm", "qk_norm_type", "use_mtp", "num_mtp_modules", "mtp_transformer_layers", "use_routing_bias",
    "attn_type_list", "rotary_dim", "shared_moe_mode", "mlp_intermediate_size",
)  # fmt: skip
_GEMMA4_TEXT = (
    ("vocab_size", 262144),
    ("hidden_size", 2304),
    ("intermediate_size", 9216),
    ("num_hidden_layers", 30),
    ("num_attention_heads", 8),
    ("num_key_value_heads", 4),
    ("sliding_window", 512),
)
_GEMMA3_TEXT = (
    ("vocab_size", 262208),
    ("hidden_size", 2304),
    ("intermediate_size", 9216),
    ("num_hidden_layers", 26),
    ("num_attention_heads", 8),
    ("num_key_value_heads", 4),
    ("sliding_window_pattern", 6),
)

FAMILIES: tuple[FamilyFields, ...] = (
    FamilyFields("llama", "LlamaForCausalLM", biases="config", max_position=2048),
    FamilyFields("mistral", "MistralForCausalLM", num_kv_heads=8, sliding="always", max_position=131072),
    FamilyFields("mistral3", "Mistral3ForConditionalGeneration", text=True, defaults=(("text_model_type", "mistral"),)),
    FamilyFields(
        "mixtral",
        "MixtralForCausalLM",
        num_kv_heads=8,
        sliding="always",
        window=None,
        max_position=131072,
        experts=_LOCAL_EXPERTS,
    ),
    FamilyFields("qwen2", "Qwen2ForCausalLM", num_kv_heads=32, biases="qkv", sliding="switch"),
    FamilyFields(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        num_kv_heads=16,
        biases="qkv_bias",
        sliding="switch",
        experts=_QWEN2_EXPERTS,
    ),
    FamilyFields(
        "qwen3",
        "Qwen3ForCausalLM",
        num_kv_heads=32,
        head_dim=128,
        biases="attention",
        qk_norm="head",
        sliding="switch",
    ),
    FamilyFields(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        num_kv_heads=4,
        biases="attention",
        qk_norm="head",
        sliding="switch",
        experts=_QWEN_EXPERTS,
    ),
    FamilyFields(
        "qwen3_next",
        "Qwen3NextForCausalLM",
        num_kv_heads=2,
        head_dim=256,
        biases="attention",
        qk_norm="head",
        layout="delta",
        experts=_QWEN2_EXPERTS,
        defaults=(("full_attention_interval", 4),),
    ),
    FamilyFields(
        "gemma", "GemmaForCausalLM", num_kv_heads=16, head_dim=256, tied=True, biases="attention", max_position=8192
    ),
    FamilyFields(
        "gemma2",
        "Gemma2ForCausalLM",
        num_kv_heads=4,
        head_dim=256,
        tied=True,
        biases="attention",
        sliding="even",
        norms=4,
        max_position=8192,
    ),
    FamilyFields(
        "gemma3_text",
        "Gemma3ForCausalLM",
        num_kv_heads=4,
        head_dim=256,
        tied=True,
        biases="attention",
        qk_norm="head",
        sliding="pattern",
        norms=4,
        max_position=131072,
        defaults=_GEMMA3_TEXT,
    ),
    FamilyFields(
        "gemma3",
        "Gemma3ForConditionalGeneration",
        tied=True,
        text=True,
        defaults=(("text_model_type", "gemma3_text"),),
    ),
    # Phi-2 normalizes once a layer, before attention and MLP in parallel.
    FamilyFields(
        "phi",
        "PhiForCausalLM",
        biases="all",
        norms=1,
        norm_bias=True,
        gated=False,
        head_bias=True,
        max_position=2048,
    ),
    FamilyFields(
        "phi3",
        "Phi3ForCausalLM",
        sliding="always",
        window=None,
        max_position=4096,
        unused=("full_attn_mod", "interpolate_factor"),
    ),
    FamilyFields(
        "phimoe",
        "PhimoeForCausalLM",
        num_kv_heads=8,
        biases="attention",
        sliding="always",
        window=None,
        norm_bias=True,
        head_bias="config",
        max_position=131072,
        experts=_LOCAL_EXPERTS,
    ),
    FamilyFields(
        "gpt_oss",
        "GptOssForCausalLM",
        num_kv_heads=8,
        head_dim=64,
        biases="attention",
        sliding="even",
        window=128,
        sinks=True,
        max_position=131072,
        experts=_GPT_OSS_EXPERTS,
        defaults=(("attention_bias", True),),
        unused=("experts_per_token", "initial_context_length"),
    ),
    FamilyFields(
        "deepseek_v2",
        "DeepseekV2ForCausalLM",
        layout="latent",
        experts=_DEEPSEEK2_EXPERTS,
        max_position=2048,
        unused=_LATENT_UNUSED,
    ),
    FamilyFields(
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        layout="latent",
        experts=_DEEPSEEK3_EXPERTS,
        max_position=4096,
        aliases=("kimi_k2",),
        unused=_LATENT_UNUSED,
    ),
    FamilyFields("granite", "GraniteForCausalLM", biases="config", max_position=2048),
    FamilyFields("granitemoe", "GraniteMoeForCausalLM", biases="attention", max_position=2048, experts=_LOCAL_EXPERTS),
    FamilyFields(
        "granitemoehybrid",
        "GraniteMoeHybridForCausalLM",
        biases="attention",
        layout="granite_hybrid",
        max_position=2048,
        unused=("intermediate_size",),
        experts=dataclasses.replace(_LOCAL_EXPERTS, shared_width="shared_intermediate_size"),
    ),
    FamilyFields(
        "falcon",
        "FalconForCausalLM",
        tied=True,
        norm_bias=True,
        gated=False,
        layout="falcon",
        max_position=2048,
        unused=("alibi",),
    ),
    FamilyFields(
        "nemotron_h",
        "NemotronHForCausalLM",
        num_kv_heads=8,
        head_dim=128,
        biases="config",
        gated=False,
        norms=1,
        layout="nemotron_h",
        max_position=4096,
        experts=Experts(
            count="n_routed_experts",
            shared_width="moe_shared_expert_intermediate_size",
            latent="moe_latent_size",
            correction=True,
            gated=False,
        ),
        unused=(
            "expand",
            "n_shared_experts",
            "attention_head_dim",
            "mtp_hybrid_override_pattern",
            "mtp_layers_block_type",
        ),
    ),
    FamilyFields(
        "llama4_text",
        "Llama4ForCausalLM",
        num_kv_heads=8,
        head_dim=128,
        biases="attention",
        layout="llama4",
        max_position=131072,
        unused=("use_qk_norm",),  # without weights
    ),
    FamilyFields(
        "llama4",
        "Llama4ForConditionalGeneration",
        text=True,
        defaults=(("text_model_type", "llama4_text"),),
    ),
    FamilyFields("olmo2", "Olmo2ForCausalLM", biases="attention", qk_norm="full", max_position=2048),
    FamilyFields(
        "cohere",
        "CohereForCausalLM",
        tied=True,
        biases="attention",
        qk_norm="config_full",
        norms=1,
        max_position=8192,
    ),
    FamilyFields(
        "cohere2",
        "Cohere2ForCausalLM",
        tied=True,
        biases="attention",
        norms=1,
        sliding="pattern",
        max_position=8192,
        defaults=(("sliding_window_pattern", 4),),
    ),
    FamilyFields(
        "smollm3",
        "SmolLM3ForCausalLM",
        num_kv_heads=4,
        tied=True,
        biases="config",
        max_position=32768,
        unused=("no_rope_layers", "no_rope_layer_interval", "max_window_layers"),
    ),
    FamilyFields(
        "starcoder2",
        "Starcoder2ForCausalLM",
        num_kv_heads=2,
        tied=True,
        biases="use_bias",
        sliding="always",
        window=None,
        norm_bias=True,
        gated=False,
        max_position=4096,
        unused=("mlp_type",),
    ),
    FamilyFields(
        "glm4", "Glm4ForCausalLM", num_kv_heads=2, head_dim=128, biases="config_qkv", norms=4, max_position=131072
    ),
    FamilyFields(
        "glm4_moe",
        "Glm4MoeForCausalLM",
        num_kv_heads=8,
        biases="config_qkv",
        qk_norm="config",
        max_position=131072,
        experts=_DEEPSEEK3_EXPERTS,
    ),
    FamilyFields(
        "qwen3_vl_text",
        "Qwen3VLTextModel",
        num_kv_heads=32,
        head_dim=128,
        biases="attention",
        qk_norm="head",
        max_position=128000,
    ),
    FamilyFields(
        "qwen3_vl",
        "Qwen3VLForConditionalGeneration",
        text=True,
        defaults=(("text_model_type", "qwen3_vl_text"),),
    ),
    FamilyFields(
        "qwen3_vl_moe_text",
        "Qwen3VLMoeTextModel",
        num_kv_heads=16,
        biases="attention",
        qk_norm="head",
        max_position=128000,
        experts=_QWEN_EXPERTS,
    ),
    FamilyFields(
        "qwen3_vl_moe",
        "Qwen3VLMoeForConditionalGeneration",
        text=True,
        defaults=(("text_model_type", "qwen3_vl_moe_text"),),
    ),
    FamilyFields(
        "qwen3_5_text",
        "Qwen3_5ForCausalLM",
        num_kv_heads=4,
        head_dim=256,
        biases="attention",
        qk_norm="head",
        layout="delta",
        defaults=_QWEN35,
        unused=_QWEN35_UNUSED,
    ),
    FamilyFields(
        "qwen3_5",
        "Qwen3_5ForConditionalGeneration",
        text=True,
        defaults=(("text_model_type", "qwen3_5_text"),),
    ),
    FamilyFields(
        "qwen3_5_moe_text",
        "Qwen3_5MoeForCausalLM",
        num_kv_heads=2,
        head_dim=256,
        biases="attention",
        qk_norm="head",
        layout="delta",
        experts=dataclasses.replace(_QWEN2_EXPERTS, placement="all"),
        defaults=_QWEN35,
        unused=_QWEN35_UNUSED,
    ),
    FamilyFields(
        "qwen3_5_moe",
        "Qwen3_5MoeForConditionalGeneration",
        text=True,
        defaults=(("text_model_type", "qwen3_5_moe_text"),),
    ),
    FamilyFields(
        "minimax_m2",
        "MiniMaxM2ForCausalLM",
        num_kv_heads=8,
        head_dim=128,
        qk_norm="full",
        max_position=196608,
        experts=dataclasses.replace(_LOCAL_EXPERTS, correction=True),
        unused=_MINIMAX_UNUSED,
    ),
    FamilyFields(
        "deepseek_v32",
        "DeepseekV32ForCausalLM",
        layout="indexed",
        experts=_DEEPSEEK3_EXPERTS,
        max_position=163840,
        defaults=(("index_n_heads", 64), ("first_k_dense_replace", 3)),
        unused=_LATENT_UNUSED,
    ),
    FamilyFields(
        "deepseek_v4",
        "DeepseekV4ForCausalLM",
        layout="deepseek_v4",
        max_position=1048576,
        experts=_DEEPSEEK3_EXPERTS,
        unused=(
            "num_key_value_heads",
            "hc_eps",
            "hc_sinkhorn_iters",
            "compress_rope_theta",
            "qk_rope_head_dim",
        ),
    ),
    FamilyFields(
        "glm_moe_dsa",
        "GlmMoeDsaForCausalLM",
        layout="indexed",
        experts=_DEEPSEEK3_EXPERTS,
        max_position=202752,
        defaults=(
            ("q_lora_rank", 2048),
            ("qk_nope_head_dim", 192),
            ("v_head_dim", 256),
            ("index_n_heads", 32),
            ("first_k_dense_replace", 3),
        ),
        unused=_LATENT_UNUSED,
    ),
    FamilyFields(
        "glm4_moe_lite",
        "Glm4MoeLiteForCausalLM",
        layout="latent",
        experts=_DEEPSEEK3_EXPERTS,
        max_position=202752,
        defaults=(("q_lora_rank", 768), ("qk_nope_head_dim", 192), ("v_head_dim", 256), ("first_k_dense_replace", 1)),
        unused=_LATENT_UNUSED,
    ),
    FamilyFields(
        "kimi_k25",
        "KimiK25ForConditionalGeneration",
        text=True,
        defaults=(("text_model_type", "deepseek_v3"),),
        aliases=("Kimi_K25ForConditionalGeneration",),
    ),
    FamilyFields(
        "mimo_v2_flash",
        "MiMoV2FlashForCausalLM",
        num_kv_heads=4,
        head_dim=192,
        biases="config_qkv",
        layout="mimo",
        max_position=131072,
        experts=dataclasses.replace(_DEEPSEEK3_EXPERTS, placement="first_dense"),
        defaults=(("v_head_dim", 128), ("first_k_dense_replace", 1)),
        unused=("attention_value_scale", "attention_chunk_size", "hybrid_block_size", "swa_rope_theta"),
    ),
    FamilyFields(
        "gemma4_text",
        "Gemma4ForCausalLM",
        num_kv_heads=4,
        head_dim=256,
        tied=True,
        biases="attention",
        qk_norm="head",
        layout="gemma4",
        norms=4,
        max_position=131072,
        defaults=_GEMMA4_TEXT,
        unused=("use_bidirectional_attention",),
    ),
    FamilyFields(
        "gemma4",
        "Gemma4ForConditionalGeneration",
        tied=True,
        text=True,
        defaults=(("text_model_type", "gemma4_text"),),
    ),
    FamilyFields(
        "minimax_m3_vl_text",
        "MiniMaxM3VLForCausalLM",
        num_kv_heads=4,
        head_dim=128,
        qk_norm="head",
        layout="minimax_m3",
        max_position=524288,
        experts=dataclasses.replace(_LOCAL_EXPERTS, shared_width="shared_intermediate_size", correction=True),
        defaults=(("shared_intermediate_size", 3072),),
        unused=_MINIMAX_UNUSED,
    ),
    FamilyFields(
        "minimax_m3_vl",
        "MiniMaxM3SparseForConditionalGeneration",
        text=True,
        defaults=(("text_model_type", "minimax_m3_vl_text"),),
        unused=("projector_hidden_size", "merged_hidden_size"),
    ),
    FamilyFields(
        "step3p5",
        "Step3p5ForCausalLM",
        num_kv_heads=8,
        head_dim=128,
        biases="attention",
        qk_norm="head",
        layout="step",
        max_position=128000,
        unused=(
            "mtp_layer_types",
            "mtp_mlp_layer_types",
            "swiglu_limits",
            "swiglu_limits_shared",
            "moe_router_scaling_factor",
            "partial_rotary_factors",
            "per_layer_config",
        ),
    ),
    FamilyFields(
        "step3p7",
        "Step3p7ForConditionalGeneration",
        text=True,
        defaults=(("text_model_type", "step3p5"),),
    ),
    FamilyFields(
        "qwen2_vl_text",
        "Qwen2VLTextModel",
        num_kv_heads=8,
        biases="qkv",
        sliding="switch",
    ),
    FamilyFields(
        "qwen2_vl",
        "Qwen2VLForConditionalGeneration",
        text=True,
        defaults=(("text_model_type", "qwen2_vl_text"),),
    ),
    FamilyFields(
        "qwen2_5_vl_text",
        "Qwen2_5_VLTextModel",
        num_kv_heads=8,
        biases="qkv",
        sliding="switch",
    ),
    FamilyFields(
        "qwen2_5_vl",
        "Qwen2_5_VLForConditionalGeneration",
        text=True,
        defaults=(("text_model_type", "qwen2_5_vl_text"),),
    ),
    FamilyFields(
        "ministral3",
        "Ministral3ForCausalLM",
        num_kv_heads=8,
        head_dim=128,
        sliding="always",
        window=None,
        max_position=262144,
    ),
    FamilyFields(
        "seed_oss",
        "SeedOssForCausalLM",
        num_kv_heads=8,
        head_dim=128,
        biases="config_out",
        max_position=524288,
        defaults=(("attention_bias", True),),
    ),
    FamilyFields(
        "exaone4",
        "Exaone4ForCausalLM",
        qk_norm="head",
        sliding="pattern",
        max_position=2048,
        defaults=(("sliding_window_pattern", 4),),
    ),
    FamilyFields(
        "olmo3",
        "Olmo3ForCausalLM",
        biases="attention",
        qk_norm="full",
        sliding="pattern",
        max_position=2048,
        defaults=(("sliding_window_pattern", 4),),
    ),
    FamilyFields(
        "olmoe",
        "OlmoeForCausalLM",
        biases="attention",
        qk_norm="full",
        max_position=4096,
        experts=Experts(width="intermediate_size"),
        unused=("clip_qkv",),
    ),
    FamilyFields(
        "ernie4_5",
        "Ernie4_5ForCausalLM",
        num_kv_heads=2,
        head_dim=128,
        tied=True,
        biases="use_bias",
        max_position=131072,
        defaults=(("use_bias", False),),
    ),
    FamilyFields(
        "hunyuan_v1_dense", "HunYuanDenseV1ForCausalLM", biases="attention", qk_norm="head", max_position=2048
    ),
    FamilyFields("arcee", "ArceeForCausalLM", biases="config", gated=False, max_position=4096),
    FamilyFields(
        "nemotron-nas",
        "DeciLMForCausalLM",
        biases="config",
        layout="blocks",
        max_position=131072,
        aliases=("nemotron_nas", "deci"),
        unused=("num_key_value_heads_per_layer", "num_key_value_heads"),
    ),
)


def family_of(config: Mapping[str, Any]) -> FamilyFields:
    """The family of a parsed ``config.json``, by ``architectures``, else by ``model_type``.

    >>> family_of({"architectures": ["Qwen3ForCausalLM"]}).model_type
    'qwen3'

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
        named = model_type == family.model_type or model_type in family.aliases
        listed = {family.architecture, *family.aliases} & set(architectures or ())
        if listed or (not architectures and named):
            return family
    given = ", ".join(architectures or ()) or (shown(model_type) if model_type is not None else None)
    supported = f"Supported are {', '.join(family.architecture for family in FAMILIES)}."
    if given is None:
        raise ConfigError(
            "neither architectures nor model_type says what kind of model this is.",
            field="architectures",
            remedy=f"Use the config.json of the model's own repository. {supported}",
        )
    raise ConfigError(f"the planner does not know {given} yet.", field="architectures", remedy=supported)
