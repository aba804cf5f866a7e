"""``headroom generate``: the tokens of the reference, streamed or as one document."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import GENERATE_KEYS, Run
from tests.conftest import DEFAULT_MODEL


def generate(run: Run, model: Path, *arguments: object) -> dict[str, Any]:
    code, out, err = run("generate", "--model", model, "--dtype", "float32", "--json", *arguments)
    assert code == 0, err
    document = json.loads(out)
    assert document.keys() == GENERATE_KEYS
    return document


def test_greedy_tokens_are_those_of_transformers(run: Run, tiny_llama: Path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    prompt = "Paged attention"
    document = generate(run, tiny_llama, "--prompt", prompt, "--max-tokens", 24)
    tokenizer = AutoTokenizer.from_pretrained(str(tiny_llama))
    model = AutoModelForCausalLM.from_pretrained(str(tiny_llama), dtype=torch.float32)
    inputs = tokenizer(prompt, return_tensors="pt")
    expected = model.generate(
        inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=24, do_sample=False
    )
    assert document["prompt_token_ids"] == inputs.input_ids[0].tolist()
    assert document["token_ids"] == expected[0, inputs.input_ids.shape[1] :].tolist()


def test_text_is_streamed_as_it_is_in_the_document(run: Run, tiny_llama: Path, tmp_path: Path):
    file = tmp_path / "prompt.txt"
    file.write_text("a prompt\n", encoding="utf-8")
    common = ("--prompt-file", file, "--max-tokens", 20, "--ignore-eos")
    document = generate(run, tiny_llama, *common)
    assert document["prompt_token_ids"] == generate(run, tiny_llama, "--prompt", "a prompt\n")["prompt_token_ids"]
    code, out, err = run("generate", "--model", tiny_llama, "--dtype", "float32", *common)
    assert code == 0
    assert out == document["text"] + "\n"
    assert "20 tokens (length)" in err
    assert "tokens/s" in err


def test_sampling_is_off_unless_asked_for_and_repeats_with_its_seed(run: Run, tiny_llama: Path):
    def tokens(*arguments: object) -> list[int]:
        return generate(run, tiny_llama, "--prompt", "hello", "--max-tokens", 16, "--ignore-eos", *arguments)[
            "token_ids"
        ]

    greedy = tokens("--greedy")
    assert tokens() == tokens("--seed", 5) == greedy
    hot = ("--temperature", 3, "--seed")
    assert tokens(*hot, 5) == tokens(*hot, 5)
    assert tokens(*hot, 5) != tokens(*hot, 6)
    assert tokens("--top-p", 0.9999, "--seed", 5) == tokens("--top-p", 0.9999, "--temperature", 1, "--seed", 5)
    assert tokens("--top-k", 1, "--seed", 5) == greedy
    assert tokens("--repetition-penalty", 50) != greedy


def test_chat_fills_the_template_in(run: Run, tiny_llama: Path):
    plain = generate(run, tiny_llama, "--prompt", "user: hi\nassistant: ", "--max-tokens", 1)
    chat = generate(run, tiny_llama, "--prompt", "hi", "--chat", "--max-tokens", 1)
    assert chat["prompt_token_ids"] == plain["prompt_token_ids"]
    assert chat["metrics"]["tpot_ms"] is None  # one token has no time per further token


def test_stop_string_ends_the_text(run: Run, tiny_llama: Path):
    whole = generate(run, tiny_llama, "--prompt", "hello", "--max-tokens", 60, "--ignore-eos")["text"]
    stop = next(letter for letter in whole[3:] if letter.isascii() and letter.isprintable())
    document = generate(run, tiny_llama, "--prompt", "hello", "--max-tokens", 60, "--ignore-eos", "--stop", stop)
    assert document["finish_reason"] == "stop"
    assert document["text"] == whole[: whole.index(stop)]


def test_default_length_shrinks_to_the_context(run: Run, tiny_llama: Path):
    document = generate(run, tiny_llama, "--prompt", "x" * 500, "--ignore-eos")
    assert len(document["token_ids"]) == 12
    assert document["finish_reason"] == "length"


@pytest.mark.model
def test_default_model_generates(run: Run):
    code, out, _ = run(
        "generate", "--prompt", "The capital of France is", "--max-tokens", 8, "--dtype", "float32", "--json"
    )
    assert code == 0
    document = json.loads(out)
    assert "Paris" in document["text"]
    assert document["config"]["model"] == DEFAULT_MODEL
