"""Plans: budgets that add up, limits that hold, remedies that work, bad input that is explained."""

from __future__ import annotations

import dataclasses
import json

import pytest

from engine.capacity import (
    PROFILES,
    PlanRequest,
    concurrency_curve,
    find_gpu,
    gpus,
    model_spec,
    plan,
    plan_from_names,
    what_would_fit,
)
from engine.errors import ConfigError

H100 = find_gpu("H100 SXM 80GB")


def _request(model: str = "Llama-3.1-70B", **options) -> PlanRequest:
    return PlanRequest(model_spec(model), options.pop("gpu", H100), **options)


@pytest.mark.parametrize("profile", [profile.name for profile in PROFILES])
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (4, 1), (1, 4), (2, 3), (8, 2)])
def test_budget_adds_up_to_the_byte(profile: str, tp: int, pp: int):
    memory = plan(_request(tp=tp, pp=pp, profile=profile, context=4096)).memory
    parts = memory.weights + memory.activation + memory.non_torch + memory.kv + memory.unused + memory.reserved
    assert parts == memory.capacity + memory.excess
    assert memory.excess == 0 or memory.kv == memory.unused == 0


@pytest.mark.parametrize("profile", [profile.name for profile in PROFILES])
@pytest.mark.parametrize(("tp", "pp"), [(4, 1), (2, 3), (8, 1)])
def test_limits_fit_and_one_more_does_not(profile: str, tp: int, pp: int):
    request = _request(tp=tp, pp=pp, profile=profile, context=4096, concurrency=4, max_num_seqs=1000)
    answer = plan(request)
    assert answer.max_concurrency >= 4
    assert plan(dataclasses.replace(request, concurrency=answer.max_concurrency)).fits
    assert not plan(dataclasses.replace(request, concurrency=answer.max_concurrency + 1)).fits
    assert plan(dataclasses.replace(request, context=answer.max_context)).fits
    if answer.max_context < request.spec.max_position:
        assert not plan(dataclasses.replace(request, context=answer.max_context + 1)).fits


def test_json_has_the_contract_of_the_command_line():
    answer = json.loads(json.dumps(plan_from_names("Llama-3.1-8B", "H100 SXM 80GB", context=8192).to_dict()))
    assert answer["parameters"]["total"] == answer["parameters"]["active"] == 8_030_261_248
    assert sum(answer["parameters"]["by_part"].values()) == 8_030_261_248
    names = {"weights_gib", "activation_gib", "non_torch_gib", "kv_gib", "kv_bytes_per_token", "kv_tokens", "kv_blocks"}
    assert names <= answer["memory"].keys()
    assert answer["memory"]["kv_bytes_per_token"] == 131_072
    assert answer["limits"].keys() == {"max_concurrency", "max_context"}
    assert answer["fits"] is True
    assert answer["assumptions"]


def test_what_does_not_fit_says_by_how_much_and_every_remedy_is_verified():
    request = _request(context=8192, concurrency=16)
    answer = plan(request)
    assert not answer.fits
    memory = answer.memory
    assert answer.shortfall == memory.fixed + answer.kv_bytes_needed - memory.limit
    remedies = what_would_fit(request)
    assert [remedy.kind for remedy in remedies] == ["both", "tp_fp8", "tp", "gpu"]
    for remedy in remedies:
        fixed = plan(dataclasses.replace(request, **remedy.changes))
        assert fixed.fits
        assert remedy.spare_bytes == fixed.memory.kv - fixed.kv_bytes_needed
        json.dumps(remedy.to_dict())


def test_remedies_are_ranked_from_settings_to_smaller_goals():
    request = _request("Llama-3.1-8B", gpu=find_gpu("L4"), context=8192, concurrency=8)
    kinds = [remedy.kind for remedy in what_would_fit(request)]
    order = [
        "max_num_seqs",
        "utilization",
        "kv_dtype",
        "weights",
        "both",
        "tp_fp8",
        "tp",
        "gpu",
        "context",
        "concurrency",
    ]
    assert kinds == sorted(kinds, key=order.index)
    assert "context" in kinds
    assert "concurrency" in kinds


def test_the_larger_gpu_that_is_offered_is_the_smallest_that_fits():
    request = _request(context=8192, concurrency=16)
    (larger,) = [remedy for remedy in what_would_fit(request) if remedy.kind == "gpu"]
    chosen = larger.changes["gpu"]
    smaller = [gpu for gpu in gpus() if gpu.usable_gib < chosen.usable_gib]
    assert not any(plan(dataclasses.replace(request, gpu=gpu)).fits for gpu in smaller)


def test_nothing_is_proposed_where_the_goal_fits():
    assert what_would_fit(_request("Llama-3.1-8B", context=8192)) == ()


def test_pipeline_is_limited_by_its_fullest_stage():
    whole = plan(_request("Llama-3.1-405B", tp=8, pp=4, context=8192))
    assert whole.stage.num_layers in (31, 32)
    assert whole.kv_bytes_per_token == 2 * whole.stage.num_layers * 128 * 2
    assert whole.max_concurrency > 0


def test_our_engine_allocates_no_more_than_its_sequences_can_use():
    answer = plan(_request("SmolLM2-135M", profile="headroom", context=2048, max_num_seqs=8))
    assert answer.kv_blocks == 8 * 2048 // 16
    assert answer.max_concurrency == 8


@pytest.mark.parametrize(
    ("options", "field", "says"),
    [
        ({"tp": 0}, "tp", "from 1 to"),
        ({"tp": 3}, "tp", "1, 2, 4, 8, 16"),
        ({"tp": True}, "tp", "from 1 to"),
        ({"pp": 81}, "pp", "at most 80"),
        ({"context": 200_000}, "context", "at most 131,072"),
        ({"context": -1}, "context", "from 1"),
        ({"context": 10**50}, "context", "from 1"),
        ({"concurrency": 0}, "concurrency", "from 1"),
        ({"concurrency": 9, "max_num_seqs": 8}, "max_num_seqs", "at least 9"),
        ({"utilization": 0.0}, "utilization", "up to 1"),
        ({"utilization": 95}, "utilization", "up to 1"),
        ({"utilization": float("nan")}, "utilization", "up to 1"),
        ({"weights": "int3"}, "weights", "int4-g128"),
        ({"kv_dtype": "int3"}, "kv_dtype", "fp8"),
        ({"dtype": "int8"}, "dtype", "bfloat16"),
        ({"profile": "tgi"}, "profile", "vllm-0.19"),
        ({"block_size": 0}, "block_size", "from 1"),
    ],
)
def test_bad_input_is_told_with_what_would_work(options, field: str, says: str):
    with pytest.raises(ConfigError) as problem:
        plan(_request(**options))
    assert problem.value.field == field
    assert says in str(problem.value.remedy)


@pytest.mark.parametrize("memory", [0, -5, float("nan"), float("inf"), True, "80"])
def test_impossible_memory_is_refused(memory):
    with pytest.raises(ConfigError) as problem:
        plan_from_names("Llama-3.1-8B", "H100 SXM", gpu_memory_gib=memory)
    assert problem.value.field == "gpu_memory_gib"


def test_gpu_is_found_by_a_unique_beginning_and_near_misses_are_offered():
    assert find_gpu("h200").name == "H200 SXM 141GB"
    with pytest.raises(ConfigError) as problem:
        find_gpu("H100")
    assert "H100 SXM 80GB, H100 PCIe 80GB" in str(problem.value.remedy)
    with pytest.raises(ConfigError) as problem:
        find_gpu("H1000")
    assert problem.value.field == "gpu"
    assert plan_from_names("Llama-3.1-8B", "my card", gpu_memory_gib=40).request.gpu.usable_gib == 40


def test_estimates_and_missing_fp8_arithmetic_are_pointed_out():
    assert any("estimate" in line for line in plan(_request("Llama-3.1-8B", gpu=find_gpu("H200"))).warnings)
    lines = plan(_request("Llama-3.1-8B", gpu=find_gpu("A100 SXM"), weights="fp8")).warnings
    assert any("no FP8 arithmetic" in line for line in lines)


def test_8_bit_activations_are_warned_of_where_int8_is_slower_than_bf16():
    slow, quick = (
        plan(_request("Llama-3.1-8B", gpu=find_gpu(gpu), weights="w8a8")).warnings for gpu in ("B300", "A100 SXM")
    )
    assert any("150 TOPS" in line and "Choose FP8" in line for line in slow)
    assert not any("TOPS" in line for line in quick)


def test_limit_of_the_engine_below_that_of_memory_is_pointed_out():
    answer = plan(_request("Llama-3.1-8B", context=2048, max_num_seqs=16))
    assert answer.max_concurrency > 16
    assert any("raise max_num_seqs" in line for line in answer.warnings)


def test_our_engine_keeps_a_window_where_every_layer_has_one_and_everything_where_one_sees_all():
    def kept(model: str, context: int) -> int:
        return plan(_request(model, profile="headroom", context=context)).kv_bytes_per_sequence

    assert kept("Mistral-7B-v0.1", 16_384) == kept("Mistral-7B-v0.1", 4096) == 4096 * 131_072
    assert kept("Gemma-3-4b", 16_384) == 4 * kept("Gemma-3-4b", 4096)


def test_curve_begins_above_a_prefix_that_all_sequences_share():
    request = _request("Llama-3.1-8B", context=4096, shared_prefix=512)
    contexts = [point.context for point in concurrency_curve(request)]
    assert contexts[:2] == [1024, 2048]
    assert 4096 in contexts
