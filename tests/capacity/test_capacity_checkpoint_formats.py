"""What checkpoints say of their own quantization, and the bytes that follow."""

from __future__ import annotations

import time
from typing import Any

import pytest

from engine.capacity import ModelSpec, model_config, parameter_count
from engine.capacity.model.module_names import ModuleList
from tests.capacity.by_name import weight_bytes

LLAMA, MIXTURE = model_config("Llama-3.1-8B"), model_config("Qwen3-30B-A3B")


def read(stated: Any, config: dict[str, Any] = LLAMA, beside: Any = None) -> ModelSpec:
    """The spec of a checkpoint that states this ``quantization_config``, or that file beside it."""
    return ModelSpec.from_hf_config(config | {"quantization_config": stated} if stated else config, "x", beside)


def size(spec: ModelSpec) -> int:
    """Bytes of its weights as stored."""
    return weight_bytes(spec, spec.checkpoint_format or spec.torch_dtype)


def group(bits: int = 4, kind: str = "int", targets: Any = ("Linear",), **weights: Any) -> dict[str, Any]:
    """One of compressed-tensors' ``config_groups``."""
    return {"targets": list(targets), "weights": {"num_bits": bits, "type": kind, "symmetric": True} | weights}


def compressed(*groups: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """A ``quantization_config`` of compressed-tensors."""
    numbered = {f"group_{index}": item for index, item in enumerate(groups)}
    return {"quant_method": "compressed-tensors", "config_groups": numbered, "ignore": ["lm_head"]} | fields


COUNT = parameter_count(ModelSpec.from_hf_config(LLAMA))
MATRICES = COUNT.attention + COUNT.mlp
REST = 2 * (COUNT.total - MATRICES)
ROWS = 32 * (4096 + 2 * 1024 + 4096 + 2 * 14336 + 4096)


@pytest.mark.parametrize(
    ("stated", "name", "expected"),
    [
        (compressed(group(group_size=128, strategy="group")), "int4-g128", MATRICES * (0.5 + 2 / 128)),
        (compressed(group(group_size=32, symmetric=False)), "int4-g32", MATRICES * (0.5 + 2.5 / 32)),
        (compressed(group(8, strategy="channel")), "int8", MATRICES + 2 * ROWS),
        (compressed(group(8, "float", strategy="channel")), "fp8", MATRICES + 4 * ROWS),
        (compressed(group(8, "float", strategy="tensor")), "fp8", MATRICES + 4 * 32 * 7),
        (compressed(group(4, "float", group_size=16)), "nvfp4", MATRICES * 4.5 / 8),
        (compressed(group(4, "float", group_size=32)), "mxfp4", MATRICES * 4.25 / 8),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "int4-g128", MATRICES * (0.5 + 2.5 / 128)),
        ({"quant_method": "gptq", "bits": 8, "group_size": 32}, "int8-g32", MATRICES * (1 + 3 / 32)),
        ({"quant_method": "gptq", "bits": 3, "group_size": 128}, "int3-g128", MATRICES * (3 / 8 + 2.375 / 128)),
        ({"quant_method": "awq", "w_bit": 4, "q_group_size": 64}, "int4-g64", MATRICES * (0.5 + 2.5 / 64)),
        ({"quant_method": "auto-round", "bits": 4, "group_size": 128}, "int4-g128", MATRICES * (0.5 + 2.5 / 128)),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}, "nvfp4", MATRICES * 4.5 / 8),
        ({"quant_method": "fbgemm_fp8"}, "fp8", MATRICES + 4 * ROWS),
        ({"load_in_8bit": True}, "int8", MATRICES + 4 * ROWS),
    ],
)
def test_each_method_is_counted_to_the_byte(stated: dict[str, Any], name: str, expected: float):
    spec = read(stated | ({"ignore": ["lm_head"]} if stated.get("quant_method") == "modelopt" else {}))
    assert spec.checkpoint_format == name
    assert size(spec) == expected + REST
    assert not spec.notes


def test_published_four_bit_file_has_its_size():
    # unsloth/Meta-Llama-3.1-8B-bnb-4bit, NF4 with double quantization: 5.70 GB.
    stated = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_use_double_quant": True}
    assert size(read(stated | {"bnb_4bit_quant_type": "nf4"})) == pytest.approx(5.70e9, rel=0.002)


@pytest.mark.parametrize(
    "ignored",
    [
        ["re:.*self_attn.*"],
        ["re:model\\.layers\\.\\d+\\.self_attn\\.[qkvo]_proj"],
        ["self_attn"],
        ["model.layers.*.self_attn"],
        ["*self_attn*"],
        [f"model.layers.{index}.self_attn" for index in range(32)],
        [f"model.layers.{index}.self_attn*" for index in range(32)],
    ],
)
def test_every_spelling_of_a_list_of_modules_is_understood(ignored: list[str]):
    spec = read(compressed(group(8, "float"), ignore=["lm_head", *ignored]))
    channels = 32 * (2 * 14336 + 4096)
    assert size(spec) == COUNT.mlp + 4 * channels + 2 * COUNT.attention + REST
    assert not spec.notes


def test_layers_that_differ_are_counted_each():
    whole = size(read(compressed(group(8, "float"))))
    some = read(compressed(group(8, "float"), ignore=["lm_head", "model.layers.0.mlp", "re:model.layers.3[01].mlp.*"]))
    assert size(some) - whole == 3 * (3 * 4096 * 14336 - 4 * (2 * 14336 + 4096))
    assert weight_bytes(some, "bf16") == 2 * COUNT.total


def test_groups_of_different_precision_are_each_their_own():
    experts = group(group_size=128, targets=["re:.*experts.*"])
    rest = group(8, "float", targets=["re:.*self_attn.*"])
    spec = read(compressed(experts, rest), MIXTURE)
    count = parameter_count(spec)
    rows = 48 * (4096 + 2 * 512 + 2048)
    expected = count.experts * (0.5 + 2 / 128) + count.attention + 4 * rows
    assert size(spec) == expected + 2 * (count.total - count.experts - count.attention)


def test_head_that_is_not_listed_is_quantized_where_the_method_does():
    plain = size(read(compressed(group(8, "float"))))
    assert plain - size(read(compressed(group(8, "float"), ignore=[]))) == COUNT.head - 4 * 128256
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    assert size(read(gptq)) - size(read(gptq | {"lm_head": True})) == COUNT.head * 2 - COUNT.head * (0.5 + 2.5 / 128)


def test_modelopt_states_its_algorithm_for_all_or_for_each_layer():
    excluded = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}
    spec = read(None, beside={"producer": {"name": "modelopt"}, "quantization": excluded})
    assert (spec.checkpoint_format, spec.kv_dtype) == ("fp8", "fp8")
    assert size(spec) == MATRICES + 4 * 32 * 7 + REST
    layers = {
        f"model.layers.{index}.mlp.{name}_proj": {"quant_algo": "FP8"} for index in range(32) for name in ("up", "gate")
    }
    mixed = read(None, beside={"quantization": {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}})
    quantized = 32 * 2 * 4096 * 14336
    assert size(mixed) == quantized + 4 * 32 * 2 + 2 * (COUNT.total - quantized)


@pytest.mark.parametrize(
    ("stated", "says"),
    [
        ({"quant_method": "mystery"}, "mystery"),
        ({"quant_method": "torchao", "quant_type": "int4_weight_only"}, "torchao"),
        ({"quant_method": "awq", "bits": 77}, "not understood"),
        ("awq", "not understood"),
        (compressed(group(group_size=128), zz_scheme="x"), "quantization_config.zz_scheme"),
        (compressed(group(group_size=128, zz_bits=3)), "config_groups.weights.zz_bits"),
        (compressed(group(group_size=128), ignore=["re:(a+)+$"]), "(a+)+$"),
        (compressed(group(group_size=128), kv_cache_scheme={"num_bits": 4, "type": "int"}), "kv_cache_scheme"),
        (compressed(group(), kv_cache_scheme={"num_bits": 8, "type": "float", "zz": 1}), "kv_cache_scheme.zz"),
        ({"quant_method": "fp8", "weight_block_size": [64, 64]}, "weight_block_size"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "zz": 1}, "quantization_config.zz"),
    ],
)
def test_what_is_not_understood_is_named(stated: Any, says: str):
    assert says in " ".join(read(stated).notes)


def test_lists_of_any_length_and_any_expression_take_no_time():
    layers = LLAMA | {"num_hidden_layers": 4096}
    entries = [
        "re:.*a.*b.*c.*d.*e.*f$",
        "re:(x|xx)+y",
        "re:[0-9]+.*[a-z]*",
        *(f"model.layers.{n}.zz" for n in range(50_000)),
    ]
    started = time.process_time()
    read(compressed(group(8, "float"), ignore=entries), layers)
    assert time.process_time() - started < 15


def test_names_mean_whole_parts():
    modules = ModuleList(["mlp.gate", "q_proj"])
    assert modules.holds("qkv", 3)
    assert not modules.holds("mlp_up", 3)
    assert not modules.holds("head", 0)
