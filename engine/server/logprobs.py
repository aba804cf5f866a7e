"""Log-probabilities as the OpenAI API answers them, the same whether an answer is streamed or not."""

from __future__ import annotations

import codecs
import re
from typing import Any

from engine.models.detokenizer import Detokenizer, TokenBytes, token_bytes
from engine.outputs import RequestOutput, TokenLogprob

_LOWEST = -9999.0  # stands for minus infinity, for which JSON has no word; so does OpenAI's
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenTexts:
    """What single tokens stand for. One for each tokenizer.

    Args:
        tokenizer: a transformers tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.table = token_bytes(tokenizer)
        self._special = set(tokenizer.all_special_ids)

    def text(self, token_id: int) -> str:
        """The token decoded by itself; parts of a character are U+FFFD."""
        return str(self.tokenizer.decode([token_id]))

    def content(self, token_id: int) -> bytes:
        """The token's bytes: those of consecutive tokens, joined, are the UTF-8 of their text."""
        if self.table is not None:
            return self.table[token_id][0]
        if token_id in self._special:
            return b""
        token = str(self.tokenizer.convert_ids_to_tokens(token_id))
        if byte := _BYTE_TOKEN.fullmatch(token):
            return bytes([int(byte[1], 16)])
        return (token.replace("\u2581", " ") if "\u2581" in token else self.text(token_id)).encode()


class _ByteOffsets:
    """Where in the text each token of a byte-level tokenizer begins; one inside a character begins where that does."""

    def __init__(self, table: TokenBytes) -> None:
        self._table = table
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._decoded = 0  # whole characters so far

    def next(self, token_id: int) -> int:
        """The place of the next token."""
        content = self._table[token_id][0]
        begun = bool(self._utf8.getstate()[0])
        # a byte that does not go on with what has begun makes that one U+FFFD, which comes before this token
        broken = begun and bool(content) and not 0x80 <= content[0] < 0xC0
        place = self._decoded + broken
        self._decoded += len(self._utf8.decode(content))
        return place


class _TextOffsets:
    """The same for other tokenizers, by decoding as the engine does."""

    def __init__(self, tokenizer: Any) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._decoded = 0

    def next(self, token_id: int) -> int:
        """The place of the next token."""
        place = self._decoded
        self._detokenizer.append(token_id)
        self._decoded += len(self._detokenizer.take())
        return place


class ChoiceLogprobs:
    """The log-probabilities of one choice, handed out along with its text.

    A token is handed out once text of it has been, or at the end; tokens of which no text was returned (they belong to
    the stop string that ended the output) never are.
    """

    def __init__(self, texts: TokenTexts, *, chat: bool) -> None:
        self._texts = texts
        self._chat = chat
        self._offsets = _ByteOffsets(texts.table) if texts.table is not None else _TextOffsets(texts.tokenizer)
        self._released = 0  # characters of the text handed out
        self._pending: list[tuple[TokenLogprob, int]] = []

    def take(self, output: RequestOutput) -> dict[str, Any] | None:
        """What goes along with this output; None where log-probabilities were not asked for."""
        if output.logprobs is None and not self._pending:
            return None
        for entry in output.logprobs or ():
            self._pending.append((entry, self._offsets.next(entry.token_id)))
        self._released += len(output.new_text)
        cut = isinstance(output.stop_reason, str)
        ready = [pair for pair in self._pending if pair[1] < self._released or (output.finished and not cut)]
        self._pending = [] if output.finished else self._pending[len(ready) :]
        if not ready and not output.finished:
            return None
        return self._chat_form(ready) if self._chat else self._plain_form(ready)

    def _chat_form(self, entries: list[tuple[TokenLogprob, int]]) -> dict[str, Any]:
        content = []
        for entry, _ in entries:
            top = [self._line(token_id, value) for token_id, value in entry.top.items()]
            content.append({**self._line(entry.token_id, entry.logprob), "top_logprobs": top})
        return {"content": content}

    def _line(self, token_id: int, logprob: float) -> dict[str, Any]:
        content = list(self._texts.content(token_id))
        return {"token": self._texts.text(token_id), "logprob": _known(logprob), "bytes": content}

    def _plain_form(self, entries: list[tuple[TokenLogprob, int]]) -> dict[str, Any]:
        text = self._texts.text
        return {
            "tokens": [text(entry.token_id) for entry, _ in entries],
            "token_logprobs": [_known(entry.logprob) for entry, _ in entries],
            # several tokens may have the same text (parts of a character): the most likely one stands for it
            "top_logprobs": [
                {text(token_id): _known(value) for token_id, value in reversed(entry.top.items())}
                for entry, _ in entries
            ],
            "text_offset": [min(offset, self._released) for _, offset in entries],
        }


def joined(parts: list[dict[str, Any] | None]) -> dict[str, Any] | None:
    """The parts of a choice as one; None if there are none."""
    known = [part for part in parts if part is not None]
    return {name: [item for part in known for item in part[name]] for name in known[0]} if known else None


def _known(logprob: float) -> float:
    return max(logprob, _LOWEST) if logprob == logprob else _LOWEST
