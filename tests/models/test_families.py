"""Families are rows: what a config.json means, what it means where it is silent, and what is refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import AutoConfig, Gemma3TextConfig, MixtralConfig, Phi3Config, Qwen3MoeConfig

from engine.capacity import weight_bytes
from engine.capacity.formats import BFLOAT16, FLOAT32
from engine.capacity.memory.profiles import find_profile, profile_weight_precision
from engine.config import EngineConfig
from engine.core import Engine
from engine.errors import ModelLoadError
from engine.layers.mixture import MixtureMLP
from engine.layers.rope_scaling import LongRopeScaling, YarnScaling
from engine.models import load_model
from engine.models.decoder_config import read_decoder_config
from engine.models.families import FAMILIES, family_of
from engine.reconfigure import reconfigure
from tests import family_cases
from tests.family_cases import BASE, CONTEXT, LONGROPE, rope

DIMENSIONS = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "vocab_size": 257,
    "num_hidden_layers": 30,
    "num_attention_heads": 32,
}
WIDE = {**BASE, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
SWAPPED = {
    "gemma3": Gemma3TextConfig(**WIDE, head_dim=32, sliding_window=16),
    "phi3": Phi3Config(**WIDE),
    "mixtral": MixtralConfig(**WIDE, num_local_experts=3),
    "qwen3 moe": Qwen3MoeConfig(
        **WIDE, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, mlp_only_layers=[1]
    ),
}


def decoder_config(config: dict[str, Any]) -> Any:
    family = family_of(config)
    assert family is not None
    return read_decoder_config(config, family)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_what_a_config_leaves_out_means_what_transformers_assumes(family):
    silent = {"architectures": list(family.architectures), "model_type": family.name, **DIMENSIONS}
    complete = AutoConfig.for_model(family.name, **DIMENSIONS).to_dict() | {"architectures": silent["architectures"]}
    assert decoder_config(silent) == decoder_config(complete)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_model_type_alone_finds_the_family(family):
    assert family_of({"model_type": family.name}) is family


def test_gemma_reads_the_fields_of_older_files_and_of_newer_ones_alike():
    older = {
        "architectures": ["Gemma3ForCausalLM"],
        **DIMENSIONS,
        "num_hidden_layers": 7,
        "sliding_window": 512,
        "sliding_window_pattern": 3,
        "rope_theta": 5e5,
        "rope_local_base_freq": 2e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }
    newer = {
        "architectures": ["Gemma3ForCausalLM"],
        **DIMENSIONS,
        "num_hidden_layers": 7,
        "sliding_window": 512,
        "layer_types": [("full" if index in (2, 5) else "sliding") + "_attention" for index in range(7)],
        "rope_parameters": {
            "full_attention": rope("linear", 5e5, factor=8.0),
            "sliding_attention": rope("default", 2e4),
        },
    }
    config = decoder_config(older)
    assert config == decoder_config(newer)
    assert config.layer_windows == (512, 512, None, 512, 512, None, 512)
    assert [rope.theta for rope in config.layer_ropes[1:4]] == [2e4, 5e5, 2e4]
    assert config.layer_ropes[1].scaling is None


@pytest.mark.parametrize(
    ("fields", "windows"),
    [
        ({"use_sliding_window": True, "max_window_layers": 2}, (None, None, 16)),
        ({"use_sliding_window": True, "max_window_layers": 0}, (16, 16, 16)),
        ({"use_sliding_window": True, "sliding_window": None}, (None, None, None)),
        ({"use_sliding_window": False}, (None, None, None)),
    ],
)
@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_windows_of_a_qwen_are_those_of_transformers_also_without_layer_types(name, fields, windows):
    stated = {**BASE, "sliding_window": 16, "head_dim": 16, **fields}
    known = AutoConfig.for_model(name, **stated).to_dict()
    assert [kind == "sliding_attention" for kind in known["layer_types"]] == [window is not None for window in windows]
    assert decoder_config({"model_type": name, **stated}).layer_windows == windows


def test_yarn_serves_the_extended_context_and_longrope_the_original_one():
    yarn = rope("yarn", factor=4.0, original_max_position_embeddings=32768)
    config = decoder_config({"architectures": ["LlamaForCausalLM"], **BASE, "rope_parameters": yarn})
    assert config.max_position == 4 * 32768
    scaling = config.layer_ropes[0].scaling
    assert isinstance(scaling, YarnScaling)
    assert scaling.attention_factor == pytest.approx(1.1386294, abs=1e-6)  # 0.1·ln(4) + 1
    long = Phi3Config(**{**BASE, "max_position_embeddings": 8 * CONTEXT}, rope_parameters=LONGROPE)
    fields = {**long.to_dict(), "architectures": ["Phi3ForCausalLM"], "original_max_position_embeddings": CONTEXT}
    config = decoder_config(fields)
    assert config.max_position == CONTEXT
    assert isinstance(config.layer_ropes[0].scaling, LongRopeScaling)


def test_experts_are_placed_where_the_configuration_says():
    fields = {"architectures": ["Qwen3MoeForCausalLM"], **DIMENSIONS, "num_hidden_layers": 9, "num_experts": 4}
    fields |= {"num_experts_per_tok": 2, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
    assert decoder_config(fields).mixture_layers == {1, 5, 7}


@pytest.mark.parametrize(
    ("architecture", "fields", "field", "message"),
    [
        ("Gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping", "soft cap on attention"),
        ("Gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention", "later tokens"),
        ("Gemma3", {"hidden_activation": "quick_gelu"}, "hidden_activation", "'quick_gelu' is not supported"),
        ("Gemma3", {"layer_types": ["full_attention"]}, "layer_types", "for each of 30 layers"),
        ("Mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok", "9 are more than the 8 experts"),
        ("Mixtral", {"num_local_experts": 0}, "num_local_experts", "not a positive whole number"),
        ("Qwen3Moe", {"mlp_only_layers": 3}, "mlp_only_layers", "list of layer indices"),
        ("Llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor", "not part of llama"),
        ("Llama", {"rope_scaling": {"rope_type": "ntk-by-parts"}}, "rope_scaling", "'ntk-by-parts' is not supported"),
        ("Llama", {"rope_scaling": {"rope_type": "yarn"}}, "factor", "is missing"),
        ("Llama", {"rope_scaling": {"rope_type": "dynamic", "factor": -1}}, "factor", "not a positive number"),
        ("Phi3", {"partial_rotary_factor": 0.7, "head_dim": 10}, "partial_rotary_factor", "not an even number"),
        ("Phi3", {"rope_scaling": {"type": "su", "short_factor": [1.0, 2.0]}}, "short_factor", "2 factors for 1"),
        ("Phi3", {"rope_scaling": {"type": "longrope"}}, "short_factor", "list of positive numbers"),
    ],
)
def test_option_that_is_not_computed_is_refused_by_name(architecture, fields, field, message):
    with pytest.raises(ModelLoadError, match=message) as caught:
        decoder_config({"architectures": [f"{architecture}ForCausalLM"], **DIMENSIONS, **fields})
    assert caught.value.field == field
    assert caught.value.remedy


@pytest.mark.parametrize("name", family_cases.FAMILIES)
def test_planned_weights_are_what_each_family_holds(name, save_model):
    model = load_model(str(save_model(family_cases.FAMILIES[name])), dtype="bfloat16", device="cpu")
    assert weight_bytes(model.spec, BFLOAT16.as_weights) == model.weight_bytes()
    assert model.spec.layer_windows == tuple(model.decoder.layer_windows)
    assert "own decoder" in model.decoder_path()


@pytest.mark.parametrize(("weights", "planned"), [("int8", "int8"), ("int4", "int4-g32")])
@pytest.mark.parametrize("name", SWAPPED)
def test_weights_of_every_family_are_swapped_and_restored_bit_identical(name, weights, planned, save_model):
    model = load_model(str(save_model(SWAPPED[name])), dtype="float32", device="cpu")
    before = {name: linear.format.dequantize() for name, linear, _ in model.decoder.linears()}
    engine = Engine(model, EngineConfig.from_mapping({"memory_limit_gib": 0.1, "max_num_batched_tokens": 64}))
    expected = engine.prompt_logits(list(range(40)))
    reconfigure(engine, {"weights": weights, "group_size": 32})
    assert all(linear.format.name != "model" for _, linear, _ in model.decoder.linears())
    planned_format = profile_weight_precision(find_profile("headroom"), planned, model.spec)
    assert model.weight_bytes() == weight_bytes(model.spec, planned_format, FLOAT32)
    assert not torch.equal(engine.prompt_logits(list(range(40))), expected)
    reconfigure(engine, {"weights": "model"})
    after = {name: linear.format.dequantize() for name, linear, _ in model.decoder.linears()}
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(engine.prompt_logits(list(range(40))), expected)


class _CountingExpert(torch.nn.Module):
    """Multiplies by a number and remembers how many rows each call had."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor
        self.calls: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.append(x.shape[0])
        return x * self.factor


def test_each_expert_with_tokens_computes_them_in_one_product_and_no_other_runs():
    experts = [_CountingExpert(float(factor)) for factor in (1, 10, 100, 1000)]
    router = torch.tensor([[9.0, 0.0], [0.0, 9.0], [-9.0, -9.0], [5.0, 5.0]])
    mixture = MixtureMLP(router, experts, experts_per_token=2, normalizes=True)  # type: ignore[arg-type]
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.1]])
    weights, chosen = mixture.route(x)
    assert chosen.tolist() == [[0, 3], [1, 3], [0, 3]]
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(3))
    factors = torch.tensor([expert.factor for expert in experts])
    torch.testing.assert_close(mixture(x), x * (weights * factors[chosen]).sum(dim=-1, keepdim=True))
    assert [expert.calls for expert in experts] == [[2], [1], [], [3]]


def test_token_of_a_mixture_is_the_same_whatever_else_is_in_the_batch(save_model):
    model = load_model(str(save_model(family_cases.FAMILIES["qwen3 moe"])), dtype="float32", device="cpu")
    mixture = model.decoder.layers[0].mlp
    x = torch.randn(50, 96, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(mixture(x)[:1], mixture(x[:1]), atol=1e-6, rtol=1e-6)


def test_mixture_of_which_an_expert_is_missing_is_refused(save_model):
    folder = save_model(family_cases.FAMILIES["mixtral"])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_local_experts": 5}))
    with pytest.raises(ModelLoadError, match=r"lacks the tensor 'model.layers.0.block_sparse_moe.experts.4.w1.weight'"):
        load_model(str(folder), device="cpu")


def test_experts_lie_in_one_tensor_until_they_are_quantized(save_model):
    model = load_model(str(save_model(family_cases.FAMILIES["qwen3 moe"])), dtype="float32", device="cpu")
    mixture = next(layer.mlp for layer in model.decoder.layers if isinstance(layer.mlp, MixtureMLP))
    stacked = mixture.stacked()
    assert stacked is not None
    gate_up, down = stacked
    for index, expert in enumerate(mixture.experts):
        assert torch.equal(gate_up[index], expert.gate_up_proj.format.weight)
        assert torch.equal(down[index], expert.down_proj.format.weight)
        assert gate_up[index].data_ptr() == expert.gate_up_proj.format.weight.data_ptr()  # views, not copies
    model.commit_weights(model.prepare_weights("int8", 32))
    assert mixture.stacked() is None
