"""A GGUF file stands for the same model as the folder it was made from; a damaged one is refused by name."""

from __future__ import annotations

import struct

import gguf
import numpy as np
import pytest
import torch
from transformers import Gemma3TextConfig, LlamaConfig, Qwen2Config, Qwen3Config

from engine.errors import ModelLoadError
from engine.models import load_model, resolve
from engine.models.gguf_file import GGUFFile
from tests.gguf_names import GEMMA, LLAMA, gguf_name

SHAPE = {
    "vocab_size": 258,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "eos_token_id": 256,
    "bos_token_id": None,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
CONFIG = LlamaConfig(**SHAPE)
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def permuted(weight, num_heads):
    """What llama.cpp's conversion does to query and key rows: halves (i, i + D/2) become pairs (2i, 2i + 1)."""
    return (
        weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, *weight.shape[1:])
        .swapaxes(1, 2)
        .reshape(weight.shape)
    )


def write_gguf(path, checkpoint, *, architecture="llama", quantize=None, rope_factors=None, names=LLAMA):
    """The folder's weights as llama.cpp would convert them, with the tiny byte-level tokenizer."""
    writer = gguf.GGUFWriter(path, architecture)
    add_metadata(writer, checkpoint.config)
    add_tokenizer(writer)
    for name in sorted(checkpoint.names()):
        weight = checkpoint.tensor(name).float().numpy()  # norms of Gemma as 1 + w, which is what a GGUF file has
        if architecture == "llama" and "q_proj" in name:
            weight = permuted(weight, 4)
        elif architecture == "llama" and "k_proj" in name:
            weight = permuted(weight, 2)
        if quantize is not None and weight.ndim == 2:
            raw = gguf.quants.quantize(weight, quantize)
            writer.add_tensor(gguf_name(name, names), raw, raw_dtype=quantize)
        else:
            writer.add_tensor(gguf_name(name, names), np.ascontiguousarray(weight))
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", rope_factors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_metadata(writer, config):
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    if head_dim * config["num_attention_heads"] != config["hidden_size"]:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    everywhere = config["rope_parameters"].get("full_attention", config["rope_parameters"])
    writer.add_rope_freq_base(everywhere["rope_theta"])
    if "factor" in everywhere and everywhere["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(everywhere["factor"])
    if config.get("sliding_window"):
        writer.add_sliding_window(config["sliding_window"])


def add_tokenizer(writer):
    tokens = [*sorted(_byte_alphabet()), "<|end|>", "!!"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 256 + [3, 1])
    writer.add_token_merges(["! !"])
    writer.add_eos_token_id(256)


def _byte_alphabet():
    from tokenizers import pre_tokenizers

    return pre_tokenizers.ByteLevel.alphabet()


SEQUENCE = list(range(3, 90))


def test_gguf_gives_the_logits_of_the_folder_it_was_made_from(save_model, logits_of, tmp_path):
    folder = save_model(CONFIG)
    path = write_gguf(tmp_path / "m.gguf", resolve(str(folder)))
    expected = logits_of(load_model(str(folder), dtype="float32", device="cpu").decoder, [SEQUENCE])
    model = load_model(str(path), dtype="float32", device="cpu")
    assert torch.equal(logits_of(model.decoder, [SEQUENCE]), expected)
    assert (model.source, model.family, model.max_position, model.eos_token_ids) == ("gguf", "llama", 256, (256,))
    assert model.tokenizer("ab\n").input_ids == load_model(str(folder), device="cpu").tokenizer("ab\n").input_ids


OTHERS = {
    "qwen2": (Qwen2Config(**SHAPE), LLAMA),
    "qwen3": (Qwen3Config(**SHAPE, head_dim=32), LLAMA),
    "gemma3": (
        Gemma3TextConfig(
            **{**SHAPE, "num_hidden_layers": 7, "tie_word_embeddings": True},
            head_dim=32,
            query_pre_attn_scalar=32,
            sliding_window=20,
            rope_parameters={
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        ),
        GEMMA,
    ),
}


@pytest.mark.parametrize("architecture", OTHERS)
def test_gguf_of_another_family_gives_the_logits_of_the_folder_it_was_made_from(
    architecture, save_model, logits_of, tmp_path
):
    config, names = OTHERS[architecture]
    folder = save_model(config)
    path = write_gguf(tmp_path / "m.gguf", resolve(str(folder)), architecture=architecture, names=names)
    reference = load_model(str(folder), dtype="float32", device="cpu").decoder
    decoder = load_model(str(path), dtype="float32", device="cpu").decoder
    assert decoder.layer_windows == reference.layer_windows
    assert torch.equal(logits_of(decoder, [SEQUENCE]), logits_of(reference, [SEQUENCE]))


def test_mixture_in_a_gguf_is_refused_by_name(save_model, tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "m.gguf", resolve(str(save_model(CONFIG))))
    parse = GGUFFile._parse
    monkeypatch.setattr(GGUFFile, "_parse", lambda self: (parse(self), self.metadata.update({"llama.expert_count": 8})))
    with pytest.raises(ModelLoadError, match="mixtures of experts are read from safetensors only"):
        resolve(str(path))


def test_rope_factors_of_a_gguf_are_the_llama3_scaling_of_a_folder(save_model, logits_of, tmp_path):
    folder = save_model(LlamaConfig(**{**CONFIG.to_diff_dict(), "rope_parameters": LLAMA3_ROPE}))
    reference = load_model(str(folder), dtype="float32", device="cpu").decoder
    plain = 10000.0 ** -(np.arange(0, 16, 2) / 16)
    factors = (plain / reference.rotaries[0].inv_freq.numpy()).astype(np.float32)
    assert factors.max() > 7
    path = write_gguf(tmp_path / "m.gguf", resolve(str(folder)), rope_factors=factors)
    found = logits_of(load_model(str(path), dtype="float32", device="cpu").decoder, [SEQUENCE])
    torch.testing.assert_close(found, logits_of(reference, [SEQUENCE]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0"])
def test_stored_types_are_read_as_the_gguf_package_reads_them(kind, save_model, tmp_path):
    quantization = gguf.GGMLQuantizationType[kind]
    path = write_gguf(tmp_path / "m.gguf", resolve(str(save_model(CONFIG))), quantize=quantization)
    ours = GGUFFile(path)
    for tensor in gguf.GGUFReader(path).tensors:
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(ours.read(tensor.name).float().numpy(), expected)


@pytest.mark.model
def test_gguf_cut_in_half_is_refused_and_the_message_says_where(default_gguf, tmp_path):
    content = default_gguf.read_bytes()
    path = tmp_path / "half.gguf"
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelLoadError, match=r"cut off: tensor .* ends at byte .* but the file has 49,181,216 bytes"):
        load_model(str(path), device="cpu")


@pytest.mark.parametrize("length", [0, 3, 20, 100, 700])
def test_gguf_cut_in_its_header_is_refused(length, save_model, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", resolve(str(save_model(CONFIG))))
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ModelLoadError, match=r"m\.gguf") as caught:
        load_model(str(path), device="cpu")
    assert "download it again" in caught.value.remedy


def test_last_byte_missing_is_noticed(save_model, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", resolve(str(save_model(CONFIG))))
    last = max(tensor.offset + tensor.num_bytes for tensor in GGUFFile(path).tensors.values())
    path.write_bytes(path.read_bytes()[: last - 1])
    with pytest.raises(ModelLoadError, match="cut off"):
        resolve(str(path))


def test_text_named_gguf_is_refused(tmp_path):
    path = tmp_path / "notes.gguf"
    path.write_text("not a model" * 100)
    with pytest.raises(ModelLoadError, match="is not a GGUF file"):
        resolve(str(path))


def test_absurd_counts_in_the_header_do_not_hang(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60) + bytes(1000))
    with pytest.raises(ModelLoadError, match="header is damaged"):
        resolve(str(path))


def test_unsupported_gguf_architecture_is_named_with_what_is_supported(save_model, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", resolve(str(save_model(CONFIG))), architecture="mamba")
    with pytest.raises(ModelLoadError, match="'mamba' is not supported") as caught:
        resolve(str(path))
    assert "LlamaForCausalLM" in caught.value.remedy


def test_part_of_a_split_model_is_refused_with_the_way_to_merge(save_model, tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "m.gguf", resolve(str(save_model(CONFIG))))
    monkeypatch.setattr(GGUFFile, "_parse", lambda self: self.metadata.update({"split.count": 3}))
    with pytest.raises(ModelLoadError, match="split over several files") as caught:
        resolve(str(path))
    assert "merge" in caught.value.remedy.lower()


def test_converted_tokenizer_is_kept_and_made_again_if_damaged(save_model, tmp_path, monkeypatch):
    monkeypatch.setenv("HEADROOM_HOME", str(tmp_path / "home"))
    path = write_gguf(tmp_path / "m.gguf", resolve(str(save_model(CONFIG))))
    expected = load_model(str(path), device="cpu").tokenizer("hello").input_ids
    (kept,) = (tmp_path / "home" / "cache" / "tokenizers").glob("*/tokenizer.json")
    assert load_model(str(path), device="cpu").tokenizer("hello").input_ids == expected
    kept.write_text("{")
    assert load_model(str(path), device="cpu").tokenizer("hello").input_ids == expected
    assert kept.stat().st_size > 100
