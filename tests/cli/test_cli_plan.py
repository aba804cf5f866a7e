"""``headroom plan``: every part of its document, every form, every refusal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Run

LLAMA_70B = ("plan", "--model", "Llama-3.1-70B", "--gpu", "H100 SXM 80GB", "--context", 8192)


def test_plan_of_llama_70b_on_h100(run: Run):
    code, out, _ = run(*LLAMA_70B, "--tp", 4, "--json")
    assert code == 0
    document = json.loads(out)
    assert {"parameters", "memory", "limits", "fits", "warnings", "assumptions"} <= document.keys()
    assert document["parameters"].keys() == {"total", "active", "by_part"}
    assert document["parameters"]["total"] == 70_553_706_496  # the model card's 70.6 B
    wanted = "weights_gib activation_gib non_torch_gib kv_gib kv_bytes_per_token kv_tokens kv_blocks"
    assert set(wanted.split()) <= document["memory"].keys()
    assert document["memory"]["kv_bytes_per_token"] == 2 * 80 * 8 * 128 * 2 // 4
    assert document["fits"] is True
    assert document["limits"]["max_concurrency"] == document["memory"]["kv_tokens"] // 8192
    assert document["what_would_fit"] == []


def test_plan_that_does_not_fit_says_by_how_much_and_what_would(run: Run):
    code, out, _ = run(*LLAMA_70B, "--json")
    assert code == 0
    document = json.loads(out)
    assert document["fits"] is False
    assert document["memory"]["shortfall_gib"] > 50
    changes = [remedy["changes"] for remedy in document["what_would_fit"]]
    assert any("tp" in change for change in changes)
    code, out, _ = run(*LLAMA_70B)
    assert code == 0
    assert "does not fit" in out
    assert "would fit: " in out


def test_plan_takes_a_configuration_file_and_every_option(run: Run, tiny_llama: Path):
    options = ["--gpu-memory-gib", 2, "--tp", 2, "--pp", 2, "--dtype", "float32", "--weights", "int8"]
    options += ["--kv-dtype", "fp8", "--context", 256, "--max-num-seqs", 4, "--gpu-memory-utilization", 0.5]
    options += ["--profile", "headroom", "--concurrency", 3, "--json"]
    for model in (tiny_llama, tiny_llama / "config.json"):
        code, out, err = run("plan", "--model", model, *options)
        assert code == 0, err
        request = json.loads(out)["request"]
        expected = {"tp": 2, "pp": 2, "context": 256, "concurrency": 3, "max_num_seqs": 4, "utilization": 0.5}
        assert request.items() >= {**expected, "profile": "headroom", "dtype": "float32"}.items()


def test_plan_prints_every_part_of_its_contract(run: Run):
    lengths = ("--input-tokens", 3000, "--output-tokens", 1000)
    code, out, _ = run(*LLAMA_70B[:-2], "--tp", 4, *lengths, "--rate", 2, "--slo-ttft-ms", 500, "--json")
    assert code == 0
    document = json.loads(out)
    assert document["request"]["context"] == 4000
    assert {"ttft_ms", "tpot_ms", "decode_step_ms", "output_tokens_s"} <= document["latency"].keys()
    assert document["latency"]["output_tokens_s"] == pytest.approx(2000, rel=0.01)
    assert document["latency"]["ttft_p95_ms"] > document["latency"]["ttft_ms"] > 0
    assert document["cost"]["per_hour"] == 4 * document["cost"]["price_per_gpu_hour"]
    assert {"max_concurrency", "max_context"} <= document["limits"].keys()
    assert document["slo"]["ttft_ms"] == pytest.approx(500)
    assert document["launch"]["vLLM"].startswith("vllm serve")


def test_plan_without_a_known_speed_gives_memory_and_says_what_is_missing(run: Run):
    code, out, _ = run("plan", "--model", "Llama-3.1-8B", "--gpu-memory-gib", 40, "--context", 4096, "--json")
    assert code == 0
    document = json.loads(out)
    assert document["fits"] is True
    assert document["latency"]["ttft_ms"] is None
    assert any("not known" in warning for warning in document["warnings"])


def test_plan_above_what_can_be_served_does_not_fit_and_still_prints_json(run: Run):
    lengths = ("--input-tokens", 1000, "--output-tokens", 200, "--rate", 100_000)
    code, out, _ = run("plan", "--model", "Llama-3.1-8B", "--gpu", "L4 24GB", *lengths, "--json")
    assert code == 0
    document = json.loads(out)
    assert document["fits"] is False
    assert document["latency"]["ttft_ms"] is None


@pytest.mark.parametrize("form", ["markdown", "yaml", "table"])
def test_plan_is_printed_as_a_document(run: Run, form: str):
    code, out, _ = run(*LLAMA_70B, "--tp", 8, "--format", form)
    assert code == 0
    assert "Llama-3.1-70B" in out


def test_plan_refuses_nonsense(error_of: Callable[..., dict[str, Any]], tmp_path: Path):
    assert error_of(*LLAMA_70B, "--tp", 3)["field"] == "tp"
    assert error_of(*LLAMA_70B, "--context", -1)["field"] == "context"
    assert error_of("plan", "--model", "Llama-3.1-8B")["field"] == "gpu"
    assert error_of("plan", "--model", "Llama-3.1-8B", "--gpu", "abacus")["field"] == "gpu"
    assert error_of("plan", "--model", "Lama-9", "--gpu", "H100 SXM 80GB")["field"] == "model"
    assert error_of(*LLAMA_70B, "--tp", 4, "--concurrency", 1, "--rate", 1)["field"] == "rate"
    assert error_of(*LLAMA_70B, "--tp", 4, "--slo-ttft-ms", -1)["field"] == "slo_ttft_ms"
    assert error_of(*LLAMA_70B, "--tp", 4, "--ep", 4)["field"] == "ep"
    assert error_of(*LLAMA_70B, "--tp", 4, "--draft", "Qwen3-0.6B")["field"] == "draft"
    assert error_of(*LLAMA_70B, "--tp", 4, "--input-tokens", 9000)["field"] == "context"
    broken = tmp_path / "config.json"
    for content in ('{"model_type": ', "[1]", '{"model_type": "llama"}', "[" * 100_000):
        broken.write_text(content)
        error_of("plan", "--model", broken, "--gpu", "H100 SXM 80GB")
    assert error_of("plan", "--model", tmp_path / "absent.json", "--gpu", "H100 SXM 80GB")["field"] == "model"
