"""Text as tokens come: characters of several bytes, stop strings, the byte table against the library's own decoder."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from engine.detokenizer import Detokenizer, token_bytes
from tests.conftest import byte_tokenizer

TOKENIZER = byte_tokenizer()
TABLE = token_bytes(TOKENIZER)
TEXTS = st.text(st.sampled_from("ab é🙂日\n"), max_size=12)


def ids_of(text: str) -> list[int]:
    return list(TOKENIZER(text, add_special_tokens=False).input_ids)


def stream(token_ids: list[int], stop: tuple[str, ...] = (), table: Any = TABLE) -> tuple[str, str, str | None]:
    """Streamed pieces joined, final text, stop string."""
    detokenizer = Detokenizer(TOKENIZER, stop, table)
    pieces, hit = "", None
    for token_id in token_ids:
        hit = detokenizer.append(token_id)
        pieces += detokenizer.take()
        if hit is not None:
            break
    detokenizer.finish()
    pieces += detokenizer.take()
    return pieces, detokenizer.text, hit


def test_byte_level_tokenizers_have_a_table_and_others_do_not():
    assert TABLE is not None
    other = Tokenizer(models.BPE())
    other.decoder = decoders.Metaspace()  # type: ignore[assignment]
    assert token_bytes(type("Other", (), {"backend_tokenizer": other})) is None


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 256), max_size=30))
def test_any_tokens_give_the_text_of_the_library_whole_or_streamed(token_ids: list[int]):
    """Also bytes that are no text: each broken sequence becomes the same replacement character."""
    expected = TOKENIZER.decode(token_ids, skip_special_tokens=True)
    assert stream(token_ids)[:2] == (expected, expected)


@pytest.mark.model
def test_table_of_the_default_model_gives_every_token_the_bytes_of_the_library(default_model_float32: Any):
    tokenizer = default_model_float32.tokenizer
    table = token_bytes(tokenizer)
    assert table is not None
    for token_id in range(len(tokenizer)):
        whole = table[token_id][0].decode(errors="replace")
        assert whole == tokenizer.decode([token_id], skip_special_tokens=True), token_id


@given(TEXTS)
def test_half_a_character_is_held_back(text: str):
    detokenizer = Detokenizer(TOKENIZER, (), TABLE)
    for token_id in ids_of(text):
        detokenizer.append(token_id)
        assert "\ufffd" not in detokenizer.take()
    assert detokenizer.text == text


@settings(max_examples=200, deadline=None)
@given(TEXTS, st.lists(st.text(st.sampled_from("ab é🙂"), min_size=1, max_size=3), max_size=3), st.booleans())
def test_text_ends_before_the_first_stop_string_and_nothing_of_it_was_streamed(
    text: str, stop: list[str], with_table: bool
):
    pieces, whole, hit = stream(ids_of(text), tuple(stop), TABLE if with_table else None)
    ends = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    assert pieces == whole
    assert (hit is None) == (not ends)
    if ends:
        first_complete = min(end for end, _ in ends)
        assert whole == text[: min(start for end, start in ends if end == first_complete)]
    else:
        assert whole == text
