"""Times of steps and of requests under load: against published figures, simple bounds, and a simulation."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.capacity import Objectives, PlannedWorkload, PlanRequest, find_gpu, model_names, model_spec, plan
from engine.capacity.advice.deployment import slots_of
from engine.capacity.memory.request import complete
from engine.capacity.speed.queueing import Moments, erlang_c, mg1_wait
from engine.capacity.speed.roofline import Batch, StepModel, all_reduce_seconds, touched_experts
from engine.capacity.speed.serving import Serving, serving
from engine.capacity.speed.speculation import best_draft_length, expected_tokens, ideal_speedup, published_speedup
from tests.capacity.by_name import weight_bytes
from tests.capacity.serving_simulation import simulate, simulate_users

H100 = find_gpu("H100 SXM 80GB")


def _request(name: str = "Llama-3.1-8B", **options):
    return complete(PlanRequest(model_spec(name), options.pop("gpu", H100), **options))


def _serving(work: PlannedWorkload, name: str = "Llama-3.1-8B", **options) -> Serving:
    full = _request(name, context=8192, **options)
    made = serving(full, work, slots_of(full, work))
    assert made is not None
    return made


# -- a step ------------------------------------------------------------------------------------------------------


def test_decoding_one_sequence_takes_the_reading_of_the_weights_and_the_overhead():
    full = _request(context=8192)
    model = StepModel(full)
    read = weight_bytes(full.spec, "bf16") - 2 * full.spec.vocab_size * full.spec.hidden_size  # embedding: one row
    expected = read / model.bandwidth + 32 * 32e-6 + 4e-6 + 126e-6
    assert model.seconds(Batch(decodes=1, context=1)) == pytest.approx(expected, rel=0.01)


def test_long_prefill_takes_its_arithmetic():
    full = _request(context=131072)
    model = StepModel(full)
    tokens = 8192
    matrices = 2 * (7_504_924_672 - 525_336_576) * tokens  # all but embedding and head
    attention = 4 * 32 * 32 * 128 * tokens * tokens / 2
    expected = (matrices + attention) / model.peak_flops
    assert model.seconds(Batch(prefill=tokens)) == pytest.approx(expected, rel=0.08)


@pytest.mark.parametrize("name", model_names())
def test_operators_add_up_to_the_step_and_every_one_is_bounded(name: str):
    model = StepModel(_request(name, tp=1, context=2048))
    for batch in (Batch(1, 1000), Batch(64, 1500, 512, 100), Batch(prefill=2000)):
        operators = model.operators(batch)
        assert sum(item.seconds for item in operators) == pytest.approx(model.seconds(batch))
        assert all(item.seconds >= 0 for item in operators)
        assert {item.bound for item in operators} <= {"compute", "memory", "link", "overhead"}


@given(st.sampled_from(model_names()), st.floats(1, 500), st.floats(1, 2000), st.floats(0, 4000), st.floats(1, 3))
@settings(max_examples=80, deadline=None)
def test_steps_never_get_shorter_with_more_work(name: str, decodes, context, prefill, factor):
    model = StepModel(_request(name, context=2048))
    now = model.seconds(Batch(decodes, context, prefill))
    for more in (
        Batch(decodes * factor, context, prefill),
        Batch(decodes, context * factor, prefill),
        Batch(decodes, context, prefill * factor),
    ):
        assert model.seconds(more) >= now * (1 - 1e-9)


def test_smaller_weights_decode_faster_and_more_gpus_too():
    batch = Batch(decodes=8, context=1000)
    times = [StepModel(_request(context=8192, weights=form)).seconds(batch) for form in ("bf16", "fp8", "int4-g128")]
    assert times == sorted(times, reverse=True)
    several = [StepModel(_request("Llama-3.1-70B", context=8192, tp=tp)).seconds(batch) for tp in (1, 2, 4, 8)]
    assert several == sorted(several, reverse=True)
    assert several[0] / several[3] < 8


def test_a_prompt_runs_at_the_int8_rate_only_where_activations_have_8_bits_too():
    prompt = Batch(decodes=0, context=0, prefill=4096)
    a100 = find_gpu("A100 SXM")
    int8, w8a8 = (
        StepModel(_request(gpu=a100, context=8192, weights=form)).seconds(prompt) for form in ("int8", "w8a8")
    )
    assert 1.5 < int8 / w8a8 < 2


def test_mixture_reads_the_experts_that_are_chosen():
    assert touched_experts(128, 8, 1) == pytest.approx(8)
    for tokens in (1, 2, 16, 1000):
        assert touched_experts(128, 8, tokens) <= min(128, 8 * tokens) + 1e-9
    model = StepModel(_request("Qwen3-30B-A3B", context=2048))
    one, many = (
        next(item for item in model.operators(Batch(count, 100)) if item.name == "experts").bytes for count in (1, 256)
    )
    assert many / one > 10


def test_ring_all_reduce_costs_its_bytes_and_hops():
    assert all_reduce_seconds(450e9, 2, 450e9, 0.0) == pytest.approx(1.0)
    assert all_reduce_seconds(0.0, 8, 1.0, 1e-6) == pytest.approx(14e-6)


# -- queueing ----------------------------------------------------------------------------------------------------


def test_textbook_queues_have_their_textbook_waits():
    assert mg1_wait(0.8, 1.0, 2.0) == pytest.approx(4.0)  # M/M/1: ρ / (μ - λ)
    assert mg1_wait(0.8, 1.0, 1.0) == pytest.approx(2.0)  # M/D/1: half of it
    assert mg1_wait(1.0, 1.0, 1.0) == float("inf")
    assert erlang_c(5, 4.0) == pytest.approx(0.5541, abs=1e-4)


def test_percentiles_are_ordered_and_those_of_an_exponential_are_exact():
    exponential = Moments(3.0, 9.0)
    for share in (0.5, 0.9, 0.99):
        assert exponential.percentile(share) == pytest.approx(-3 * np.log(1 - share), rel=1e-6)
    assert Moments(2.0, 0.0).percentile(0.99) == 2.0


# The load is a share of what can be served at all; tolerances are relative, of (median TTFT, TTFT p95, mean TPOT, E2E
# p95).
CASES = {
    "chat, light": (PlannedWorkload(1024, 256, 0.5, 0.5), 0.2, {}, (0.1, 0.15, 0.05, 0.1)),
    "chat, half": (PlannedWorkload(1024, 256, 0.5, 0.5), 0.5, {}, (0.1, 0.2, 0.05, 0.1)),
    "chat, busy": (PlannedWorkload(1024, 256, 0.5, 0.5), 0.75, {}, (0.1, 0.2, 0.08, 0.1)),
    "chat, full": (PlannedWorkload(1024, 256, 0.5, 0.5), 0.9, {}, (0.15, 0.2, 0.12, 0.12)),
    "equal lengths, short answers": (PlannedWorkload(1024, 64), 0.5, {}, (0.25, 0.3, 0.1, 0.12)),
    "long prompts in chunks": (
        PlannedWorkload(6000, 128, 0.3, 0.3),
        0.4,
        {"token_budget": 2048},
        (0.25, 0.3, 0.15, 0.2),
    ),
    "in bursts": (PlannedWorkload(1024, 256, 0.5, 0.5, burstiness=4.0), 0.5, {}, (0.35, 0.3, 0.15, 0.15)),
    "few slots": (PlannedWorkload(1024, 256, 0.5, 0.5), 0.7, {"max_num_seqs": 32}, (0.15, 0.35, 0.08, 0.12)),
    "tensor parallel": (
        PlannedWorkload(2048, 256, 0.5, 0.5),
        0.6,
        {"name": "Llama-3.1-70B", "tp": 4},
        (0.12, 0.2, 0.08, 0.12),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_latencies_are_those_of_a_discrete_event_simulation(case: str):
    work, load, options, (median, p95, tpot, e2e) = CASES[case]
    made = _serving(work, **options)
    rate = load * made.capacity()
    point = made.at_rate(rate)
    seen = simulate(made, rate, 1500)
    assert point.stable
    assert point.ttft_p50_s == pytest.approx(seen.percentile("ttft", 0.5), rel=median)
    assert point.ttft_p95_s == pytest.approx(seen.percentile("ttft", 0.95), rel=p95)
    assert point.tpot_s == pytest.approx(float(seen.tpot.mean()), rel=tpot)
    assert point.e2e_p95_s == pytest.approx(seen.percentile("e2e", 0.95), rel=e2e)


@pytest.mark.parametrize("users", [1, 16, 128])
def test_throughput_of_a_number_of_users_is_that_of_the_simulation(users: int):
    made = _serving(PlannedWorkload(1024, 256))
    seen = simulate_users(made, users, max(60, 8 * users))
    point = made.at_concurrency(users)
    assert point.output_tokens_s == pytest.approx(seen.output_tokens_s, rel=0.08)
    assert point.in_system == pytest.approx(users, rel=0.01)


def test_what_cannot_be_served_is_told_as_unstable():
    made = _serving(PlannedWorkload(1024, 256))
    point = made.at_rate(2 * made.capacity())
    assert not point.stable
    assert point.ttft_p95_s == float("inf")
    assert not point.meets(Objectives())


def test_largest_load_keeps_the_objectives_and_a_little_more_does_not():
    made = _serving(PlannedWorkload(1024, 256, 0.5, 0.5))
    wanted = Objectives(ttft_s=0.2, tpot_s=0.03)
    best = made.largest_load(wanted)
    assert best is not None
    assert best.meets(wanted)
    assert made.at_rate(best.rate * 0.98).meets(wanted)
    assert not made.at_rate(best.rate * 1.05).meets(wanted)
    assert made.largest_load(Objectives(ttft_s=1e-4)) is None


def test_latency_grows_with_the_load():
    made = _serving(PlannedWorkload(1024, 256, 0.5, 0.5))
    points = [made.at_rate(share * made.capacity()) for share in (0.1, 0.3, 0.5, 0.7, 0.9)]
    for name in ("ttft_p95_s", "tpot_s", "tpot_p95_s", "e2e_p95_s", "running", "output_tokens_s"):
        values = [getattr(point, name) for point in points]
        assert values == sorted(values), name
    sweep = made.sweep()
    assert [point.output_tokens_s for point in sweep] == sorted(point.output_tokens_s for point in sweep)


def test_copies_share_the_load():
    work = PlannedWorkload(1024, 256, 0.5, 0.5)
    one, four = _serving(work), _serving(work, dp=4)
    assert four.capacity() == pytest.approx(4 * one.capacity())
    assert four.at_rate(20.0).ttft_p95_s == pytest.approx(one.at_rate(5.0).ttft_p95_s)


def test_static_batches_wait_for_their_longest_answer():
    work = PlannedWorkload(1024, 256, 0.0, 1.0)
    full = _request(profile="transformers", context=2048, concurrency=16)
    static = serving(full, work, 16)
    assert static is not None
    equal = serving(full, dataclasses.replace(work, output_cv=0.0), 16)
    assert equal is not None
    assert static.at_concurrency(16).output_tokens_s < 0.6 * equal.at_concurrency(16).output_tokens_s


# -- speculation -------------------------------------------------------------------------------------------------


def test_published_speed_up_is_wrong_where_the_right_one_is_not():
    assert published_speedup(0.8, 4, 0.1) < 0
    assert ideal_speedup(0.8, 4, 0.1) == pytest.approx(2.40, abs=0.005)
    assert ideal_speedup(0.2, 4, 0.1) == pytest.approx(0.89, abs=0.005)
    assert published_speedup(0.2, 4, 0.1) == pytest.approx(3.57, abs=0.005)


@given(st.floats(0, 1), st.integers(1, 16))
@settings(max_examples=100, deadline=None)
def test_expected_tokens_are_between_one_and_all_drafts_and_the_bonus(acceptance: float, length: int):
    assert 1.0 <= expected_tokens(acceptance, length) <= length + 1
    summed = sum(acceptance**count for count in range(length + 1))
    assert expected_tokens(acceptance, length) == pytest.approx(summed, rel=1e-6)


def test_speculation_helps_few_users_and_not_a_full_batch():
    plain, drafted = (_serving(PlannedWorkload(512, 256, draft_length=length, draft_cost=0.0)) for length in (0, 4))
    assert drafted.at_concurrency(1).tpot_s < 0.6 * plain.at_concurrency(1).tpot_s
    gains = [plain.at_concurrency(users).tpot_s / drafted.at_concurrency(users).tpot_s for users in (1, 64, 256)]
    assert gains == sorted(gains, reverse=True)


def test_draft_model_costs_time_and_a_good_one_is_drafted_longer():
    target = plan(PlanRequest(model_spec("Llama-3.1-70B"), H100, tp=4, context=4096, draft=model_spec("Llama-3.2-1B")))
    work = PlannedWorkload(1024, 256, draft_length=4, acceptance=0.8)
    made = serving(target.request, work, 16)
    free = serving(target.request, dataclasses.replace(work, draft_cost=0.0), 16)
    assert made is not None
    assert free is not None
    assert made.at_concurrency(1).tpot_s > free.at_concurrency(1).tpot_s
    assert (
        best_draft_length(0.9, 0.05, lambda k: 1.0).draft_length
        > best_draft_length(0.5, 0.05, lambda k: 1.0).draft_length
    )
