"""Folders of safetensors: what is read, and how each kind of damage is reported."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, MistralConfig

from engine.errors import CapacityError, ConfigError, ModelLoadError
from engine.models import load_model, resolve, weight_swap
from engine.models.safetensors_checkpoint import SafetensorsCheckpoint

SMALL = {
    "vocab_size": 257,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "eos_token_id": 256,
    "bos_token_id": None,
    "tie_word_embeddings": False,
}


@pytest.fixture
def folder(save_model):
    return save_model(LlamaConfig(**SMALL))


def change_config(folder, **fields):
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def test_sharded_checkpoint_equals_the_single_file(save_model):
    single = resolve(str(save_model(LlamaConfig(**SMALL))))
    tensors = {name: single.tensor(name) for name in single.names()}
    sharded_folder = save_model(LlamaConfig(**SMALL), max_shard_size="20KB")
    (sharded_folder / "model.safetensors").unlink()
    assert (sharded_folder / "model.safetensors.index.json").exists()
    sharded = resolve(str(sharded_folder))
    assert sharded.names() == tensors.keys()
    assert all(torch.equal(sharded.tensor(name), tensor) for name, tensor in tensors.items())
    load_model(str(sharded_folder), device="cpu")


def test_loaded_model_describes_itself(folder):
    model = load_model(str(folder), dtype="bfloat16", device="cpu")
    assert (model.source, model.family, model.max_position, model.eos_token_ids) == ("safetensors", "llama", 64, (256,))
    assert model.spec.num_kv_heads == model.decoder.num_kv_heads == 1
    assert model.spec.head_dim == model.decoder.head_dim == 16
    assert model.decoder.embed_tokens.format.rows(torch.tensor([0])).dtype == model.dtype == torch.bfloat16
    assert len(model.fingerprint) == 64
    assert model.weights_format() == "model"
    assert model.weights_path() == "model: bfloat16 matmul"


def test_a_generation_ends_where_the_generation_settings_or_the_tokenizer_say(folder):
    """A chat fine-tune keeps its base model's settings (end of text) beside its own tokenizer (end of turn)."""
    settings = folder / "generation_config.json"
    for stated, expected in (([7, 256], (7, 256)), (7, (7, 256)), ([True, -1, None, 9], (9, 256)), (None, (256,))):
        settings.write_text(json.dumps({"eos_token_id": stated}))
        assert load_model(str(folder), device="cpu").eos_token_ids == expected


def test_fingerprint_follows_the_content(folder):
    first = resolve(str(folder)).fingerprint()
    assert resolve(str(folder)).fingerprint() == first
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert resolve(str(folder)).fingerprint() != first


def test_broken_config_is_reported_as_such(folder):
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"')
    with pytest.raises(ModelLoadError, match="is not valid JSON") as caught:
        load_model(str(folder), device="cpu")
    assert caught.value.field == "config.json"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "'MambaForCausalLM' is not supported"),
        ({"architectures": "Llama"}, "architectures: architecture 'Llama' is not supported"),
        ({"architectures": ..., "model_type": "t5"}, "'t5' is not supported"),
        ({"hidden_size": ...}, "hidden_size: is missing"),
        ({"num_hidden_layers": -2}, "num_hidden_layers: -2 is not a positive whole number"),
        ({"num_attention_heads": "many"}, "num_attention_heads: 'many'"),
        ({"num_key_value_heads": 3}, "3 does not divide"),
        ({"hidden_act": "quick_gelu"}, "'quick_gelu' is not supported"),
        ({"rope_parameters": {"rope_type": "ntk", "rope_theta": 1e4, "factor": 4.0}}, "'ntk' is not supported"),
        ({"rope_parameters": ..., "rope_scaling": {"type": "axial", "factor": 2.0}}, "'axial' is not supported"),
        ({"quantization_config": {"quant_method": "awq"}}, "'awq' are not supported"),
        ({"intermediate_size": 128}, "gate_up_proj has shape"),
        ({"vocab_size": 999}, "embed_tokens has shape"),
        ({"num_hidden_layers": 3}, "lacks the tensor 'model.layers.2"),
    ],
)
def test_configuration_that_cannot_run_names_the_field(folder, fields, message):
    change_config(folder, **fields)
    with pytest.raises(ModelLoadError, match=message) as caught:
        load_model(str(folder), device="cpu")
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("config.json", "has no config.json"),
        ("model.safetensors", r"contains no \*.safetensors"),
        ("tokenizer.json", "tokenizer in .* cannot be loaded"),
    ],
)
def test_missing_file_is_named(folder, name, message):
    (folder / name).unlink()
    with pytest.raises(ModelLoadError, match=message):
        load_model(str(folder), device="cpu")


def test_missing_shard_is_named(save_model):
    folder = save_model(MistralConfig(**SMALL), max_shard_size="20KB")
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ModelLoadError, match=f"lacks {shard.name}"):
        resolve(str(folder))


def test_safetensors_cut_in_half_are_refused(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ModelLoadError, match=r"model.safetensors cannot be read"):
        load_model(str(folder), device="cpu")


@pytest.mark.parametrize(
    "name", ["no-such-model", "/no/such/folder", "./nowhere", "a/b/c", "", "x" * 5000, "~nobody-here/x"]
)
def test_unknown_model_says_what_a_model_is(name):
    with pytest.raises(ModelLoadError, match="there is no model") as caught:
        load_model(name)
    assert "smollm2-135m" in caught.value.remedy


def test_file_of_another_kind_says_what_a_model_is(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(ModelLoadError, match=r"is not a \.gguf file"):
        resolve(str(tmp_path / "model.bin"))


def test_hub_id_without_a_hub_names_the_remedy():
    with pytest.raises(ModelLoadError, match="could not be fetched from the model hub") as caught:
        load_model("headroom-tests/does-not-exist")
    assert "give the path of its folder" in caught.value.remedy


@pytest.mark.parametrize(("field", "value"), [("device", "cuda:99"), ("device", "toaster"), ("dtype", "int3")])
def test_device_and_dtype_that_cannot_be_had_are_refused(folder, field, value):
    with pytest.raises(ConfigError) as caught:
        load_model(str(folder), **{field: value})
    assert caught.value.field == field


def test_model_larger_than_free_memory_is_refused_before_it_is_read(folder, monkeypatch):
    monkeypatch.setattr(weight_swap, "free_bytes", lambda device: 1000)
    monkeypatch.setattr(SafetensorsCheckpoint, "tensor", lambda self, name: pytest.fail("read a weight"))
    with pytest.raises(CapacityError, match=r"the weights need .* GiB in float32"):
        load_model(str(folder), dtype="float32", device="cpu")


def test_progress_never_goes_back_and_ends_at_one(folder):
    seen = []
    load_model(str(folder), device="cpu", progress=lambda stage, fraction: seen.append((stage, fraction)))
    fractions = [fraction for _, fraction in seen]
    assert fractions == sorted(fractions)
    assert seen[-1] == ("ready", 1.0)
