"""Configurations that made other planners go wrong, and the right answer to each.

``data/reports`` holds plain facts of published checkpoints: the fields of their ``config.json``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.capacity import ModelSpec, parameter_count
from engine.cli.app import main
from tests.capacity.by_name import kv_bytes_per_token, weight_bytes
from tests.capacity.test_capacity_agrees_with_transformers import built_parameters

REPORTS = Path(__file__).parent / "data" / "reports"
NAMES = sorted(path.stem for path in REPORTS.glob("*.json"))
PARAMETERS = {
    "nemotron-3-super-120b": 120_668_707_840,
    "command-r-plus": 103_810_674_688,
    "kimi-k2": 1_026_408_232_448,
    "granite-4.0-micro": 3_402_836_480,
    "gemma-3-27b-it": 27_009_346_304,
    "llama-4-maverick": 400_711_848_960,
    "moonlight-16b-a3b": 15_960_110_208,
    "glm-4.6": 352_797_829_024,
    "falcon-rw-1b": 1_311_625_216,
    "command-a-111b": 111_057_580_032,
}


def config_of(name: str) -> dict[str, Any]:
    """The configuration of that name."""
    return json.loads((REPORTS / f"{name}.json").read_text(encoding="utf-8"))


def spec_of(name: str) -> ModelSpec:
    """Its spec."""
    return ModelSpec.from_hf_config(config_of(name), name)


@pytest.fixture
def planned(capfd):
    """Runs ``plan --json`` on one H100 unless told otherwise, and gives its document."""

    def run(model: str, *options: str) -> dict[str, Any]:
        gpu = () if "--gpu" in options else ("--gpu", "H100 SXM 80GB")
        assert main(["plan", "--model", str(REPORTS / model), *gpu, *options, "--json"]) == 0
        return json.loads(capfd.readouterr().out)

    return run


@pytest.mark.parametrize("name", NAMES)
def test_count_is_that_of_transformers_own_class(name: str):
    config = config_of(name)
    language = config.get("text_config", config)
    if language["model_type"] == "kimi_k2":  # transformers runs it as what its architecture says
        language = language | {"model_type": "deepseek_v3"}
    count = parameter_count(spec_of(name)).total
    assert count == built_parameters(language)
    assert count == PARAMETERS.get(name, count)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_of_a_published_configuration_is_warned_of_in_vain(name: str):
    assert not [note for note in spec_of(name).notes if note.startswith("Not read")]


def test_experts_on_a_latent_fit_where_they_do(planned):
    answer = planned("nemotron-3-super-120b.json", "--tp", "4", "--context", "32768", "--weights", "bf16")
    assert answer["fits"]
    assert answer["parameters"]["active"] == pytest.approx(12e9, rel=0.07)


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
        {"rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 32768}},
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
        {"rope_scaling": {"type": "yarn", "factor": 4.0}, "original_max_position_embeddings": 32768},
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            }
        },
    ],
)
def test_yarn_extends_the_context_in_every_spelling(scaling: dict[str, Any]):
    config = {key: value for key, value in config_of("qwen3-8b-yarn").items() if key != "rope_scaling"}
    assert ModelSpec.from_hf_config(config).max_position == 40_960
    assert ModelSpec.from_hf_config(config | scaling).max_position == 131_072


def test_yarn_context_is_planned(planned):
    assert planned("qwen3-8b-yarn.json", "--context", "131072")["request"]["context"] == 131_072
    assert planned("qwen3-8b-yarn.json")["request"]["context"] == 131_072


@pytest.mark.parametrize("kind", ["linear", "dynamic", "llama3", "default"])
def test_other_scalings_leave_the_stated_context(kind: str):
    scaling = {"rope_type": kind, "factor": 8.0, "original_max_position_embeddings": 8192}
    assert ModelSpec.from_hf_config(config_of("qwen3-8b-awq") | {"rope_scaling": scaling}).max_position == 40_960


def test_fp8_cache_of_a_checkpoint_is_followed_by_vllm_and_told_elsewhere(planned):
    assert planned("llama-3.1-8b-fp8-kv.json")["memory"]["kv_bytes_per_token"] == 65_536
    other = planned("llama-3.1-8b-fp8-kv.json", "--profile", "transformers")
    assert other["memory"]["kv_bytes_per_token"] == 131_072
    assert "asks for a KV cache in FP8" in " ".join(other["warnings"])
    plain = planned("llama-3.1-8b-fp8-kv.json", "--kv-dtype", "bf16")
    assert plain["memory"]["kv_bytes_per_token"] == 131_072


def test_list_of_what_is_not_quantized_decides(planned):
    answer = planned("qwen3-30b-a3b-w4a16-experts.json", "--profile", "transformers")
    assert answer["memory"]["bytes"]["weights"] == 18_030_686_208
    assert answer["request"]["weights"] == "int4-g128"


def test_modelopt_file_beside_the_configuration_is_read(planned):
    for path in ("llama-3.1-70b-fp8-modelopt", "llama-3.1-70b-fp8-modelopt/config.json"):
        answer = planned(path)
        assert answer["memory"]["bytes"]["weights"] == pytest.approx(72.7e9, rel=0.002)
        assert answer["memory"]["kv_bytes_per_token"] == 163_840
        assert (answer["request"]["weights"], answer["request"]["kv_dtype"]) == ("fp8", "fp8")


def test_packed_checkpoints_have_their_size_on_disk():
    assert weight_bytes(spec_of("qwen3-8b-awq"), "int4-g128") == 6_098_479_104
    assert weight_bytes(spec_of("kimi-k2"), "fp8-block") == pytest.approx(1.029e12, rel=0.001)
    assert kv_bytes_per_token(spec_of("kimi-k2"), "bf16") == 70_272


def test_bitsandbytes_is_planned_as_such(planned):
    config = config_of("qwen3-8b-bnb4")
    matrices, rest = 36 * (4096 * 6144 + 4096 * 4096 + 3 * 4096 * 12288), 1_244_967_936
    answer = planned("qwen3-8b-bnb4.json", "--profile", "transformers")
    assert answer["request"]["weights"] == "nf4"
    doubled = matrices * (0.5 + 1 / 64 + 4 / 64 / 256) + 2 * rest
    assert answer["memory"]["bytes"]["weights"] == pytest.approx(doubled, rel=0.0001)

    def size(**changes) -> int:
        stated = config["quantization_config"] | changes
        spec = ModelSpec.from_hf_config(config | {"quantization_config": stated})
        return weight_bytes(spec, spec.checkpoint_format or "bf16")

    single = matrices * (0.5 + 4 / 64) + 2 * rest
    assert size(bnb_4bit_use_double_quant=False) == pytest.approx(single, rel=0.0001)
    eight = {"load_in_4bit": False, "_load_in_4bit": False, "load_in_8bit": True}
    rows = 36 * (6144 + 4096 + 2 * 12288 + 4096)
    assert size(**eight) == matrices + 4 * rows + 2 * rest
    down = 36 * 4096 * 12288
    skipped = size(**eight, llm_int8_skip_modules=["lm_head", "down_proj"])
    assert skipped == size(**eight) + down - 4 * 36 * 4096
    one_layer = size(**eight, llm_int8_skip_modules=["lm_head", "model.layers.7.mlp"])
    assert one_layer == size(**eight) + 3 * 4096 * 12288 - 4 * (2 * 12288 + 4096)
