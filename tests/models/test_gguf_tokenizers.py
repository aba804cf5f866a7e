"""Text is split as a GGUF file's ``tokenizer.ggml.pre`` says and begins with BOS where it should; nothing is added."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from engine.errors import ModelLoadError
from engine.models import load_model, resolve
from engine.models.gguf_pretokenizers import PRE_TOKENIZERS

# Published expressions of tokenizer.json, spelled out here a second time.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
EXPECTED = {
    "llama-bpe": [LLAMA3],
    "llama3": [LLAMA3],
    "pixtral": [LLAMA3],
    "qwen2": [QWEN2],
    "stablelm2": [QWEN2],
    "gpt-2": [GPT2],
    "smollm": [r"\p{N}", GPT2],
    "deepseek-coder": [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}"],
    "seed-coder": [QWEN2.replace(r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}\r\n]+")],
}
MERGES = [
    ("1", "2"),
    ("3", "4"),
    ("5", "6"),
    ("12", "34"),
    ("1234", "5"),
    ("Ċ", "Ċ"),
    (".", "Ċ"),
    ("Ġ", "Ġ"),
    ("'", "S"),
]
TEXTS = ["12345", "a 12 345", "x.\n\ny", "IT'S it's", "  \n\n", "!\n", "你好 12", "<|endoftext|>"]
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENS = [*BYTES, *(a + b for a, b in MERGES), "<|end|>", "<|begin|>"]
BEGIN, END = len(TOKENS) - 1, len(TOKENS) - 2
HIDDEN = 32


def write(path: Path, **metadata) -> str:
    """A model of one layer; ``pre``, ``bos_token_id``, ``add_bos_token`` where given, ``rows`` of the embedding."""
    rows = metadata.pop("rows", len(TOKENS))
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([1] * (len(TOKENS) - 2) + [3, 3])
    writer.add_token_merges([f"{a} {b}" for a, b in MERGES])
    writer.add_eos_token_id(END)
    for name, value in metadata.items():
        add = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32}[type(value)]
        add(name if "." in name else f"tokenizer.ggml.{name}", value)
    shapes = {
        "token_embd": (rows, HIDDEN),
        "output": (rows, HIDDEN),
        "output_norm": (HIDDEN,),
        "blk.0.attn_norm": (HIDDEN,),
        "blk.0.ffn_norm": (HIDDEN,),
        "blk.0.attn_q": (HIDDEN, HIDDEN),
        "blk.0.attn_k": (HIDDEN // 2, HIDDEN),
        "blk.0.attn_v": (HIDDEN // 2, HIDDEN),
        "blk.0.attn_output": (HIDDEN, HIDDEN),
        "blk.0.ffn_gate": (64, HIDDEN),
        "blk.0.ffn_up": (64, HIDDEN),
        "blk.0.ffn_down": (HIDDEN, 64),
    }
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.full(shape, 0.1, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch):
    monkeypatch.setenv("HEADROOM_HOME", str(tmp_path / "home"))


@pytest.mark.parametrize("pre", EXPECTED)
def test_text_is_split_as_the_pre_tokenizer_of_the_file_does(pre, tmp_path):
    reference = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(TOKENS)}, merges=MERGES))
    splits = [pre_tokenizers.Split(Regex(split), "isolated") for split in EXPECTED[pre]]
    reference.pre_tokenizer = pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(False, use_regex=False)])
    reference.decoder = decoders.ByteLevel()
    path = write(tmp_path / "m.gguf", pre=pre, add_bos_token=False)
    for _ in range(2):  # converted, and as it was kept
        tokenizer = load_model(path, dtype="float32", device="cpu").tokenizer
        for text in TEXTS:
            assert tokenizer(text).input_ids == reference.encode(text).ids, text
            assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.parametrize("pre", ["some-new-pre", "GPT-2", "afmoe"])
def test_unknown_pre_tokenizer_is_refused_with_those_that_are_known(pre, tmp_path):
    with pytest.raises(ModelLoadError, match="is not a known pre-tokenizer") as caught:
        load_model(write(tmp_path / "m.gguf", pre=pre), device="cpu")
    assert caught.value.field == "tokenizer.ggml.pre"
    assert "llama-bpe" in caught.value.message
    assert "safetensors" in caught.value.remedy


def test_file_without_a_pre_tokenizer_is_read_with_a_warning(tmp_path):
    model = load_model(write(tmp_path / "m.gguf"), dtype="float32", device="cpu")
    assert "tokenizer.ggml.pre is missing" in model.warnings[0]


@pytest.mark.parametrize(
    ("metadata", "begins"),
    [
        ({"pre": "llama-bpe", "bos_token_id": BEGIN}, True),
        ({"pre": "llama-v3", "bos_token_id": BEGIN}, True),
        ({"pre": "tekken", "bos_token_id": BEGIN}, True),
        ({"pre": "llama-bpe", "bos_token_id": BEGIN, "add_bos_token": False}, False),
        ({"pre": "qwen2", "bos_token_id": BEGIN}, False),
        ({"pre": "qwen2", "bos_token_id": BEGIN, "add_bos_token": True}, True),
        ({"pre": "llama-bpe"}, False),
    ],
)
def test_bos_begins_a_text_where_the_file_or_its_pre_tokenizer_says_so(metadata, begins, tmp_path):
    path = write(tmp_path / "m.gguf", **metadata)
    for _ in range(2):
        ids = load_model(path, dtype="float32", device="cpu").tokenizer("a").input_ids
        assert ids == ([BEGIN] if begins else []) + [BYTES.index("a")]


def test_whole_words_of_the_vocabulary_need_no_merges_where_the_pre_tokenizer_says_so():
    assert PRE_TOKENIZERS["llama-bpe"].whole_words
    assert PRE_TOKENIZERS["tekken"].whole_words
    assert not PRE_TOKENIZERS["qwen2"].whole_words


def test_every_known_expression_can_be_compiled_and_loses_no_character():
    text = "Hello WORLD it's 1234567 你好abc x.\n\ny  \n (ok) áb あカ 한국 3.14$  "
    for name, kind in PRE_TOKENIZERS.items():
        splits = [pre_tokenizers.Split(Regex(split), "isolated") for split in kind.splits]
        pieces = pre_tokenizers.Sequence(splits).pre_tokenize_str(text)
        assert "".join(piece for piece, _ in pieces) == text, name


def test_vocabulary_that_the_embedding_has_no_rows_for_is_refused_and_a_padded_one_is_not(tmp_path):
    padded = load_model(write(tmp_path / "p.gguf", pre="gpt-2", rows=len(TOKENS) + 61), dtype="float32", device="cpu")
    assert padded.decoder.vocab_size == len(TOKENS) + 61
    with pytest.raises(ModelLoadError, match="the embedding has 200 rows") as caught:
        load_model(write(tmp_path / "s.gguf", pre="gpt-2", rows=200), dtype="float32", device="cpu")
    assert caught.value.field == "vocab_size"


@pytest.mark.parametrize(
    ("metadata", "field"),
    [
        ({"split.count": "many"}, "split.count"),
        ({"llama.attention.key_length": "x"}, "llama.attention.key_length"),
        ({"llama.rope.dimension_count": 0}, "llama.rope.dimension_count"),
    ],
)
def test_metadata_of_the_wrong_kind_is_named_by_its_key(metadata, field, tmp_path):
    with pytest.raises(ModelLoadError) as caught:
        resolve(write(tmp_path / "m.gguf", pre="gpt-2", **metadata))
    assert caught.value.field == field
    assert str(tmp_path) in caught.value.message


def test_property_of_the_model_that_nothing_reads_is_named_in_a_warning(tmp_path):
    path = write(tmp_path / "m.gguf", pre="gpt-2", **{"llama.attention.clamp_kqv": 8})
    assert load_model(path, dtype="float32", device="cpu").warnings == (
        "llama.attention.clamp_kqv = 8 is not followed: llama is computed without it.",
    )
