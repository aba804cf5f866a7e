"""Text as tokens come: characters of several bytes, stop strings, the byte table against the library's own decoder."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models

from engine.models.detokenizer import Detokenizer, stream_table, token_bytes
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


def with_backend(backend: Tokenizer) -> Any:
    return type("Other", (), {"backend_tokenizer": backend})


def test_byte_level_tokenizers_stream_from_a_table_and_others_do_not():
    assert stream_table(TOKENIZER) is not None
    other = Tokenizer(models.BPE())
    other.decoder = decoders.Metaspace()  # type: ignore[assignment]
    assert stream_table(with_backend(other)) is None
    assert token_bytes(type("Slow", (), {})) is None


def sentencepiece() -> Tokenizer:
    """As Llama 2 and Mistral have it: spaces are visible, and a character without a token is spelt in bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁Hi", "a", "é", "▁a▁b"]
    backend = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, [], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)  # type: ignore[assignment]
    backend.add_special_tokens(["<s>", "</s>"])
    backend.add_tokens([AddedToken("<tool ▁é>", special=False)])
    return backend


@pytest.mark.parametrize(
    ("token", "content"),
    [
        ("<0x0A>", b"\n"),
        ("<0xF0>", b"\xf0"),
        ("▁Hi", b" Hi"),
        ("▁a▁b", b" a b"),
        ("é", "é".encode()),
        ("</s>", b""),
        ("<tool ▁é>", "<tool  é>".encode()),  # the library decodes added tokens alike
    ],
)
def test_a_token_of_sentencepiece_has_the_bytes_that_it_spells(token: str, content: bytes):
    backend = sentencepiece()
    table = token_bytes(with_backend(backend))
    assert table is not None
    assert table[backend.token_to_id(token)][0] == content


@given(st.lists(st.integers(0, 264), max_size=20))
def test_bytes_of_sentencepiece_tokens_laid_end_to_end_are_the_text_but_for_its_first_space(token_ids: list[int]):
    backend = sentencepiece()
    table = token_bytes(with_backend(backend))
    assert table is not None
    joined = b"".join(table[token_id][0] for token_id in token_ids if token_id)  # <unk> has no text of its own
    try:
        text = joined.decode()
    except UnicodeDecodeError:
        return
    decoded = backend.decode([token_id for token_id in token_ids if token_id], skip_special_tokens=True)
    assert decoded in (text, text.removeprefix(" "))


def test_tokens_of_metaspace_and_byte_level_parts_have_their_bytes_and_unknown_ids_none():
    metaspace = Tokenizer(models.BPE({"▁x": 0}, []))
    metaspace.decoder = decoders.Metaspace()  # type: ignore[assignment]
    level = Tokenizer(models.BPE({"Ġx": 0, "Ã": 1}, []))
    level.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()])  # type: ignore[assignment]
    for backend in (metaspace, level):
        table = token_bytes(with_backend(backend))
        assert table is not None
        assert table[0] == (b" x", " x")
        assert table[99] == table[-1] == (b"", "")
    assert table[1] == (b"\xc3", None)


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
@given(
    text=st.text(st.sampled_from("ab"), max_size=14),
    stop=st.lists(st.text(st.sampled_from("ab"), min_size=1, max_size=4), min_size=1, max_size=2),
    min_tokens=st.integers(0, 12),
    sizes=st.lists(st.integers(1, 5), min_size=14, max_size=14),
)
def test_how_many_tokens_a_step_brings_changes_no_text_and_min_tokens_none_either(text, stop, min_tokens, sizes):
    """As speculation does: several tokens may come before text is handed out."""

    def run(steps: list[int]) -> tuple[str, str | None, int]:
        detokenizer, tokens, hit, taken = Detokenizer(TOKENIZER, tuple(stop), TABLE), ids_of(text), None, 0
        for size in steps:
            for token_id in tokens[taken : taken + size]:
                taken += 1
                hit = detokenizer.append(token_id, may_stop=taken >= min_tokens)
                if hit is not None:
                    break
            detokenizer.take()
            if hit is not None or taken == len(tokens):
                break
        detokenizer.finish()
        detokenizer.take()
        return detokenizer.text, hit, taken

    found, hit, taken = run([1] * 14)
    assert run(sizes) == (found, hit, taken)
    ends = [end for end in range(max(1, min_tokens), len(text) + 1) if text[:end].endswith(tuple(stop))]
    assert taken == (ends[0] if ends else len(text))
    assert (hit is None) == (not ends)
    if hit is not None:
        assert text[: ends[0]].startswith(found + hit)


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
