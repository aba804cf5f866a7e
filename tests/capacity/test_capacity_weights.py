"""Parameters and weight bytes against published counts."""

from __future__ import annotations

import pytest

from engine.capacity import model_names, model_spec, parameter_count, weight_bytes
from engine.capacity.parallel import pipeline_stages
from engine.errors import ConfigError

# Total parameters as the repositories' safetensors indexes and model cards state them.
PUBLISHED = {
    "Llama-2-7b": 6_738_415_616,
    "Llama-2-13b": 13_015_864_320,
    "Llama-2-70b": 68_976_648_192,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.1-70B": 70_553_706_496,
    "Llama-3.1-405B": 405_853_388_800,
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.2-3B": 3_212_749_824,
    "TinyLlama-1.1B": 1_100_048_384,
    "SmolLM2-135M": 134_515_008,
    "SmolLM2-360M": 361_821_120,
    "SmolLM2-1.7B": 1_711_376_384,
    "Mistral-7B-v0.1": 7_241_732_096,
    "Mistral-7B-v0.3": 7_248_023_552,
    "Mistral-Nemo-12B-2407": 12_247_782_400,
    "Mistral-Small-24B-2501": 23_572_403_200,
    "Mistral-Large-123B-2407": 122_610_069_504,
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-1.5B": 1_543_714_304,
    "Qwen2.5-3B": 3_085_938_688,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-14B": 14_770_033_664,
    "Qwen2.5-32B": 32_763_876_352,
    "Qwen2.5-72B": 72_706_203_648,
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-1.7B": 1_720_574_976,
    "Qwen3-4B": 4_022_468_096,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-14B": 14_768_307_200,
    "Qwen3-32B": 32_762_123_264,
}


@pytest.mark.parametrize(("name", "parameters"), PUBLISHED.items())
def test_parameter_count_is_the_published_one(name: str, parameters: int):
    assert parameter_count(model_spec(name)).total == parameters


@pytest.mark.parametrize("name", model_names())
def test_parts_add_up_and_bytes_follow_the_count(name: str):
    count = parameter_count(model_spec(name))
    assert sum(count.by_part().values()) == count.total == count.active
    assert weight_bytes(model_spec(name), "bf16") == 2 * count.total
    assert weight_bytes(model_spec(name), "float32") == 4 * count.total


def test_int4_with_groups_costs_scales_and_zero_points_and_leaves_the_rest_alone():
    spec = model_spec("Llama-3.1-8B")
    count = parameter_count(spec)
    matrices = count.attention + count.mlp
    rest = count.total - matrices
    for group in (32, 64, 128):
        expected = matrices * (0.5 + 2.5 / group) + 2 * rest
        assert weight_bytes(spec, f"int4-g{group}") == expected
    # The AWQ checkpoint hugging-quants/Meta-Llama-3.1-8B-Instruct-AWQ-INT4 (group 128) is 5.73 GB on disk.
    assert weight_bytes(spec, "int4-g128") == pytest.approx(5.73e9, rel=0.01)


def test_eight_bit_formats_cost_a_byte_a_weight_and_a_scale_a_channel():
    spec = model_spec("Llama-3.1-8B")
    count = parameter_count(spec)
    matrices = count.attention + count.mlp
    channels = spec.num_layers * (4096 + 2 * 1024 + 4096 + 2 * 14336 + 4096)
    assert weight_bytes(spec, "int8") == matrices + 2 * channels + 2 * (count.total - matrices)
    assert weight_bytes(spec, "fp8") == matrices + 4 * channels + 2 * (count.total - matrices)


def test_tensor_parallel_splits_matrices_but_not_norms():
    spec = model_spec("Llama-3.1-70B")
    count = parameter_count(spec)
    assert weight_bytes(spec, "bf16", tp=4) == 2 * ((count.total - count.norms) // 4 + count.norms)


def test_kv_projection_is_replicated_beyond_its_heads():
    spec = model_spec("Llama-3.1-405B")
    count = parameter_count(spec)
    one_kv_head = 2 * spec.head_dim * spec.hidden_size * spec.num_layers
    # 16 GPUs share 8 key/value heads: each holds a whole one, half a head more than an even split would give.
    even = (count.total - count.norms) // 16 + count.norms
    assert weight_bytes(spec, "bf16", tp=16) == 2 * (even + one_kv_head // 2)


@pytest.mark.parametrize("name", ["Llama-3.1-405B", "Qwen3-8B", "SmolLM2-135M"])
def test_pipeline_stages_hold_the_model_once_and_a_copy_of_a_tied_head(name: str):
    spec = model_spec(name)
    stages = pipeline_stages(spec.num_layers, 4)
    held = sum(weight_bytes(spec, "bf16", stage=stage) for stage in stages)
    copy = 2 * spec.vocab_size * spec.hidden_size if spec.tie_word_embeddings else 0
    assert held == weight_bytes(spec, "bf16") + copy
    assert [stage.start for stage in stages[1:]] == [stage.stop for stage in stages[:-1]]


@pytest.mark.parametrize("name", ["int3", "int4-g7", "", "int4-g", "q4_k_m", "int4-g9999"])
def test_unknown_weight_format_is_refused_with_the_choices(name: str):
    with pytest.raises(ConfigError) as problem:
        weight_bytes(model_spec("SmolLM2-135M"), name)
    assert problem.value.field == "weights"
    assert "int4-g128" in str(problem.value.remedy)
