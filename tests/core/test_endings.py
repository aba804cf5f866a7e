"""Where an answer ends: end of turn and end of text, stop strings before min_tokens, with and without speculation."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.models import LoadedModel, load_model
from engine.sampling.params import SamplingParams
from tests.core.test_isolation import drain
from tests.support import engine_with_blocks

SIZE = 64


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """A chat fine-tune as people save it: the tokenizer ends a turn with <|im_end|>, the generation settings are those
    of the base model and end a text with <|endoftext|>. It says "a", then <|im_end|>, then "a" again, for ever."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from tests.conftest import byte_tokenizer

    folder = tmp_path_factory.mktemp("chat")
    backend = byte_tokenizer().backend_tokenizer
    backend.add_special_tokens(["<|endoftext|>", "<|im_end|>"])
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>").save_pretrained(folder)
    of_text, of_turn, letter = (backend.token_to_id(token) for token in ("<|endoftext|>", "<|im_end|>", "a"))
    config = LlamaConfig(
        vocab_size=backend.get_vocab_size(), hidden_size=SIZE, intermediate_size=SIZE, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=256, eos_token_id=of_text,
        bos_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float(parameter.dim() == 1))  # norms let pass, projections add nothing
        model.model.embed_tokens.weight[:, 0] = 1
        model.model.embed_tokens.weight[letter] = torch.eye(SIZE)[1]
        model.lm_head.weight[letter, 0] = 5
        model.lm_head.weight[of_turn, 1] = 5
    model.generation_config = GenerationConfig(eos_token_id=of_text)
    model.save_pretrained(folder)
    loaded = load_model(str(folder), dtype="float32", device="cpu")
    assert loaded.eos_token_ids == (of_text, of_turn)
    return loaded


def answer(model: LoadedModel, speculation: str, **params: Any) -> tuple[str, int, str | None, Any]:
    engine = engine_with_blocks(
        model, 40, block_size=4, max_num_seqs=8, max_num_batched_tokens=512, speculation=speculation, ngram_min=1
    )
    engine.add_request("r", [66, 67], SamplingParams(**{"max_tokens": 24, **params}))
    output = drain(engine)["r"]
    if speculation != "off" and len(output.token_ids) > 12:
        assert engine.totals["accepted_tokens"] > 0, "nothing was accepted: the test shows nothing"
    return output.text, len(output.token_ids), output.finish_reason, output.stop_reason


def test_an_answer_ends_at_the_end_of_turn_though_the_generation_settings_name_the_end_of_text(chat_model):
    assert answer(chat_model, "off")[:3] == ("a", 2, "stop")
    assert answer(chat_model, "off", ignore_eos=True)[1:3] == (24, "length")


@pytest.mark.parametrize("stop", ["a", "aaa", "aaaaa", "b"])
def test_speculation_changes_no_text_whatever_min_tokens_and_stop_strings(chat_model, stop: str):
    for min_tokens, ignore_eos in itertools.product([0, 1, 5, 6, 7, 8, 20], [False, True]):
        params = {"stop": (stop,), "min_tokens": min_tokens, "ignore_eos": ignore_eos}
        plain = answer(chat_model, "off", **params)
        assert answer(chat_model, "ngram", **params) == plain
        assert plain[1] >= min_tokens


def test_stop_string_completed_before_min_tokens_does_not_count_and_one_completed_later_does(chat_model: LoadedModel):
    """Without an end of turn the tokens are a, <|im_end|>, a, <|im_end|> …: the seventh is the fourth letter."""
    text, count, reason, stop = answer(chat_model, "off", stop=("aaa",), min_tokens=7, ignore_eos=True)
    assert (text, count, reason, stop) == ("a", 7, "stop", "aaa")
    assert answer(chat_model, "off", stop=("aaa",), ignore_eos=True)[:2] == ("", 5)


def test_forbidden_ends_that_the_model_has_no_logit_of_harm_nobody(chat_model: LoadedModel, monkeypatch):
    monkeypatch.setattr(chat_model, "eos_token_ids", (*chat_model.eos_token_ids, 100_000))
    assert answer(chat_model, "off", min_tokens=3)[1:3] == (4, "stop")


def test_temperature_too_small_to_divide_by_answers_as_greedy_does(tiny_llama: Path):
    model = load_model(str(tiny_llama), dtype="float32", device="cpu")
    greedy = answer(model, "off", ignore_eos=True)
    for temperature in (1e-38, 5e-324, 1e-6):
        assert answer(model, "off", ignore_eos=True, temperature=temperature, top_p=0.9) == greedy
