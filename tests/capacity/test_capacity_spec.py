"""What a config.json means, and what is said of a broken one."""

from __future__ import annotations

import pytest

from engine.capacity import ModelSpec, model_config, model_spec, parameter_count
from engine.errors import ConfigError

LLAMA = model_config("Llama-3.1-8B")


def _refused(config, field: str) -> ConfigError:
    with pytest.raises(ConfigError) as problem:
        ModelSpec.from_hf_config(config)
    assert problem.value.field == field
    assert problem.value.remedy
    return problem.value


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_hidden_layers", -3),
        ("num_hidden_layers", 0),
        ("num_hidden_layers", 10**9),
        ("hidden_size", "4096"),
        ("hidden_size", 4096.5),
        ("num_attention_heads", True),
        ("num_key_value_heads", 5),
        ("num_key_value_heads", [8]),
        ("vocab_size", None),
        ("intermediate_size", 10**50),
        ("tie_word_embeddings", "yes"),
        ("torch_dtype", "int7"),
        ("head_dim", -1),
        ("architectures", "LlamaForCausalLM"),
        ("architectures", [None]),
    ],
)
def test_nonsense_value_is_named(field: str, value):
    _refused(LLAMA | {field: value}, field)


def test_number_too_long_to_print_is_still_named():
    assert "more than 38 digits" in str(_refused(LLAMA | {"intermediate_size": 10**5000}, "intermediate_size"))
    _refused(LLAMA | {"vocab_size": [10**5000]}, "vocab_size")


def test_heads_that_do_not_divide_are_named_with_what_would_work():
    problem = _refused(LLAMA | {"num_key_value_heads": 7}, "num_key_value_heads")
    assert "7 key/value heads" in str(problem)
    assert "num_attention_heads = 32" in str(problem)


def test_hidden_size_that_heads_do_not_divide_needs_a_head_dim():
    config = LLAMA | {"hidden_size": 4100}
    _refused(config, "head_dim")
    assert ModelSpec.from_hf_config(config | {"head_dim": 128}).head_dim == 128


@pytest.mark.parametrize("config", [None, [], "text", 3])
def test_what_is_no_object_is_refused(config):
    _refused(config, "config.json")


def test_unknown_architecture_is_named_with_what_is_supported():
    problem = _refused({"architectures": ["MambaForCausalLM"], "model_type": "mamba"}, "architectures")
    assert "MambaForCausalLM" in str(problem)
    assert "LlamaForCausalLM" in str(problem.remedy)
    assert "Qwen3ForCausalLM" in str(problem.remedy)


def test_config_without_any_architecture_is_refused():
    _refused({"hidden_size": 8}, "architectures")


def test_model_type_is_enough():
    config = {key: value for key, value in LLAMA.items() if key != "architectures"}
    assert ModelSpec.from_hf_config(config).architecture == "LlamaForCausalLM"


def test_absent_kv_heads_take_the_family_default_and_null_means_multi_head():
    config = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
    assert ModelSpec.from_hf_config(config).num_kv_heads == 32
    mistral = model_config("Mistral-7B-v0.1")
    del mistral["num_key_value_heads"]
    assert ModelSpec.from_hf_config(mistral).num_kv_heads == 8
    assert "the field is absent" in str(_refused(mistral | {"num_attention_heads": 4}, "num_key_value_heads"))
    assert ModelSpec.from_hf_config(mistral | {"num_key_value_heads": None}).num_kv_heads == 32


def test_head_dim_need_not_be_hidden_over_heads():
    spec = model_spec("Mistral-Nemo-12B-2407")
    assert (spec.hidden_size, spec.num_heads, spec.head_dim) == (5120, 32, 128)


def test_qwen2_window_is_off_unless_switched_on():
    config = model_config("Qwen2.5-7B")
    assert config["sliding_window"] == 131072
    assert ModelSpec.from_hf_config(config).sliding_window is None
    on = ModelSpec.from_hf_config(config | {"use_sliding_window": True, "max_window_layers": 21})
    assert on.layer_windows == (None,) * 21 + (131072,) * 7


def test_mistral_window_is_as_the_file_says():
    assert model_spec("Mistral-7B-v0.1").layer_windows == (4096,) * 32
    assert model_spec("Mistral-7B-v0.3").sliding_window is None
    silent = {key: value for key, value in model_config("Mistral-7B-v0.1").items() if key != "sliding_window"}
    assert ModelSpec.from_hf_config(silent).sliding_window == 4096  # transformers' default


def test_layer_types_win_and_must_cover_every_layer():
    config = model_config("Mistral-7B-v0.1")
    kinds = ["sliding_attention", "full_attention"] * 16
    assert ModelSpec.from_hf_config(config | {"layer_types": kinds}).num_sliding_layers == 16
    _refused(config | {"layer_types": kinds[:-1]}, "layer_types")
    _refused(config | {"layer_types": [[]] * 32}, "layer_types")


def test_biases_and_norms_count_by_family():
    plain = parameter_count(ModelSpec.from_hf_config(LLAMA)).total
    biased = parameter_count(ModelSpec.from_hf_config(LLAMA | {"attention_bias": True, "mlp_bias": True})).total
    assert biased - plain == 32 * (4096 + 2 * 1024 + 4096 + 2 * 14336 + 4096)
    qwen2, qwen3 = model_spec("Qwen2.5-7B"), model_spec("Qwen3-8B")
    assert (qwen2.attention_bias, qwen2.attention_output_bias, qwen2.qk_norm) == (True, False, False)
    assert (qwen3.attention_bias, qwen3.attention_output_bias, qwen3.qk_norm) == (False, False, True)
    assert parameter_count(qwen3).norms == (2 * 36 + 1) * 4096 + 2 * 36 * 128


def test_catalog_names_are_found_in_many_spellings_and_near_misses_are_offered():
    for name in ("meta-llama/Meta-Llama-3.1-8B-Instruct", "llama-3.1-8b", "Llama_3.1_8B"):
        assert model_spec(name) is not None
        assert model_spec(name).name == "Llama-3.1-8B"
    with pytest.raises(ConfigError) as problem:
        model_spec("Llama-3.1-9B")
    assert "Llama-3.1-8B" in str(problem.value.remedy)


def test_experts_of_every_other_layer_and_first_dense_layers_are_placed_as_the_file_says():
    dense_first = model_spec("DeepSeek-V3")
    assert dense_first.pattern[:5] == (0, 0, 0, 1, 1)
    step = ModelSpec.from_hf_config(model_config("Qwen3-30B-A3B") | {"decoder_sparse_step": 2, "mlp_only_layers": [1]})
    assert [step.kinds[index].mlp.active_width for index in step.pattern[:4]] == [6144, 6144, 6144, 8 * 768]


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("Mixtral-8x7B-v0.1", "num_experts_per_tok", 9),
        ("Mixtral-8x7B-v0.1", "num_local_experts", 0),
        ("DeepSeek-V3", "kv_lora_rank", -1),
        ("DeepSeek-V3", "qk_rope_head_dim", "64"),
        ("Qwen3-Next-80B-A3B", "linear_num_key_heads", 0),
        ("Nemotron-H-8B", "hybrid_override_pattern", "MXM"),
        ("Nemotron-H-8B", "hybrid_override_pattern", "M-*"),
        ("Qwen3-30B-A3B", "mlp_only_layers", "none"),
        ("Gemma-3-4b", "text_config", None),
        ("Falcon-40b", "num_kv_heads", 7),
    ],
)
def test_nonsense_in_a_family_of_its_own_is_named(name: str, field: str, value):
    _refused(model_config(name) | {field: value}, field)


def test_quantized_checkpoints_are_planned_in_their_own_format_and_unknown_ones_are_remarked():
    assert model_spec("gpt-oss-20b").checkpoint_format == "mxfp4"
    assert model_spec("DeepSeek-V3").checkpoint_format == "fp8-block"
    odd = ModelSpec.from_hf_config(LLAMA | {"quantization_config": {"quant_method": "mystery"}})
    assert odd.checkpoint_format is None
    assert "not understood" in " ".join(odd.notes)


def test_what_a_multimodal_count_leaves_out_is_said():
    assert "image encoder and its projector of 423,060,336 parameters" in " ".join(model_spec("Gemma-3-27b").notes)
    assert "image encoder and its projector are left out" in " ".join(model_spec("Llama-4-Scout-17B-16E").notes)
    assert "multi-token prediction" in " ".join(model_spec("DeepSeek-V3").notes)


def test_number_of_experts_is_found_under_either_name_and_never_assumed():
    config = model_config("Qwen3-30B-A3B")
    count = config.pop("num_experts")
    renamed = ModelSpec.from_hf_config(config | {"num_local_experts": 16})
    published = ModelSpec.from_hf_config(config | {"num_experts": count})
    assert parameter_count(renamed).experts * 8 == parameter_count(published).experts
    _refused(config, "num_experts")
