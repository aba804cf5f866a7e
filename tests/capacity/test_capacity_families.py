"""Layers of a kind of their own: what they keep of a sequence, and what stands beside them."""

from __future__ import annotations

import dataclasses
import math

import pytest

from engine.capacity import ModelSpec, PlanRequest, find_gpu, model_config, model_spec, parameter_count, plan
from engine.errors import ConfigError
from tests.capacity.by_name import compare_kv_formulas, kv_bytes_per_sequence, kv_bytes_per_token, weight_bytes
from tests.capacity.test_capacity_agrees_with_transformers import default_config

#: Two layers of a Nemotron-NAS model of hidden size 1024 with 8 heads of 128.
BLOCKS = [
    {"attention": {"n_heads_in_group": 4}, "ffn": {"ffn_mult": 1.5}},
    {"attention": {"no_op": True}, "ffn": {"replace_with_linear": True}},
]
NAS = {"architectures": ["DeciLMForCausalLM"], "model_type": "nemotron-nas", "hidden_size": 1024, "vocab_size": 1000,
       "num_attention_heads": 8, "num_hidden_layers": 2, "block_configs": BLOCKS}  # fmt: skip


def test_index_of_a_sparse_layer_is_kept_beside_its_latent():
    spec = model_spec("DeepSeek-V3.2")
    assert kv_bytes_per_token(spec, "bf16") == 61 * (576 * 2 + 128 + 4)
    assert kv_bytes_per_token(model_spec("DeepSeek-V3.1"), "bf16") == 61 * 576 * 2
    both = compare_kv_formulas(spec, 1024, 16, "bf16")
    assert both.corrected.bytes == 1024 * kv_bytes_per_token(spec, "bf16")
    products = sum(math.prod(factor.value for factor in product) for product in both.corrected.products)
    assert products == pytest.approx(both.corrected.bytes)


def test_layers_that_take_over_an_index_have_none():
    config = default_config("glm_moe_dsa", 6)
    shared = config | {"indexer_types": ["full", "shared"] * 3}
    whole, half = (ModelSpec.from_hf_config(item) for item in (config, shared))
    assert kv_bytes_per_token(whole, "bf16") - kv_bytes_per_token(half, "bf16") == 3 * 132
    assert parameter_count(half).total < parameter_count(whole).total


def test_keys_and_values_of_different_width_are_both_kept():
    # 9 layers of 4 heads, 39 sliding ones of 8; keys of 192, values of 128.
    assert kv_bytes_per_token(model_spec("MiMo-V2-Flash"), "bf16") == (9 * 4 + 39 * 8) * (192 + 128) * 2


def test_layers_that_share_a_cache_keep_nothing_of_their_own():
    config = default_config("gemma4_text", 12) | {"per_layer_config": None}
    alone, sharing = (ModelSpec.from_hf_config(config | {"num_kv_shared_layers": count}) for count in (0, 6))
    assert (alone.num_attention_layers, sharing.num_attention_layers) == (12, 6)
    assert 2 * kv_bytes_per_token(sharing, "bf16") == kv_bytes_per_token(alone, "bf16")
    assert not sharing.is_recurrent
    request = PlanRequest(sharing, find_gpu("H200"), context=8192)
    assert not [line for line in plan(request).warnings if "Recurrent" in line]


def test_state_of_delta_nets_is_constant_and_only_full_layers_grow():
    config = default_config("qwen3_5_text", 8)
    spec = ModelSpec.from_hf_config(config)
    assert spec.num_attention_layers == 2
    assert spec.is_recurrent
    assert kv_bytes_per_token(spec, "bf16") == 2 * 2 * config["num_key_value_heads"] * config["head_dim"] * 2


def test_each_layer_of_a_searched_architecture_is_its_own():
    spec = ModelSpec.from_hf_config(NAS)
    width = 1024  # 2 · 1.5 · 1024 / 3, a multiple of 256
    attention = 1024 * (1024 + 2 * 256) + 1024 * 1024
    layers = attention + 3 * 1024 * width + 2 * 1024 + 1024 * 1024 + 1024
    assert parameter_count(spec).total == layers + 2 * 1000 * 1024 + 1024
    assert kv_bytes_per_token(spec, "bf16") == 2 * 2 * 128 * 2
    for broken in (None, [], [{}, {}], BLOCKS[:1], [{"attention": {"n_heads_in_group": 3}, "ffn": {}}] * 2):
        with pytest.raises(ConfigError):
            ModelSpec.from_hf_config(NAS | {"block_configs": broken})


def test_compressed_cache_grows_beyond_the_window_and_experts_may_have_a_format_of_their_own():
    config = default_config("deepseek_v4", 6)
    spec = ModelSpec.from_hf_config(config)
    # Of six layers two are compressed 4 to 1 with an index, four 128 to 1; all keep 128 tokens of 512 values.
    growth = kv_bytes_per_sequence(spec, 65536, 16, "bf16") - kv_bytes_per_sequence(spec, 32768, 16, "bf16")
    assert growth == 32768 * (2 * (2 * 512 + 128 + 4) // 4 + 4 * 2 * 512 // 128)
    assert kv_bytes_per_sequence(spec, 128, 16, "bf16") == 128 * kv_bytes_per_token(spec, "bf16")
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    stored = ModelSpec.from_hf_config(config | {"quantization_config": fp8 | {"expert_dtype": "fp4"}})
    plain = ModelSpec.from_hf_config(config | {"quantization_config": fp8})
    experts = parameter_count(spec).experts
    saved = weight_bytes(plain, "fp8-block") - weight_bytes(stored, "fp8-block")
    assert saved == pytest.approx(experts * (1 - 4.25 / 8), rel=0.001)
    odd = ModelSpec.from_hf_config(config | {"quantization_config": fp8 | {"expert_dtype": "int3"}})
    assert "expert_dtype" in " ".join(odd.notes)


def test_image_encoder_takes_memory_but_is_no_parameter_of_the_language_model():
    spec = model_spec("Qwen3-VL-8B")
    assert parameter_count(spec).total == parameter_count(model_spec("Qwen3-8B")).total
    request = PlanRequest(spec, find_gpu("H200"), context=4096, profile="transformers")
    without = dataclasses.replace(request, spec=dataclasses.replace(spec, encoder=0))
    assert plan(request).memory.weights - plan(without).memory.weights == 2 * spec.encoder
    assert plan(request).to_dict()["memory"]["encoder_gib"] * 2**30 == 2 * spec.encoder > 1e9


def test_experts_in_fp8_leave_index_and_router_alone():
    spec = model_spec("DeepSeek-V3.2")
    assert weight_bytes(spec, "fp8-block") < 1.01 * parameter_count(spec).total + 2 * 2e9
    whole = model_config("DeepSeek-V3.2")
    stated = whole["quantization_config"] | {"modules_to_not_convert": ["self_attn.indexer"]}
    kept = ModelSpec.from_hf_config(whole | {"quantization_config": stated})
    index = 61 * (64 * 128 * 1536 + 128 * 7168)
    assert weight_bytes(kept, "fp8-block") - weight_bytes(spec, "fp8-block") == pytest.approx(index, rel=0.001)
