"""Properties that hold for any model and any goal; nothing but an explained error ever comes out."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engine.capacity import (
    PROFILES,
    ModelSpec,
    PlanRequest,
    custom_gpu,
    model_config,
    model_names,
    model_spec,
    plan,
    what_would_fit,
)
from engine.errors import HeadroomError
from tests.capacity.by_name import activation_bytes, compare_kv_formulas, kv_bytes_per_sequence, weight_bytes

models = st.sampled_from(model_names()).map(model_spec)
profiles = st.sampled_from([profile.name for profile in PROFILES])
weights = st.sampled_from(["bf16", "fp8", "int8", "int4-g32", "int4-g64", "int4-g128"])
kv_dtypes = st.sampled_from(["auto", "fp8", "int8", "int4"])
memories = st.floats(0.05, 2000).map(lambda gib: custom_gpu("test", gib))


@st.composite
def requests(draw) -> PlanRequest:
    spec = draw(models)
    return PlanRequest(
        spec,
        draw(memories),
        tp=draw(st.sampled_from([1, 2, 4, 8])),
        pp=draw(st.sampled_from([1, 2, 3])),
        weights=draw(weights),
        kv_dtype=draw(kv_dtypes),
        context=draw(st.integers(1, spec.max_position)),
        concurrency=draw(st.integers(1, 2000)),
        utilization=draw(st.floats(0.05, 1.0)),
        profile=draw(profiles),
    )


def _check_explained(problem: HeadroomError) -> None:
    assert problem.field
    assert problem.remedy
    assert len(str(problem)) < 2000


def _plan_or_none(request: PlanRequest):
    try:
        return plan(request)
    except HeadroomError as problem:
        _check_explained(problem)
        return None


RECURRENT_AND_CAPPED = PlanRequest(
    model_spec("Nemotron-3-Nano-30B-A3B"), custom_gpu("test", 3.0), tp=4, pp=2, weights="int4-g128", context=65,
    utilization=1.0, profile="headroom",
)  # fmt: skip


@example(RECURRENT_AND_CAPPED)  # short contexts had blocks for their tokens and no memory for their states
@given(requests())
@settings(max_examples=150, deadline=None)
def test_any_budget_adds_up_and_any_limit_is_consistent(request: PlanRequest):
    answer = _plan_or_none(request)
    if answer is None:
        return
    memory = answer.memory
    parts = memory.weights + memory.activation + memory.non_torch + memory.kv + memory.unused + memory.reserved
    assert parts == memory.capacity + memory.excess
    assert min(dataclasses.astuple(memory)) >= 0
    assert answer.fits == (answer.shortfall == 0)
    assert answer.fits == (answer.max_context >= answer.request.context)
    if not answer.request.profile.batch_is_concurrency:
        assert answer.fits == (answer.max_concurrency >= answer.request.concurrency)


@given(requests(), st.integers(1, 100_000))
@settings(max_examples=60, deadline=None)
def test_more_context_more_sequences_or_less_memory_never_help(request: PlanRequest, extra: int):
    now = _plan_or_none(request)
    if now is None or now.fits:
        return
    harder = [
        {"context": min(now.request.context + extra, request.spec.max_position)},
        {"concurrency": request.concurrency + extra},
        {"gpu": custom_gpu("smaller", request.gpu.usable_gib / 2)},
    ]
    for changes in harder:
        then = _plan_or_none(dataclasses.replace(request, **changes))
        assert then is None or not then.fits


@given(requests())
@settings(max_examples=25, deadline=None)
def test_every_remedy_of_any_plan_makes_it_fit(request: PlanRequest):
    if _plan_or_none(request) is None:
        return
    for remedy in what_would_fit(request):
        assert plan(dataclasses.replace(request, **remedy.changes)).fits
        assert remedy.spare_bytes >= 0


@given(models, st.integers(1, 10_000), st.integers(0, 10_000), st.sampled_from([1, 2, 4]))
@settings(max_examples=100, deadline=None)
def test_bytes_are_monotone_in_context_and_precision(spec: ModelSpec, context: int, extra: int, tp: int):
    sizes = [kv_bytes_per_sequence(spec, context, 16, form, tp) for form in ("int4", "int8", "bf16", "fp32")]
    assert sizes == sorted(sizes)
    assert kv_bytes_per_sequence(spec, context, 16, "bf16", tp) <= kv_bytes_per_sequence(
        spec, context + extra, 16, "bf16", tp
    )
    formats = ["int4-g128", "int4-g64", "int4-g32", "int8", "bf16", "fp32"]
    held = [weight_bytes(spec, form, dtype="bfloat16", tp=tp) for form in formats]
    assert held == sorted(held)
    small, large = (activation_bytes(spec, tokens, 64, "bf16", tp=tp) for tokens in (context, context + extra))
    assert small <= large


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
fields = st.sampled_from([*model_config("Qwen2.5-7B"), "head_dim", "layer_types", "attention_bias", "dtype"])


@pytest.mark.slow
@given(st.sampled_from(model_names()), st.dictionaries(fields, junk | st.integers(0, 300), max_size=4), memories)
@settings(max_examples=400, deadline=None)
def test_fuzzed_config_gives_a_plan_or_an_explained_error(name: str, changes, gpu):
    try:
        spec = ModelSpec.from_hf_config(model_config(name) | changes)
        request = PlanRequest(spec, gpu, context=min(spec.max_position, 4096), concurrency=3)
        plan(request).to_dict()
        what_would_fit(request)
        compare_kv_formulas(spec, 1000, 16)
    except HeadroomError as problem:
        _check_explained(problem)


@given(junk)
@settings(max_examples=200, deadline=None)
def test_anything_as_config_is_refused_with_a_reason(config):
    try:
        ModelSpec.from_hf_config(config)
    except HeadroomError as problem:
        _check_explained(problem)
