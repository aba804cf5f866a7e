"""Counted from a config.json, the parameters are those of the model that transformers builds from it."""

from __future__ import annotations

from typing import Any

import pytest

from engine.capacity import ModelSpec, model_config, parameter_count
from engine.capacity.model.families import FAMILIES

# One of each family, cut down to a few layers that still show every kind.
LAYERS = {
    "Llama-3.1-8B": 2,
    "Mistral-7B-v0.1": 2,
    "Mixtral-8x7B-v0.1": 2,
    "Qwen2.5-7B": 2,
    "Qwen1.5-MoE-A2.7B": 2,
    "Qwen3-8B": 2,
    "Qwen3-30B-A3B": 2,
    "Qwen3-Next-80B-A3B": 4,
    "Gemma-1-2b": 2,
    "Gemma-2-9b": 2,
    "Gemma-3-1b": 6,
    "Phi-2": 2,
    "Phi-4-mini": 2,
    "Phi-3.5-MoE": 2,
    "gpt-oss-20b": 2,
    "DeepSeek-V2-Lite": 2,
    "DeepSeek-V3": 4,
    "Granite-3.1-8b": 2,
    "Granite-3.1-3b-a800m": 2,
    "Granite-4.0-h-tiny": 6,
    "Falcon-7b": 2,
    "Falcon-40b": 2,
    "OLMo-2-7B": 2,
    "Command-R-v01": 2,
    "Command-R7B": 4,
    "SmolLM3-3B": 2,
    "StarCoder2-7b": 2,
    "GLM-4-9B-0414": 2,
    "GLM-4.5": 4,
}

#: Families by the defaults of transformers' own class: ``model_type`` and layers that show every kind.
BY_DEFAULT = {
    "qwen3_vl_text": 4,
    "qwen3_vl_moe_text": 4,
    "qwen3_5_text": 4,
    "qwen3_5_moe_text": 4,
    "minimax_m2": 3,
    "deepseek_v32": 5,
    "deepseek_v4": 6,
    "glm_moe_dsa": 6,
    "glm4_moe_lite": 4,
    "mimo_v2_flash": 7,
    "gemma4_text": 12,
    "minimax_m3_vl_text": 3,
    "qwen2_vl_text": 2,
    "qwen2_5_vl_text": 2,
    "ministral3": 2,
    "seed_oss": 2,
    "exaone4": 4,
    "olmo3": 4,
    "olmoe": 2,
    "ernie4_5": 2,
    "hunyuan_v1_dense": 2,
    "arcee": 2,
}
#: What a class has no default for.
NEEDED = {"hunyuan_v1_dense": {"head_dim": 128}}
#: Multimodal models by their own class: fields of the language model inside.
WRAPPERS: dict[str, dict[str, Any]] = {
    "gemma3": {"num_hidden_layers": 6},
    "gemma4": {"num_hidden_layers": 12, "num_kv_shared_layers": 6, "use_double_wide_mlp": True},
    "kimi_k25": {"num_hidden_layers": 4},
    "llama4": {"num_hidden_layers": 4},
    "minimax_m3_vl": {
        "num_hidden_layers": 3,
        "layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
        "mlp_layer_types": ["dense", "sparse", "sparse"],
    },
    "mistral3": {"num_hidden_layers": 2},
    "qwen2_vl": {"num_hidden_layers": 2},
    "qwen2_5_vl": {"num_hidden_layers": 2},
    "qwen3_5": {"num_hidden_layers": 4},
    "qwen3_5_moe": {"num_hidden_layers": 4},
    "qwen3_vl": {"num_hidden_layers": 4},
    "qwen3_vl_moe": {"num_hidden_layers": 4},
    "step3p7": {
        "num_hidden_layers": 5,
        "layer_types": ["full_attention", *["sliding_attention"] * 4],
        "sliding_window": 512,
        "num_sliding_attention_heads": 96,
    },
}


def default_config(model_type: str, layers: int) -> dict[str, Any]:
    """What transformers writes of a family's configuration with nothing but the number of layers given."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    architecture = next(family.architecture for family in FAMILIES if family.model_type == model_type)
    fields = {"num_hidden_layers": layers} | NEEDED.get(model_type, {})
    written = CONFIG_MAPPING[model_type](**fields).to_dict()
    return {"tie_word_embeddings": False} | written | {"architectures": [architecture], "model_type": model_type}


def cut_config(name: str, layers: int) -> dict[str, Any]:
    config = model_config(name) | {"num_hidden_layers": layers}
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][:layers]
    return config


def built_parameters(config: dict[str, Any]) -> int:
    """Parameters, and the routers' correction biases, that transformers keeps as buffers."""
    import torch
    from transformers import AutoModel, AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    left_out = ("architectures", "model_type", "torch_dtype", "quantization_config", "_name_or_path")
    fields = {key: value for key, value in config.items() if key not in left_out}
    stated = CONFIG_MAPPING[config["model_type"]](**fields)
    head = 0
    with torch.device("meta"):
        if type(stated) in AutoModelForCausalLM._model_mapping:
            model = AutoModelForCausalLM.from_config(stated)
        else:  # a language model that only stands inside a multimodal one, which adds the head
            model = AutoModel.from_config(stated)
            head = 0 if config.get("tie_word_embeddings") else stated.vocab_size * stated.hidden_size
    corrections = [buffer for name, buffer in model.named_buffers() if "correction" in name]
    return head + sum(tensor.numel() for tensor in (*model.parameters(), *corrections))


@pytest.mark.parametrize(("name", "layers"), LAYERS.items())
def test_count_is_that_of_the_model_that_transformers_builds(name: str, layers: int):
    config = cut_config(name, layers)
    assert parameter_count(ModelSpec.from_hf_config(config)).total == built_parameters(config)


@pytest.mark.parametrize(("model_type", "layers"), BY_DEFAULT.items())
def test_count_of_a_family_is_that_of_its_class_by_default(model_type: str, layers: int):
    config = default_config(model_type, layers)
    assert parameter_count(ModelSpec.from_hf_config(config)).total == built_parameters(config)


@pytest.mark.parametrize(("model_type", "text"), WRAPPERS.items())
def test_language_model_inside_a_multimodal_one_is_counted_as_it_is_built(model_type: str, text: dict[str, Any]):
    import torch
    from transformers import AutoModelForImageTextToText
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    stated = CONFIG_MAPPING[model_type](text_config=text)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(stated)
    corrections = [(name, buffer) for name, buffer in model.named_buffers() if "correction" in name]
    encoders = ("vision", "visual", "projector", "multi_modal", "audio")
    tensors = [(name, tensor) for name, tensor in (*model.named_parameters(), *corrections)]
    built = sum(tensor.numel() for name, tensor in tensors if not any(part in name for part in encoders))
    spec = ModelSpec.from_hf_config({**stated.to_dict(), "architectures": [type(model).__name__]})
    assert parameter_count(spec).total == built
    assert "encoder" in spec.notes[0]
    if spec.encoder:
        assert spec.encoder == sum(tensor.numel() for _, tensor in tensors) - built
    assert not [note for note in spec.notes if note.startswith("Not read")]


def test_hybrid_pattern_counts_as_transformers_builds_it():
    config = model_config("Nemotron-3-Nano-30B-A3B") | {"hybrid_override_pattern": "ME*-", "num_hidden_layers": 4}
    expected = parameter_count(ModelSpec.from_hf_config(config)).total
    assert expected == built_parameters(config | {"layers_block_type": ["mamba", "moe", "attention", "mlp"]})
