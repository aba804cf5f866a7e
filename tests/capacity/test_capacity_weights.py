"""Parameters and weight bytes against published counts."""

from __future__ import annotations

import csv
import importlib.resources

import pytest

from engine.capacity import model_names, model_spec, parameter_count
from engine.capacity.model.sharding import pipeline_stages
from engine.errors import ConfigError
from tests.capacity.by_name import kv_bytes_per_block, kv_bytes_per_token, lora_bytes, weight_bytes


def published() -> list[dict[str, str]]:
    """The bundled table of published counts."""
    text = (importlib.resources.files("engine.capacity") / "data" / "published.csv").read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


PUBLISHED = {row["model"]: int(row["parameters"]) for row in published()}
KV_BYTES = {
    row["model"]: int(row["kv_bytes_per_token_16bit"]) for row in published() if row["kv_bytes_per_token_16bit"]
}
# Active parameters in billions, as model cards and papers state them, and how far rounding may be off.
ACTIVE = {
    "Mixtral-8x7B-v0.1": 12.9,
    "Mixtral-8x22B-v0.1": 39,
    "Qwen3-30B-A3B": 3.3,
    "Qwen3-235B-A22B": 22,
    "Qwen1.5-MoE-A2.7B": 2.7,
    "Qwen2-57B-A14B": 14,
    "DeepSeek-V2": 21,
    "DeepSeek-V3": 37,
    "Kimi-K2": 32,
    "Phi-3.5-MoE": 6.6,
    "Granite-4.0-h-small": 9,
    "Llama-4-Scout-17B-16E": 17,
    "Llama-4-Maverick-17B-128E": 17,
}


def test_enough_published_counts_are_checked():
    assert len(model_names()) >= 40
    assert len(PUBLISHED) >= 25
    assert len(KV_BYTES) >= 12
    assert all(row["source"] for row in published())


@pytest.mark.parametrize(("name", "parameters"), PUBLISHED.items())
def test_parameter_count_is_the_published_one(name: str, parameters: int):
    assert parameter_count(model_spec(name)).total == parameters


@pytest.mark.parametrize(("name", "size"), KV_BYTES.items())
def test_kv_bytes_per_token_are_exact(name: str, size: int):
    spec = model_spec(name)
    assert kv_bytes_per_token(spec, "bf16") == size
    assert kv_bytes_per_token(spec, "fp8") == size // 2
    assert kv_bytes_per_block(spec, 16, "bf16") == 16 * size


@pytest.mark.parametrize(("name", "billions"), ACTIVE.items())
def test_active_parameters_are_those_of_the_model_card(name: str, billions: float):
    assert parameter_count(model_spec(name)).active / 1e9 == pytest.approx(billions, rel=0.035)


@pytest.mark.parametrize("name", model_names())
def test_parts_add_up_and_bytes_follow_the_count(name: str):
    spec = model_spec(name)
    count = parameter_count(spec)
    assert sum(count.by_part().values()) == count.total
    assert count.active == count.total or spec.is_mixture
    assert count.active <= count.total
    assert weight_bytes(spec, "bf16") == 2 * count.total
    assert weight_bytes(spec, "float32") == 4 * count.total


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


@pytest.mark.parametrize("name", ["int3", "int4-g7", "", "int4-g", "q4_k_xl", "int4-g9999"])
def test_unknown_weight_format_is_refused_with_the_choices(name: str):
    with pytest.raises(ConfigError) as problem:
        weight_bytes(model_spec("SmolLM2-135M"), name)
    assert problem.value.field == "weights"
    assert "int4-g128" in str(problem.value.remedy)


def test_mixture_quantized_in_mxfp4_leaves_everything_but_experts_alone():
    # Model card of gpt-oss: checkpoints of 12.8 and 60.8 GiB.
    for name, size in (("gpt-oss-20b", 12.8), ("gpt-oss-120b", 60.8)):
        assert weight_bytes(model_spec(name), "mxfp4") / 2**30 == pytest.approx(size, abs=0.05)
        assert model_spec(name).checkpoint_format == "mxfp4"


def test_four_bit_floats_cost_their_published_bits_a_weight():
    spec = model_spec("Llama-3.1-8B")
    count = parameter_count(spec)
    matrices, rest = count.attention + count.mlp, count.total - count.attention - count.mlp
    assert weight_bytes(spec, "mxfp4") == matrices * 4.25 / 8 + 2 * rest
    assert weight_bytes(spec, "nvfp4") == matrices * 4.5 / 8 + 2 * rest


@pytest.mark.parametrize(("name", "bits"), [("q4_k", 4.5), ("q6_k", 6.5625), ("q8_0", 8.5), ("q4_0", 4.5)])
def test_gguf_types_quantize_embedding_too_and_keep_vectors_in_float32(name: str, bits: float):
    spec = model_spec("Qwen3-8B")
    count = parameter_count(spec)
    matrices = count.total - count.norms - count.head
    head = count.head * max(bits, 6.5625) / 8  # llama.cpp keeps the head in Q6_K at least
    assert weight_bytes(spec, name) == pytest.approx(matrices * bits / 8 + head + 4 * count.norms, rel=0.002)


@pytest.mark.parametrize(("name", "gigabytes"), [("Llama-3.1-8B", 4.92), ("Qwen3-8B", 5.03), ("Mistral-7B-v0.3", 4.37)])
def test_q4_k_m_is_the_size_of_published_files(name: str, gigabytes: float):
    assert weight_bytes(model_spec(name), "q4_k_m") / 1e9 == pytest.approx(gigabytes, rel=0.015)


def test_q4_k_m_is_the_size_that_llama_cpp_reports_to_the_byte():
    assert weight_bytes(model_spec("Phi-4"), "q4_k_m") == 8_886_743_040


def test_experts_are_distributed_whole_or_split_and_cost_the_same():
    spec = model_spec("Qwen3-30B-A3B")
    split, whole = (weight_bytes(spec, "bf16", tp=4, ep=ep) for ep in (1, 4))
    assert split == whole
    count = parameter_count(spec)
    assert whole < 2 * (count.total // 4 + count.router + count.norms + count.attention)


def test_latent_attention_keeps_its_down_projections_on_every_gpu():
    spec = model_spec("DeepSeek-V2-Lite")
    count = parameter_count(spec)
    assert weight_bytes(spec, "bf16", tp=8) > 2 * (count.total // 8)


def test_adapters_cost_rank_times_inputs_and_outputs():
    spec = model_spec("Llama-3.1-8B")
    one = lora_bytes(spec, 16, 1, "bf16")
    assert lora_bytes(spec, 32, 3, "bf16") == 6 * one
    assert lora_bytes(spec, 16, 1, "bf16", tp=4) < one
