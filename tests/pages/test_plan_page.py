"""The Plan page: the answer, what would make it fit, links, and files that are not what they should be."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from streamlit.testing.v1 import AppTest

from engine.capacity import (
    Objectives,
    PlannedWorkload,
    PlanRequest,
    concurrency_curve,
    deploy,
    find_gpu,
    model_config,
    model_names,
    model_spec,
    pareto,
    plan,
    sensitivity,
)
from engine.errors import HeadroomError
from pages.plan.fields import NGRAM, key
from pages.plan.memory import segments
from pages.plan.model import SHAPE, UPLOAD, read_config
from pages.plan.roofline import operator_table
from pages.plan.shape import shape_key

PAGE = Path(__file__).parents[2] / "pages" / "plan" / "page.py"


@pytest.fixture
def page(tmp_path, monkeypatch):
    monkeypatch.setenv("HEADROOM_HOME", str(tmp_path))
    return AppTest.from_file(str(PAGE), default_timeout=30)


def headline(page) -> str:
    return page.subheader[0].value


def texts(elements) -> str:
    return " ".join(str(element.value) for element in elements)


def metric(page, label: str) -> str:
    return next(metric.value for metric in page.metric if metric.label == label)


def upload(page, content: bytes, name: str = "config.json"):
    page.run()
    page.selectbox(key=key("model")).select(UPLOAD).run()
    return page.file_uploader(key=key("config")).set_value((name, content, "application/json")).run()


def test_opens_with_an_answer_in_one_sentence(page):
    page.run()
    assert not page.exception
    assert not page.error
    assert "4 × H100 SXM 80GB hold Llama-3.1-70B with 32 concurrent requests of 8,192 tokens" in headline(page)
    request = PlanRequest(model_spec("Llama-3.1-70B"), find_gpu("H100 SXM 80GB"), tp=4, context=8192, concurrency=32)
    assert metric(page, "Largest concurrency") == f"{plan(request).max_concurrency:,}"
    assert metric(page, "Longest context") == f"{plan(request).max_context:,}"


def test_published_and_corrected_formula_stand_side_by_side_with_numbers(page):
    page.run()
    page.selectbox(key=key("tp")).select(1).run()
    formulas = [formula.value for formula in page.latex]
    assert any(r"2 \cdot 80 \cdot 64 \cdot 128 \cdot 8{,}192 \cdot 2" in formula for formula in formulas)
    assert any(r"2 \cdot 80 \cdot 8 \cdot 128 \cdot 8{,}192 \cdot 2" in formula for formula in formulas)
    assert "groups of 8 share one key/value head" in texts(page.markdown)


def test_answer_gives_latency_cost_and_headroom_in_one_sentence(page):
    page.run()
    for part in ("TTFT p95", "ms a token", "per million output tokens", "headroom"):
        assert part in headline(page)
    request = PlanRequest(model_spec("Llama-3.1-70B"), find_gpu("H100 SXM 80GB"), tp=4, context=8192, concurrency=32)
    work = PlannedWorkload(2000, 300, 0.5, 0.5)
    found = deploy(request, work, Objectives(1.0, 0.05))
    assert metric(page, "First token, p95") == f"{1e3 * found.point.ttft_p95_s:,.0f} ms"
    assert metric(page, "Output tokens a second") == f"{found.point.output_tokens_s:,.0f}"


def test_draft_model_shares_the_gpus_and_experts_can_stay_whole(page):
    page.run()
    alone = metric(page, "Largest concurrency")
    page.selectbox(key=key("drafter")).select("Llama-3.2-1B").run()
    assert metric(page, "Largest concurrency") == alone  # no draft length, no draft
    page.number_input(key=key("draft")).set_value(4).run()
    assert not page.exception
    assert int(metric(page, "Largest concurrency").replace(",", "")) < int(alone.replace(",", ""))
    page.selectbox(key=key("model")).select("Qwen3-30B-A3B").run()
    assert not page.exception
    assert page.selectbox(key=key("drafter")).value == NGRAM
    page.selectbox(key=key("experts")).select("whole").run()
    assert not page.exception
    assert any("enable-expert-parallel" in code.value for code in page.code)


def test_missed_objective_is_marked_and_told(page):
    page.run()
    page.number_input(key=key("tpot")).set_value(5.0).run()
    assert not page.exception
    assert "an objective is missed" in headline(page)
    assert any("missed" in str(item.delta) for item in page.metric)


def test_rate_in_place_of_users_and_more_than_can_be_served(page):
    page.run()
    page.segmented_control(key=key("load")).set_value("rate").run()
    assert "at 1.00 requests a second" in headline(page)
    page.number_input(key=key("rate")).set_value(500.0).run()
    assert not page.exception
    assert "cannot serve 500.00 requests a second" in headline(page)


def test_cheapest_hardware_is_found_and_applied(page):
    page.run()
    page.toggle(key=key("search")).set_value(True).run()
    assert not page.exception
    chosen = page.selectbox(key=key("found")).value
    page.button(key=key("use-found")).click().run()
    assert not page.exception
    assert headline(page).split(" hold")[0].endswith(chosen) or chosen.startswith("1 ×")
    assert page.selectbox(key=key("gpu")).value in chosen


def test_saved_plan_is_compared_opened_and_forgotten(page):
    page.run()
    page.text_input(key=key("name")).set_value("four H100").run()
    page.button(key=key("save")).click().run()
    page.selectbox(key=key("tp")).select(8).run()
    assert page.selectbox(key=key("compare")).value == "four H100"
    page.button(key=key("open")).click().run()
    assert not page.exception
    assert page.selectbox(key=key("tp")).value == 4
    page.button(key=key("delete")).click().run()
    assert not [box for box in page.selectbox if box.key == key("compare")]


def test_every_input_has_a_help_text(page):
    page.run()
    inputs = [*page.selectbox, *page.number_input, *page.slider, *page.text_input]
    assert len(inputs) > 15
    assert [element.label for element in inputs if not element.proto.help] == []


def test_change_of_an_input_takes_less_than_300_milliseconds_to_compute(page):
    page.run()
    deploy_and_charts(40)  # imports are not what is measured
    seconds = []
    for concurrency in (41, 42, 43):
        start = time.perf_counter()
        deploy_and_charts(concurrency)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.3


def deploy_and_charts(concurrency: int) -> None:
    """Everything that the page computes for an input it has not seen."""
    request = PlanRequest(
        model_spec("Llama-3.1-70B"), find_gpu("H100 SXM 80GB"), tp=4, context=8192, concurrency=concurrency
    )
    found = deploy(request, PlannedWorkload(2000, 300 + concurrency, 0.5, 0.5), Objectives(1.0, 0.05))
    found.serving.sweep(18)
    operator_table(found.serving, found.point.running)
    sensitivity(found)
    pareto(found.plan.request.as_request(), found.workload)
    concurrency_curve(found.plan.request.as_request())


def test_what_does_not_fit_says_by_how_much_and_a_remedy_is_applied_by_a_button(page):
    page.run()
    page.selectbox(key=key("tp")).select(1).run()
    assert "cannot hold" in headline(page)
    assert "GiB are missing" in headline(page)
    assert "What would make it fit" in texts(page.markdown)
    page.button(key=key("remedy-tp")).click().run()
    assert not page.exception
    assert page.selectbox(key=key("tp")).value == 4
    assert "hold Llama-3.1-70B" in headline(page)


@pytest.mark.parametrize("kind", ["weights", "both", "tp", "tp_fp8", "gpu", "context", "concurrency"])
def test_every_kind_of_remedy_can_be_applied_and_then_it_fits(page, kind: str):
    page.query_params.update({key("model"): "Llama-3.1-8B", key("gpu"): "L4 24GB", key("tp"): "1"})
    page.query_params[key("concurrency")] = "8"
    page.run()
    buttons = [button for button in page.button if button.key == key(f"remedy-{kind}")]
    if kind == "tp_fp8":
        assert not buttons  # FP8 weights alone are enough
        return
    buttons[0].click().run()
    assert not page.exception
    assert "cannot" not in headline(page)


def test_link_opens_the_plan_that_it_names(page):
    page.query_params.update({key("model"): "Qwen3-8B", key("gpu"): "A100 40GB", key("tp"): "2"})
    page.query_params.update({key("context"): "4096", key("concurrency"): "5", key("kv"): "FP8"})
    page.run()
    assert "2 × A100 40GB hold Qwen3-8B with 5 concurrent requests of 4,096 tokens" in headline(page)
    assert page.selectbox(key=key("kv")).value == "fp8"


def test_context_follows_a_model_that_goes_less_far(page):
    page.run()
    page.number_input(key=key("context")).set_value(100_000).run()
    page.selectbox(key=key("model")).select("Llama-2-7b").run()
    assert not page.exception
    assert page.number_input(key=key("context")).value == 4096
    assert "of 4,096 tokens" in headline(page)


def test_number_of_gpus_follows_a_model_that_splits_otherwise(page):
    page.run()
    page.selectbox(key=key("tp")).select(16).run()
    page.selectbox(key=key("model")).select("Qwen2.5-7B").run()
    assert not page.exception
    assert page.selectbox(key=key("tp")).value == 4


@pytest.mark.slow
def test_every_model_of_the_catalog_is_offered_and_every_family_can_be_planned(page):
    page.query_params[key("tp")] = "1"
    page.run()
    box = page.selectbox(key=key("model"))
    assert set(model_names()) <= set(box.options)
    by_family = {model_spec(name).architecture: name for name in model_names()}
    for name in by_family.values():
        page.selectbox(key=key("model")).select(name).run()
        assert not page.exception, name
        assert not page.error, name
        assert name in headline(page)


@pytest.mark.parametrize("engine", ["vllm-0.19", "vllm-0.16", "vllm-0.6", "headroom", "transformers"])
def test_every_engine_can_be_planned(page, engine: str):
    page.run()
    page.selectbox(key=key("engine")).select(engine).run()
    assert not page.exception
    spec, gpu = model_spec("Llama-3.1-70B"), find_gpu("H100 SXM 80GB")
    answer = plan(PlanRequest(spec, gpu, tp=4, context=8192, concurrency=32, utilization=0.9, profile=engine))
    assert metric(page, "Largest concurrency") == f"{answer.max_concurrency:,}"


def test_this_machine_is_planned_with_our_own_engine(page):
    page.run()
    page.selectbox(key=key("model")).select("SmolLM2-135M").run()
    mine = next(option for option in page.selectbox(key=key("gpu")).options if "CPU" in option)
    page.selectbox(key=key("gpu")).select(mine).run()
    assert not page.exception
    assert page.selectbox(key=key("engine")).value == "headroom"
    assert "this machine's CPU" in headline(page)


def test_largest_batch_below_the_goal_is_explained(page):
    page.run()
    page.number_input(key=key("max-seqs")).set_value(4).run()
    assert not page.exception
    assert "fewer than the concurrency of 32" in texts(page.error)
    assert "at least 32" in texts(page.error)


def test_uploaded_config_is_planned_under_the_name_of_its_file(page):
    upload(page, json.dumps(model_config("Qwen3-8B")).encode(), "my-model.json")
    assert not page.exception
    assert "my-model" in headline(page)
    assert "8.19 billion parameters" in texts(page.caption)


def test_field_that_is_not_read_is_named_on_the_page(page):
    upload(page, json.dumps(model_config("Qwen3-8B") | {"zz_latent_size": 64}).encode())
    assert not page.exception
    assert "Not read: zz_latent_size" in texts(page.caption)


def test_quantization_file_beside_a_config_is_read(page):
    upload(page, json.dumps(model_config("Llama-3.1-8B")).encode(), "my-model.json")
    stated = {"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}}
    page.file_uploader(key=key("quantization")).set_value(
        ("q.json", json.dumps(stated).encode(), "application/json")
    ).run()
    assert not page.exception
    assert "FP8 (as is)" in page.selectbox(key=key("weights")).options
    page.file_uploader(key=key("quantization")).set_value(("q.json", b"[1", "application/json")).run()
    assert "not JSON" in texts(page.error)


def test_shape_entered_by_hand_is_planned_like_any_model(page):
    page.run()
    page.selectbox(key=key("model")).select(SHAPE).run()
    assert not page.exception
    assert not page.error
    assert "8.03 billion parameters" in texts(page.caption)
    page.number_input(key=shape_key("layers")).set_value(16).run()
    page.number_input(key=shape_key("experts")).set_value(64).run()
    assert not page.exception
    assert "active" in texts(page.caption)
    page.number_input(key=shape_key("kv_heads")).set_value(5).run()
    assert not page.exception
    assert "**kv_heads**: 5 key/value heads cannot be shared evenly" in texts(page.error)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "not a JSON object"),
        (b"{}", "architectures"),
        (b'{"architectures": ["MambaForCausalLM"]}', "does not know MambaForCausalLM"),
        (json.dumps(model_config("Qwen3-8B") | {"num_hidden_layers": -4}).encode(), "num_hidden_layers"),
        (json.dumps(model_config("Qwen3-8B") | {"num_key_value_heads": 5}).encode(), "cannot be shared evenly"),
        (json.dumps(model_config("Qwen3-8B") | {"hidden_size": 1e999}).encode(), "hidden_size"),
    ],
)
def test_broken_config_is_explained_and_nothing_else_breaks(page, content: bytes, says: str):
    upload(page, content)
    assert not page.exception
    assert says in texts(page.error)
    page.selectbox(key=key("model")).select("Llama-3.1-8B").run()
    assert not page.error
    assert "Llama-3.1-8B" in headline(page)


junk = st.none() | st.booleans() | st.integers(-5, 300) | st.floats() | st.text(max_size=5) | st.lists(st.integers())
changes = st.dictionaries(st.sampled_from([*model_config("Qwen2.5-7B"), "head_dim", "layer_types"]), junk, max_size=3)


@given(st.binary(max_size=40) | changes.map(lambda change: json.dumps(model_config("Qwen2.5-7B") | change).encode()))
@settings(max_examples=200, deadline=None)
def test_any_uploaded_bytes_give_a_model_or_an_explained_error(content: bytes):
    try:
        spec = read_config(content, "config.json")
    except HeadroomError as problem:
        explained = problem.field and problem.remedy
    else:
        explained = spec.num_layers > 0
    assert explained


@pytest.mark.parametrize(("tp", "concurrency"), [(1, 1), (2, 200), (4, 32), (8, 5000)])
def test_memory_bar_has_no_gap_and_ends_at_the_capacity_or_at_what_is_needed(tp: int, concurrency: int):
    spec, gpu = model_spec("Llama-3.1-70B"), find_gpu("H100 SXM 80GB")
    answer = plan(PlanRequest(spec, gpu, tp=tp, context=8192, concurrency=concurrency))
    table = segments(answer)
    bar = table[table["part"] != "Missing"]
    assert list(bar["start"][1:]) == pytest.approx(list(bar["end"][:-1]))
    if answer.fits:
        assert bar["end"].iloc[-1] == pytest.approx(gpu.usable_gib)
    else:
        missing = table[table["part"] == "Missing"].iloc[0]
        assert missing["end"] - missing["start"] == pytest.approx(answer.shortfall / 2**30)
        assert missing["end"] == pytest.approx(bar["end"].iloc[-1])
