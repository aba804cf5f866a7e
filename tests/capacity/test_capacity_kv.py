"""KV cache bytes, and the published formula beside the right one."""

from __future__ import annotations

from typing import Any

import pytest

from engine.capacity import (
    CompleteRequest,
    ModelSpec,
    PlanRequest,
    check_holds_a_block,
    complete,
    custom_gpu,
    memory_budget,
    model_config,
    model_spec,
)
from engine.capacity.formats import BFLOAT16
from engine.capacity.memory.kv import state_bytes_per_sequence
from engine.capacity.text import gib
from engine.errors import CapacityError, ConfigError
from tests.capacity.by_name import compare_kv_formulas, kv_bytes_per_block, kv_bytes_per_sequence, kv_bytes_per_token


def test_tensor_parallel_divides_heads_and_replicates_beyond_them():
    spec = model_spec("Llama-3.1-70B")
    assert [kv_bytes_per_token(spec, "bf16", tp) for tp in (1, 2, 4, 8, 16)] == [327680, 163840, 81920, 40960, 40960]
    assert kv_bytes_per_token(model_spec("Qwen2.5-7B"), "bf16", tp=3) == 57344 * 2 // 4  # 4 heads on 3 GPUs: 2 on one


def test_quantized_cache_pays_for_its_scales():
    spec = model_spec("Llama-3.1-8B")  # 32 layers, 8 heads of 128
    heads = 2 * 32 * 8
    assert kv_bytes_per_token(spec, "int8") == heads * (128 + 4)
    assert kv_bytes_per_token(spec, "int4") == heads * (64 + 4)


def test_published_formula_stands_beside_the_right_one_with_its_errors_named():
    both = compare_kv_formulas(model_spec("Llama-3.1-8B"), 1000, 16, "bf16", tp=2)
    assert both.published.bytes == 2 * 32 * 32 * 128 * 1000 * 2
    assert both.corrected.bytes == 2 * 32 * 4 * 128 * 1008 * 2
    text = " ".join(both.errors)
    assert "4× too much" in text
    assert "2 GPUs share the heads: each keeps 4" in text
    assert "1,000 tokens occupy 1,008" in text


def test_formulas_agree_for_multi_head_attention_on_one_gpu_in_whole_blocks():
    both = compare_kv_formulas(model_spec("Llama-2-7b"), 4096, 16, "fp16")
    assert both.published.bytes == both.corrected.bytes == 4096 * 524_288
    assert both.errors == ()


@pytest.mark.parametrize("kv_dtype", ["bf16", "fp8", "int8", "int4"])
@pytest.mark.parametrize("name", ["Mistral-7B-v0.1", "Llama-3.1-405B", "SmolLM2-135M"])
def test_substituted_factors_multiply_to_the_bytes_shown(name: str, kv_dtype: str):
    both = compare_kv_formulas(model_spec(name), 7777, 16, kv_dtype, tp=1)
    for formula in (both.published, both.corrected):
        total = 0.0
        for product in formula.products:
            value = 1.0
            for factor in product:
                value *= factor.value
            total += value
        assert total == pytest.approx(formula.bytes, abs=1)


def test_sliding_window_bounds_a_sequence_only_where_the_engine_frees_blocks():
    spec = model_spec("Mistral-7B-v0.1")
    assert spec.sliding_window == 4096
    assert kv_bytes_per_sequence(spec, 32768, 16) == 4096 * 131_072
    assert kv_bytes_per_sequence(spec, 32768, 16, frees_windows=False) == 32768 * 131_072
    assert kv_bytes_per_sequence(spec, 100, 16) == 112 * 131_072


def test_layers_with_and_without_a_window_are_counted_apart():
    config = model_config("Qwen2.5-7B") | {"use_sliding_window": True, "sliding_window": 1024, "max_window_layers": 20}
    spec = ModelSpec.from_hf_config(config)
    assert spec.num_sliding_layers == 8
    layer = 57_344 // 28
    assert kv_bytes_per_sequence(spec, 4096, 16) == layer * (20 * 4096 + 8 * 1024)
    both = compare_kv_formulas(spec, 4096, 16)
    assert len(both.corrected.products) == 2
    assert "8 of 28 layers see only the last 1,024 tokens" in " ".join(both.errors)


def _of_a_gpu(limit_bytes: int, name: str = "SmolLM2-135M", **options: Any) -> CompleteRequest:
    """A deployment of this engine to which one GPU gives that many bytes."""
    gpu = custom_gpu("a GPU", limit_bytes / 2**30)
    return complete(PlanRequest(model_spec(name), gpu, profile="headroom", utilization=1.0, **options))


def test_cache_is_whole_blocks_and_never_above_the_limit():
    block = kv_bytes_per_block(model_spec("SmolLM2-135M"), 16, "float32")
    taken = memory_budget(_of_a_gpu(2**30, dtype="float32")).activation + 600
    request = _of_a_gpu(taken + 10 * block - 1, dtype="float32")
    budget = memory_budget(request, measured_weights=600)
    assert (budget.kv_blocks, budget.kv, budget.unused) == (9, 9 * block, block - 1)
    assert budget.fixed + budget.kv + budget.unused == budget.limit == request.gpu.usable_bytes


def test_cache_has_no_more_blocks_than_all_sequences_can_use():
    request = _of_a_gpu(2**40, context=100, max_num_seqs=3)
    assert memory_budget(request).kv_blocks == 3 * 7


def test_no_room_for_a_block_is_told_with_the_arithmetic():
    request = _of_a_gpu(16 * 2**30, "Llama-3.1-8B", token_budget=65536)
    budget = memory_budget(request, measured_weights=15 * 2**30)
    assert budget.kv_blocks == 0
    assert budget.excess > 0
    with pytest.raises(CapacityError) as caught:
        check_holds_a_block(request, budget)
    text = str(caught.value)
    assert f"16.00 GiB do not hold 15.00 GiB of weights, {gib(budget.activation)} of activations and one KV" in text
    assert f"{gib(budget.excess + 2**21)} missing" in text
    assert caught.value.field == "memory_limit_gib"


def test_unknown_cache_format_is_refused_with_the_choices():
    with pytest.raises(ConfigError) as caught:
        kv_bytes_per_token(model_spec("SmolLM2-135M"), "int3")
    assert caught.value.field == "kv_dtype"


def test_latent_attention_is_cached_once_and_not_divided_by_tensor_parallelism():
    spec = model_spec("DeepSeek-V3")
    assert [kv_bytes_per_token(spec, "bf16", tp) for tp in (1, 8, 16)] == [70_272] * 3
    both = compare_kv_formulas(spec, 4096, 16, "bf16")
    assert both.corrected.bytes == 4096 * 70_272
    assert both.ratio > 20
    assert "one latent of 576 values" in " ".join(both.errors)


def test_hybrid_keeps_a_constant_state_and_caches_in_its_attention_layers_only():
    spec = model_spec("Nemotron-H-8B")
    assert spec.num_layers == 52
    assert spec.num_attention_layers == 4
    assert kv_bytes_per_token(spec, "bf16") == 4 * 2 * 8 * 128 * 2
    assert state_bytes_per_sequence(spec, BFLOAT16) == 24 * (128 * 64 * 128 * 4 + (128 * 64 + 2 * 8 * 128) * 3 * 2)
    assert state_bytes_per_sequence(model_spec("Llama-3.1-8B"), BFLOAT16) == 0
    assert "48 of 52 layers keep no keys and values" in " ".join(compare_kv_formulas(spec, 4096, 16).errors)


def test_alternating_windows_bound_half_of_the_layers():
    spec = model_spec("gpt-oss-20b")
    layer = 2 * 8 * 64 * 2
    assert spec.layer_windows[:4] == (128, None, 128, None)
    assert kv_bytes_per_sequence(spec, 8192, 16) == layer * 12 * (8192 + 128)
    gemma = model_spec("Gemma-3-27b")
    assert gemma.num_sliding_layers == 52
    assert kv_bytes_per_sequence(gemma, 32768, 16) == 2 * 16 * 128 * 2 * (10 * 32768 + 52 * 1024)
