"""Deployments in full: cost, headroom, limits, the solver, documents, commands; and nothing but explained errors."""

from __future__ import annotations

import dataclasses
import json
import math
import shlex

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.capacity import (
    Goal,
    Objectives,
    PlannedWorkload,
    PlanRequest,
    as_json,
    as_markdown,
    as_yaml,
    compare_documents,
    custom_gpu,
    deploy,
    find_gpu,
    gpus,
    launch_commands,
    model_names,
    model_spec,
    pareto,
    plan,
    plan_document,
    sensitivity,
    solve,
)
from engine.capacity.advice.solver import candidates, reaches
from engine.errors import ConfigError, HeadroomError
from tests.capacity.by_name import kv_bytes_per_sequence

H100 = find_gpu("H100 SXM 80GB")
CHAT = PlannedWorkload(1024, 256, 0.5, 0.5)
WANTED = Objectives(ttft_s=0.5, tpot_s=0.05)


def _request(name: str = "Llama-3.1-8B", **options) -> PlanRequest:
    return PlanRequest(model_spec(name), options.pop("gpu", H100), context=options.pop("context", 2048), **options)


def test_a_load_near_saturation_carries_a_warning_and_a_comfortable_one_does_not():
    capacity = deploy(_request(), CHAT, rate=1.0).serving.capacity()
    for share, warned in ((0.5, False), (0.95, True)):
        document = plan_document(deploy(_request(), CHAT, rate=share * capacity))
        assert any("Leave headroom" in line for line in document["warnings"]) is warned


# -- memory beyond weights and cache -----------------------------------------------------------------------------


def test_shared_prefix_is_held_once():
    alone = plan(_request(concurrency=10))
    shared = plan(_request(concurrency=10, shared_prefix=1024))
    block = alone.kv_bytes_per_block
    assert alone.kv_bytes_needed == 10 * 128 * block
    assert shared.kv_bytes_needed == 64 * block + 10 * 64 * block
    assert shared.max_concurrency > 1.9 * alone.max_concurrency


def test_adapters_and_draft_model_take_memory_of_their_own():
    plain = plan(_request())
    both = plan(_request(lora_adapters=8, lora_rank=32, draft=model_spec("Llama-3.2-1B")))
    assert both.memory.adapters > 8 * 80e6
    assert both.memory.draft > 2 * model_spec("Llama-3.2-1B").vocab_size
    assert both.kv_bytes_per_block == plain.kv_bytes_per_block + 16 * 32_768
    memory = both.memory
    parts = (memory.weights, memory.adapters, memory.draft, memory.activation, memory.non_torch, memory.kv)
    assert sum(parts) + memory.unused + memory.reserved == memory.capacity


def test_hybrid_counts_its_state_for_every_sequence():
    answer = plan(_request("Nemotron-H-8B"))
    assert answer.state_bytes_per_sequence > 100e6
    assert answer.kv_bytes_per_sequence == answer.state_bytes_per_sequence + 2048 * 16_384


def test_copies_share_the_users_and_hold_more_of_them():
    one, two = plan(_request(concurrency=100)), plan(_request(concurrency=100, dp=2))
    assert two.max_concurrency == 2 * one.max_concurrency
    assert two.kv_bytes_needed == one.kv_bytes_needed // 2


def test_layers_in_groups_cost_vllm_the_padding_and_ours_nothing():
    ours, vllm = (plan(_request("Gemma-3-27b", profile=profile)) for profile in ("headroom", "vllm-0.19"))
    assert ours.kv_bytes_per_block * 70 == vllm.kv_bytes_per_block * 62


def test_transformers_caches_latent_attention_in_full():
    request = _request("DeepSeek-V2-Lite", profile="transformers")
    answer = plan(request)
    assert answer.kv_bytes_per_token == 27 * 16 * (192 + 128) * 2
    assert kv_bytes_per_sequence(request.spec, 2048, 1, "bf16") < answer.kv_bytes_per_sequence
    assert any("not the latent" in line for line in answer.warnings)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"ep": 2}, "ep"),
        ({"dp": 0}, "dp"),
        ({"shared_prefix": 2048}, "shared_prefix"),
        ({"lora_adapters": -1}, "lora_adapters"),
        ({"lora_rank": 0}, "lora_rank"),
        ({"draft": model_spec("Qwen3-0.6B")}, "draft"),
    ],
)
def test_impossible_extras_are_told_with_what_would_work(options, field: str):
    with pytest.raises(ConfigError) as problem:
        plan(_request(**options))
    assert problem.value.field == field
    assert problem.value.remedy


# -- a deployment ------------------------------------------------------------------------------------------------


def test_cost_is_hours_over_tokens():
    answer = deploy(_request(concurrency=64), CHAT, WANTED, price=2.5)
    assert answer.point is not None
    assert answer.cost.per_hour == 2.5
    assert answer.cost.per_million_output_tokens == pytest.approx(2.5 / (answer.point.output_tokens_s * 3600) * 1e6)
    assert answer.cost.kwh_per_million_output_tokens is not None


def test_headroom_is_what_is_left_of_the_largest_load():
    answer = deploy(_request(), CHAT, WANTED, rate=5.0)
    assert answer.best is not None
    assert answer.headroom == pytest.approx(1 - 5.0 / answer.best.rate)
    assert answer.meets
    assert deploy(_request(), CHAT, WANTED, rate=answer.best.rate * 1.2).headroom < 0


@pytest.mark.parametrize(
    ("objectives", "options", "says"),
    [
        (Objectives(tpot_s=0.015), {}, "time per output token"),
        (Objectives(ttft_s=0.03), {}, "time to first token"),
        (Objectives(), {"max_num_seqs": 8}, "max_num_seqs"),
        (Objectives(), {"gpu": find_gpu("L4")}, "memory for the KV cache"),
    ],
)
def test_what_breaks_first_is_named(objectives, options, says: str):
    assert says in deploy(_request(**options), CHAT, objectives, rate=0.1).first_limit


def test_unknown_speeds_leave_latency_open_and_say_so():
    answer = deploy(_request(gpu=custom_gpu("box", 40.0)), CHAT)
    assert answer.point is None
    assert answer.fits
    document = json.loads(as_json(plan_document(answer)))
    assert document["latency"]["tpot_ms"] is None
    assert any("not known" in line for line in document["warnings"])


def test_sensitivity_is_ranked_and_moves_the_right_way():
    swings = sensitivity(deploy(_request(), CHAT, WANTED, rate=5.0))
    assert [swing.width for swing in swings] == sorted((swing.width for swing in swings), reverse=True)
    by_name = {swing.name: swing for swing in swings}
    assert by_name["prompt length"].low > by_name["prompt length"].high
    assert by_name["arithmetic efficiency"].low < by_name["arithmetic efficiency"].high
    assert by_name["prefix cache hits"].high > by_name["prefix cache hits"].low


def test_pareto_trades_speed_of_a_user_for_throughput():
    points = [point for point in pareto(_request(), CHAT) if point.best]
    ordered = sorted(points, key=lambda point: point.tokens_s_per_user)
    throughput = [point.tokens_s_per_gpu for point in ordered]
    assert throughput == sorted(throughput, reverse=True)


# -- the solver --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "rate"), [("Llama-3.1-8B", 40.0), ("Llama-3.1-70B", 6.0), ("Qwen3-30B-A3B", 30.0)])
@pytest.mark.parametrize("gpu", ["H100 SXM 80GB", "L40S 48GB"])
def test_solution_reaches_the_goal_and_one_gpu_fewer_does_not(name: str, rate: float, gpu: str):
    device = find_gpu(gpu)
    goal = Goal(_request(name), CHAT, WANTED, rate, (device,))
    found = solve(goal)
    if not found:
        assert not any(reaches(dataclasses.replace(one, dp=8), goal) for one in candidates(goal, device))
        return
    (solution,) = found
    assert reaches(solution.request, goal)
    assert solution.point.meets(WANTED)
    fewer = solution.gpus - 1
    smaller = [dataclasses.replace(one, dp=fewer // one.tp) for one in candidates(goal, device) if one.tp <= fewer]
    assert not any(reaches(one, goal) for one in smaller)


def test_solutions_are_ranked_by_cost_and_prices_can_be_changed():
    devices = tuple(find_gpu(name) for name in ("H100 SXM", "L40S", "A100 SXM"))
    goal = Goal(_request(), CHAT, WANTED, 10.0, devices)
    costs = [item.cost.per_hour for item in solve(goal)]
    assert costs == sorted(costs)
    free = solve(dataclasses.replace(goal, prices=(("A100 SXM 80GB", 0.01),)))
    assert free[0].request.gpu.name == "A100 SXM 80GB"


def test_goal_that_nothing_reaches_has_no_solution():
    assert solve(Goal(_request(), CHAT, Objectives(ttft_s=1e-6), 1.0, gpus())) == ()


# -- documents ---------------------------------------------------------------------------------------------------


def test_documents_say_the_same_in_every_form():
    document = plan_document(deploy(_request(concurrency=8), CHAT, WANTED), "Chat")
    assert json.loads(as_json(document)) == yaml.safe_load(as_yaml(document))
    page = as_markdown(document)
    assert page.startswith("# Chat")
    assert "vllm serve" in page
    assert "| TTFT p95, ms |" in page


def test_two_plans_are_compared_figure_by_figure():
    small, large = (plan_document(deploy(_request(dp=dp, concurrency=8), CHAT)) for dp in (1, 2))
    rows = {row["figure"]: row for row in compare_documents(small, large)}
    assert rows["GPUs"]["change"] == pytest.approx(1.0)
    assert rows["GPUs"]["better"] is False
    assert rows["requests at once"]["better"] is True


def test_launch_commands_carry_the_plan():
    full = plan(_request("Llama-3.1-70B", tp=4, pp=2, kv_dtype="fp8", weights="fp8", max_num_seqs=77)).request
    vllm, sglang, ours = (shlex.split(item.command) for item in launch_commands(full, CHAT))
    assert vllm[:3] == ["vllm", "serve", "Llama-3.1-70B"]
    for flag, value in (("--tensor-parallel-size", "4"), ("--pipeline-parallel-size", "2"), ("--max-num-seqs", "77")):
        assert vllm[vllm.index(flag) + 1] == value
    assert sglang[sglang.index("--tp") + 1] == "4"
    assert "max_num_seqs=77" in ours
    assert any("one GPU" in remark for remark in launch_commands(full, CHAT)[2].remarks)


def test_our_own_launch_command_is_one_the_engine_understands():
    from engine.config import EngineConfig, parse_assignments

    full = plan(_request(weights="int4-g64", kv_dtype="int8", profile="headroom")).request
    words = shlex.split(launch_commands(full, dataclasses.replace(CHAT, draft_length=4))[2].command)
    settings_given = [words[index + 1] for index, word in enumerate(words) if word == "--set"]
    config = EngineConfig.from_mapping(parse_assignments(settings_given))
    assert (config.weights, int(config.group_size), config.speculation) == ("int4", 64, "ngram")
    assert config.kv_dtype == "int8"


# -- anything at all ---------------------------------------------------------------------------------------------

numbers = st.none() | st.booleans() | st.integers(-5, 10**7) | st.floats(allow_nan=True, allow_infinity=True)
fields = st.fixed_dictionaries(
    {},
    optional={
        "tp": st.integers(-1, 9),
        "pp": st.integers(0, 5),
        "dp": st.integers(0, 5),
        "ep": st.integers(0, 9),
        "context": st.integers(-1, 300_000) | st.none(),
        "concurrency": st.integers(0, 10**5),
        "max_num_seqs": st.integers(0, 10**5) | st.none(),
        "weights": st.sampled_from(["auto", "bf16", "fp8", "int4-g128", "mxfp4", "q4_k_m", "nonsense"]),
        "kv_dtype": st.sampled_from(["auto", "fp8", "int4", "nonsense"]),
        "profile": st.sampled_from(["vllm-0.19", "vllm-0.6", "headroom", "transformers", "tgi"]),
        "shared_prefix": st.integers(-1, 5000),
        "lora_adapters": st.integers(-1, 50),
        "utilization": st.floats(-0.5, 1.5),
    },
)
works = st.fixed_dictionaries(
    {"input_tokens": numbers, "output_tokens": numbers},
    optional={
        "input_cv": st.floats(0, 3) | numbers,
        "burstiness": st.floats(0, 20) | numbers,
        "prefix_hit_rate": st.floats(0, 1) | numbers,
        "draft_length": st.integers(0, 20) | numbers,
        "acceptance": st.floats(0, 1) | numbers,
    },
)
sane = st.builds(PlannedWorkload, st.integers(1, 5000), st.integers(1, 2000), st.floats(0, 2), st.floats(0, 2))


def _check_explained(problem: HeadroomError) -> None:
    assert problem.field
    assert problem.remedy


@given(
    st.sampled_from(model_names()),
    st.sampled_from(gpus()),
    fields,
    works.map(lambda values: PlannedWorkload(**values)) | sane,
    st.none() | st.floats(0.001, 1e5) | numbers,
    st.none() | st.floats(0.0001, 100),
)
@settings(max_examples=250, deadline=None)
def test_any_goal_gives_a_finite_document_or_an_explained_error(name, gpu, options, work, rate, slo):
    try:
        answer = deploy(PlanRequest(model_spec(name), gpu, **options), work, Objectives(slo, slo), rate)
        text = as_json(plan_document(answer))
        sensitivity(answer)
    except HeadroomError as problem:
        _check_explained(problem)
        return
    document = json.loads(text)
    memory = document["memory"]["bytes"]
    taken = sum(memory[part] for part in memory if part not in ("capacity", "excess"))
    assert taken == memory["capacity"] + memory["excess"]
    if answer.point is not None and answer.point.stable:
        assert 0 < answer.point.tpot_s < math.inf
        assert answer.point.ttft_p50_s <= answer.point.ttft_p95_s * 1.001
