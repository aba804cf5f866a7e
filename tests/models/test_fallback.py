"""Families without a row run through transformers on our scheduler and cache, and say so; what cannot, is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    DeepseekV3Config,
    Gemma2Config,
    GptOssConfig,
    JambaConfig,
    Lfm2Config,
    LlamaConfig,
    MambaConfig,
    StableLmConfig,
)
from transformers.models.gpt_neox import modeling_gpt_neox

from engine.capacity import CacheLayout, kv_bytes_per_block
from engine.capacity.formats import FLOAT32
from engine.config import EngineConfig
from engine.core import Engine
from engine.errors import CapacityError, ConfigError, ModelLoadError
from engine.models import load_model, weight_swap
from engine.models.fallback import TransformersDecoder, context_of
from engine.reconfigure import reconfigure
from engine.sizing import describe_model
from engine.status import path_of
from tests.family_cases import BASE, FALLBACKS, LONGROPE

TINY_STATE = {"vocab_size": 257, "hidden_size": 32, "num_hidden_layers": 2, "eos_token_id": 256}


def change_config(folder: Any, **fields: Any) -> None:
    config = {**json.loads((folder / "config.json").read_text()), **fields}
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


@pytest.fixture
def neox(save_model):
    return save_model(FALLBACKS["gpt_neox"])


def test_recorded_path_says_that_transformers_computes_the_blocks(neox):
    model = load_model(str(neox), dtype="float32", device="cpu")
    engine = Engine(model, EngineConfig.from_mapping({"memory_limit_gib": 0.1}))
    assert path_of(engine)["decoder"] == ("fallback: transformers GPTNeoXForCausalLM, attention and cache by Headroom")
    assert path_of(engine)["weights"] == "model: float32 matmul by transformers"
    assert (model.family, model.source, model.max_position) == ("gpt_neox", "safetensors", 256)


def test_engine_sizes_its_cache_from_what_the_fallback_really_has(save_model):
    model = load_model(str(save_model(FALLBACKS["starcoder2, window"])), dtype="float32", device="cpu")
    engine = Engine(model, EngineConfig.from_mapping({"memory_limit_gib": 0.1, "block_size": 16}))
    per_block = 2 * 3 * 16 * 1 * 32 * 4  # keys and values · layers · tokens · heads · head_dim · bytes
    assert kv_bytes_per_block(model.spec, CacheLayout(FLOAT32.as_kv, block_size=16)) == per_block
    assert engine.cache.nbytes == engine.envelope.num_blocks * per_block
    assert model.decoder.layer_windows == [16, 16, 16]
    parameters = sum(parameter.numel() for parameter in model.decoder.model.parameters())
    assert describe_model(model, engine.config)["parameters"] == parameters
    assert engine.envelope.weights_bytes == model.decoder.resident_bytes() >= 4 * parameters


def test_two_fallback_engines_in_one_process_do_not_share_anything(save_model, tmp_path):
    engines = []
    for name in ("gpt_neox", "cohere"):
        folder = save_model(FALLBACKS[name])
        folder = folder.rename(tmp_path / name)
        model = load_model(str(folder), dtype="float32", device="cpu")
        engines.append(Engine(model, EngineConfig.from_mapping({"memory_limit_gib": 0.1})))
    alone = [engine.prompt_logits(list(range(20))) for engine in engines]
    again = [engine.prompt_logits(list(range(20))) for engine in reversed(engines)][::-1]
    assert all(torch.equal(a, b) for a, b in zip(alone, again, strict=True))


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_quantized_weights_are_refused_at_load_and_while_serving(neox, weights):
    model = load_model(str(neox), dtype="float32", device="cpu")
    with pytest.raises(ConfigError, match="GPTNeoXForCausalLM, which runs through transformers") as caught:
        Engine(model, EngineConfig.from_mapping({"memory_limit_gib": 0.1, "weights": weights}))
    assert caught.value.field == "weights"
    engine = Engine(model, EngineConfig.from_mapping({"memory_limit_gib": 0.1}))
    with pytest.raises(ConfigError, match="not available"):
        reconfigure(engine, {"weights": weights})
    assert engine.config.weights == "model"


REFUSED = {
    "attention of its own": (StableLmConfig(**BASE), "attention in transformers cannot be replaced"),
    "no attention": (MambaConfig(**TINY_STATE), "cannot be replaced"),
    "state beside attention": (
        JambaConfig(
            **TINY_STATE, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1, use_mamba_kernels=False
        ),
        "cannot be replaced",
    ),
    "convolutions between": (
        Lfm2Config(**{**BASE, "num_attention_heads": 4, "num_key_value_heads": 2}, full_attn_idxs=[1]),
        "layers of the kind conv",
    ),
    "latent attention": (
        DeepseekV3Config(
            **{**BASE, "num_attention_heads": 4, "num_key_value_heads": 4},
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=16,
            v_head_dim=16,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_group=1,
            topk_group=1,
            moe_intermediate_size=32,
        ),
        "queries, keys and values differ in width",
    ),
    "attention sinks": (GptOssConfig(**BASE, head_dim=16, num_local_experts=4), "attention needs s_aux"),
    "attention to later tokens": (
        BertConfig(vocab_size=257, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4),
        "sees later tokens",
    ),
    "soft cap": (Gemma2Config(**BASE, head_dim=16), "attention needs softcap"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_model_that_is_not_plain_attention_is_refused_with_the_reason(name, save_model):
    config, reason = REFUSED[name]
    folder = save_model(config)
    with pytest.raises(ModelLoadError, match=reason) as caught:
        load_model(str(folder), device="cpu")
    assert caught.value.field == "architectures"
    assert "LlamaForCausalLM" in caught.value.remedy


@pytest.mark.parametrize("defect", ["tokens mix outside attention", "positions are ignored"])
def test_probe_notices_a_model_that_would_be_computed_wrongly(neox, monkeypatch, defect):
    if defect == "positions are ignored":
        forward = modeling_gpt_neox.GPTNeoXRotaryEmbedding.forward

        def ignoring(self: Any, x: torch.Tensor, position_ids: torch.Tensor) -> Any:
            return forward(self, x, torch.arange(x.shape[1]).unsqueeze(0))

        monkeypatch.setattr(modeling_gpt_neox.GPTNeoXRotaryEmbedding, "forward", ignoring)
    else:
        mlp = modeling_gpt_neox.GPTNeoXMLP.forward
        monkeypatch.setattr(
            modeling_gpt_neox.GPTNeoXMLP, "forward", lambda self, x: mlp(self, x + 0.5 * x.roll(1, dims=1))
        )
    with pytest.raises(ModelLoadError, match="influence each other outside attention, or it ignores the positions"):
        load_model(str(neox), dtype="float32", device="cpu")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architectures": ["GPTNeoXForSequenceClassification"]}, "has no causal LM of that name"),
        ({"architectures": ["T5ForConditionalGeneration"], "model_type": "t5"}, "has no causal LM of that name"),
        ({"architectures": ["NovelForCausalLM"], "model_type": "novel"}, "transformers cannot read its config.json"),
        (
            {
                "architectures": ["NovelForCausalLM"],
                "model_type": "novel",
                "auto_map": {"AutoConfig": "configuration_novel.NovelConfig"},
            },
            "needs code of its own, which is never executed",
        ),
        ({"architectures": ..., "model_type": ...}, "'None' is not supported"),
    ],
)
def test_configuration_that_names_no_causal_lm_is_refused(neox, fields, message):
    change_config(neox, **fields)
    with pytest.raises(ModelLoadError, match=message):
        load_model(str(neox), device="cpu")


def test_tensor_that_is_missing_is_not_made_up(neox):
    tensors = load_file(neox / "model.safetensors")
    name = next(name for name in sorted(tensors) if "dense_h_to_4h.weight" in name)
    del tensors[name]
    save_file(tensors, neox / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match=f"lacks the tensor '{name}'"):
        load_model(str(neox), device="cpu")


def test_fallback_larger_than_free_memory_is_refused_before_it_is_read(neox, monkeypatch):
    monkeypatch.setattr(weight_swap, "free_bytes", lambda device: 1000)
    monkeypatch.setattr(TransformersDecoder, "__init__", lambda self, model: pytest.fail("read the weights"))
    with pytest.raises(CapacityError, match=r"the weights need .* GiB in float32"):
        load_model(str(neox), dtype="float32", device="cpu")


def test_context_of_a_longrope_model_is_the_original_one():
    config = LlamaConfig(**{**BASE, "max_position_embeddings": 2048})
    assert context_of(config) == 2048
    config.rope_parameters = {**LONGROPE}
    assert context_of(config) == 256


def test_model_that_does_not_say_how_long_it_reads_is_refused():
    with pytest.raises(ModelLoadError, match="context length is unknown") as caught:
        context_of(MambaConfig(**TINY_STATE))
    assert caught.value.field == "max_position_embeddings"


def test_native_linear_layers_are_refused_by_their_own_name(neox):
    model = load_model(str(neox), dtype="float32", device="cpu")
    with pytest.raises(ConfigError, match="runs through transformers") as caught:
        Engine(model, EngineConfig.from_mapping({"memory_limit_gib": 0.1, "linear": "native"}))
    assert caught.value.field == "linear"
    assert "torch" in caught.value.remedy
