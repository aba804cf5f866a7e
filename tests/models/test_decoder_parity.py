"""The decoder computes what transformers computes, in float32, for every shape it accepts."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

from engine.models import load_model

BASE = {
    "vocab_size": 257,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "eos_token_id": 256,
    "bos_token_id": None,
    "tie_word_embeddings": False,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CONFIGS = {
    "llama untied": LlamaConfig(**BASE),
    "llama tied": LlamaConfig(**{**BASE, "tie_word_embeddings": True}),
    "llama with biases": LlamaConfig(**BASE, attention_bias=True, mlp_bias=True),
    "llama, head wider than hidden / heads": LlamaConfig(**BASE, head_dim=32),
    "llama, multi-head": LlamaConfig(**{**BASE, "num_key_value_heads": 4}),
    "llama 3 rope": LlamaConfig(**BASE, rope_parameters=LLAMA3_ROPE),
    "linear rope": LlamaConfig(**BASE, rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}),
    "mistral, sliding window": MistralConfig(**BASE, sliding_window=16),
    "mistral, full attention": MistralConfig(**BASE, sliding_window=None),
}


def random_sequence(length: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_transformers_in_float32(name, save_model, logits_of):
    folder = save_model(CONFIGS[name])
    sequence = random_sequence(100)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.inference_mode():
        expected = reference(torch.tensor([sequence])).logits[0]
    decoder = load_model(str(folder), dtype="float32", device="cpu").decoder
    torch.testing.assert_close(logits_of(decoder, [sequence]), expected, atol=1e-4, rtol=0)


def test_sliding_window_changes_the_result_once_text_is_longer_than_it(save_model, logits_of):
    folder = save_model(CONFIGS["mistral, sliding window"])
    decoder = load_model(str(folder), dtype="float32", device="cpu").decoder
    assert decoder.layer_windows == [16, 16, 16]
    sequence = random_sequence(40)
    slid = logits_of(decoder, [sequence])
    decoder.layer_windows = [None] * 3
    full = logits_of(decoder, [sequence])
    torch.testing.assert_close(slid[:16], full[:16], atol=1e-5, rtol=0)
    assert (slid[16:] - full[16:]).abs().max() > 1e-2


def test_mistral_without_a_window_in_its_config_has_the_one_transformers_assumes(save_model):
    folder = save_model(CONFIGS["mistral, full attention"])
    config = json.loads((folder / "config.json").read_text())
    del config["sliding_window"]
    (folder / "config.json").write_text(json.dumps(config))
    assert load_model(str(folder), device="cpu").decoder.layer_windows == [4096] * 3


def test_old_style_rope_fields_mean_the_same_as_the_new_ones(save_model, logits_of):
    folder = save_model(CONFIGS["llama 3 rope"])
    sequence = [random_sequence(80)]
    expected = logits_of(load_model(str(folder), dtype="float32", device="cpu").decoder, sequence)
    config = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope
    (folder / "config.json").write_text(json.dumps(config))
    assert torch.equal(logits_of(load_model(str(folder), dtype="float32", device="cpu").decoder, sequence), expected)


def test_sequences_of_a_ragged_batch_do_not_see_each_other(save_model, logits_of):
    decoder = load_model(str(save_model(CONFIGS["llama untied"])), dtype="float32", device="cpu").decoder
    sequences = [random_sequence(7, 1), random_sequence(1, 2), random_sequence(33, 3)]
    together = logits_of(decoder, sequences)
    apart = torch.cat([logits_of(decoder, [sequence]) for sequence in sequences])
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=0)


def test_positions_may_come_in_any_order():
    from engine.layers.rotary import RotaryEmbedding, apply_rotary, inverse_frequencies

    rotary = RotaryEmbedding(inverse_frequencies(8, 10000.0))
    positions = torch.tensor([5, 0, 100_000, 5])
    x = torch.randn(1, 2, 8).expand(4, 2, 8)
    rotated = apply_rotary(x, *rotary(positions))
    assert torch.equal(rotated[0], rotated[3])
    torch.testing.assert_close(rotated[1], x[1])
    torch.testing.assert_close(rotated.norm(dim=-1), x.norm(dim=-1))


def test_tied_head_is_one_tensor_counted_once(save_model):
    model = load_model(str(save_model(CONFIGS["llama tied"])), dtype="float32", device="cpu")
    assert model.decoder.lm_head is model.decoder.embed_tokens
    reference = AutoModelForCausalLM.from_config(CONFIGS["llama tied"])
    assert model.weight_bytes() == 4 * sum(parameter.numel() for parameter in reference.parameters())


@pytest.mark.model
def test_default_model_equals_transformers_in_float32(default_model_float32, hf_default_model, logits_of):
    tokenizer = default_model_float32.tokenizer
    for text in ("The capital of France is", "def f(x):\n    return x * 2\n", "Ünïcödé 你好 🎉 12345", "a"):
        sequence = tokenizer(text).input_ids
        with torch.inference_mode():
            expected = hf_default_model(torch.tensor([sequence])).logits[0]
        found = logits_of(default_model_float32.decoder, [sequence])
        torch.testing.assert_close(found, expected, atol=5e-4, rtol=0)
        assert torch.equal(found.argmax(-1), expected.argmax(-1))


@pytest.mark.model
def test_default_model_tokenizer_equals_transformers(default_model_float32, default_gguf):
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(str(default_gguf.parent), gguf_file=default_gguf.name)
    tokenizer = default_model_float32.tokenizer
    chat = [{"role": "user", "content": "Hi <|im_end|> there"}]
    for text in ("12345 a  b\tc", "你好 🎉\n\n", "<|im_start|>user\nhi<|im_end|>", ""):
        assert tokenizer(text).input_ids == reference(text).input_ids
    expected = reference.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == expected
    assert default_model_float32.eos_token_ids == (2,)
