"""A field or tensor of a checkpoint is read, refused, or named in a warning: none is ignored in silence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from engine.config import EngineConfig
from engine.core import Engine
from engine.errors import ModelLoadError
from engine.models import load_model
from engine.models.config_rules import config_warnings
from engine.models.families import FAMILIES
from engine.status import take_status
from tests import family_cases
from tests.attack import checkpoints
from tests.conftest import byte_tokenizer

LLAMA = next(family for family in FAMILIES if family.name == "llama")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return checkpoints.write_folder(tmp_path / "model", byte_tokenizer())


def state(folder: Path, **fields) -> str:
    checkpoints.write_config(folder, checkpoints.CONFIG | fields)
    return str(folder)


@pytest.mark.parametrize("name", family_cases.FAMILIES)
def test_configurations_that_transformers_writes_need_no_warning(name):
    config = json.loads(family_cases.FAMILIES[name].to_json_string(use_diff=False))
    family = next(family for family in FAMILIES if family.name == config["model_type"])
    assert config_warnings(config, family) == ()


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"sliding_window": 128}, "sliding_window = 128"),
        ({"logit_scale": 0.5}, "logit_scale = 0.5"),
        ({"clip_qkv": 8.0}, "clip_qkv = 8.0"),
        ({"num_experts": 8}, "num_experts = 8"),
        ({"scale_attn_weights": False}, "scale_attn_weights = False"),
        ({"rope_interleaved": True}, "rope_interleaved = True"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "alpha": 3}}, "rope_scaling.alpha = 3"),
    ],
)
def test_field_that_is_not_followed_is_named(fields, named, folder):
    warnings = load_model(state(folder, **fields), dtype="float32", device="cpu").warnings
    assert len(warnings) == 1
    assert warnings[0].startswith(f"config.json: {named} is not followed")


@pytest.mark.parametrize("field", ["use_cache", "initializer_range", "attention_dropout", "transformers_version"])
def test_field_of_training_or_naming_is_harmless(field):
    assert config_warnings(checkpoints.CONFIG | {field: 1}, LLAMA) == ()


def test_switch_that_is_off_and_a_field_without_a_value_say_nothing():
    stated = checkpoints.CONFIG | {"is_encoder_decoder": False, "clip_qkv": None, "pruned_heads": {}}
    assert config_warnings(stated, LLAMA) == ()


def test_layers_of_another_kind_are_refused(folder):
    with pytest.raises(ModelLoadError, match="'linear_attention' are not part of llama") as caught:
        load_model(state(folder, layer_types=["full_attention", "linear_attention"]), device="cpu")
    assert caught.value.field == "layer_types"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", 10**18),
        ("num_hidden_layers", 10**9),
        ("num_attention_heads", True),
        ("head_dim", "64"),
        ("vocab_size", -1),
        ("rms_norm_eps", float("nan")),
        ("rope_theta", float("inf")),
        ("rope_theta", 10**400),
        ("attention_bias", "no"),
        ("hidden_act", ["silu"]),
        ("num_attention_heads", 8),
        ("num_key_value_heads", 3),
    ],
)
def test_value_that_cannot_be_meant_is_refused_by_its_field_or_by_the_tensor_it_contradicts(field, value, folder):
    with pytest.raises(ModelLoadError) as caught:
        load_model(state(folder, **{field: value}), dtype="float32", device="cpu")
    assert caught.value.field == field or "has shape" in caught.value.message
    assert len(str(caught.value)) < 600


def test_tensors_without_a_use_are_named_and_known_leftovers_are_not(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.self_attn.q_proj.bias"] = tensors["model.norm.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = tensors["model.norm.weight"]
    save_file(tensors, path)
    assert load_model(str(folder), dtype="float32", device="cpu").warnings == (
        "1 tensor of the checkpoint is not used: model.layers.0.self_attn.q_proj.bias.",
    )


def test_status_and_event_log_carry_the_warnings(folder):
    config = EngineConfig.from_mapping(
        {"model": state(folder, clip_qkv=8.0), "dtype": "float32", "device": "cpu", "memory_limit_gib": 0.05}
    )
    engine = Engine.load(config)
    (warning,) = take_status(engine).model["warnings"]
    assert "clip_qkv" in warning
    assert [event.summary for event in engine.events if event.kind == "warning"] == [warning]


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "..\\x", "a/../../x", ".", ""])
def test_index_that_leaves_its_folder_is_refused(name, folder):
    table = dict.fromkeys(checkpoints.tensors(), name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    with pytest.raises(ModelLoadError, match="is not in its folder") as caught:
        load_model(str(folder), device="cpu")
    assert caught.value.field == "model.safetensors.index.json"


def test_model_folder_reached_by_links_loads(folder, tmp_path):
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in folder.iterdir():
        (linked / path.name).symlink_to(path)
    load_model(str(linked), dtype="float32", device="cpu")


def test_packed_integers_are_refused_as_weights(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].astype("int32")
    save_file(tensors, path)
    with pytest.raises(ModelLoadError, match=f"stores '{name}' as I32"):
        load_model(str(folder), device="cpu")
