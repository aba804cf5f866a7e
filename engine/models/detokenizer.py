"""Turning tokens into text as they come, and finding stop strings in it.

Two things must be held back from a client: bytes that are not yet a whole character (one token may end in the middle
of an emoji), and text that may turn out to be the beginning of a stop string. What has been handed out is kept as a
list of pieces, so that a token costs the same however long the text is.

Most tokenizers are byte-level: a token stands for the same bytes wherever it occurs (:class:`TokenBytes`, a look-up of
a fraction of a microsecond). All others are decoded by the stream decoder of the tokenizers library, which decodes a
few tokens again each time: several microseconds a token, which 128 sequences would feel at every step.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from tokenizers.decoders import ByteLevel, DecodeStream


class TokenBytes(dict[int, tuple[bytes, str | None]]):
    """The bytes of every token of a tokenizer, and its text if they are whole characters. Shared by all requests of an
    engine; an entry is made when it is first asked for. Special tokens have no bytes: they are no part of a text.

    Of a byte-level tokenizer (:attr:`is_exact`) the bytes of tokens laid end to end are their text. Other decoders may
    look at what is around a token; those of SentencePiece drop the space that a text begins with, no more.

    Args:
        backend: the ``tokenizers.Tokenizer``.
    """

    def __init__(self, backend: Any) -> None:
        super().__init__()
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        self._special = {token_id for token_id, token in added.items() if token.special}
        self.is_exact = isinstance(backend.decoder, ByteLevel)
        self._read_token = self._reader()

    def __missing__(self, token_id: int) -> tuple[bytes, str | None]:
        entry = self[token_id] = self._read(token_id)
        return entry

    def _read(self, token_id: int) -> tuple[bytes, str | None]:
        token = None if token_id in self._special or token_id < 0 else self._backend.id_to_token(token_id)
        if token is None:
            return b"", ""
        content = self._read_token(token_id, token)
        try:
            return content, content.decode()
        except UnicodeDecodeError:
            return content, None

    def _reader(self) -> Callable[[int, str], bytes]:
        """How the tokens of this decoder are spelt."""
        steps = _decoder_steps(self._backend.decoder)
        kinds = {str(step.get("type")) for step in steps}
        if "ByteLevel" in kinds:
            byte_of = _byte_of_character()
            return lambda token_id, token: _byte_level(token, byte_of)
        spaces = [str(step.get("replacement", "▁")) for step in steps if step.get("type") == "Metaspace"]
        spaces += [
            str(step.get("pattern", {}).get("String"))
            for step in steps
            if step.get("type") == "Replace" and step.get("content") == " "
        ]
        if "ByteFallback" in kinds or spaces:
            return lambda token_id, token: _piece(token, spaces, "ByteFallback" in kinds)
        return lambda token_id, token: str(self._backend.decode([token_id])).encode(errors="replace")


def _decoder_steps(decoder: Any) -> list[dict[str, Any]]:
    """A decoder of the tokenizers library as its parts, each a description with its ``type``."""
    if decoder is None:
        return []
    described = json.loads(decoder.__getstate__())
    return list(described["decoders"]) if described.get("type") == "Sequence" else [described]


def _byte_level(token: str, byte_of: dict[str, int]) -> bytes:
    try:
        return bytes(byte_of[character] for character in token)
    except KeyError:  # written as it is
        return token.encode(errors="replace")


_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _piece(token: str, spaces: list[str], byte_fallback: bool) -> bytes:
    """Bytes of a SentencePiece token: a byte spelt ``<0x0A>``, or text with a visible character for the space."""
    byte = _BYTE_PIECE.fullmatch(token) if byte_fallback else None
    if byte is not None:
        return bytes([int(byte.group(1), 16)])
    for space in spaces:
        token = token.replace(space, " ")
    return token.encode(errors="replace")


def token_bytes(tokenizer: Any) -> TokenBytes | None:
    """The bytes of each token of a transformers tokenizer, for log-probabilities; None without a fast tokenizer."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return None if backend is None else TokenBytes(backend)


def stream_table(tokenizer: Any) -> TokenBytes | None:
    """The table with which text is streamed, or None if the tokenizer is not byte-level: then its decoder is asked."""
    table = token_bytes(tokenizer)
    return table if table is not None and table.is_exact else None


def _byte_of_character() -> dict[str, int]:
    """The alphabet of byte-level tokenizers (GPT-2): printable bytes stand for themselves, the others follow at 256."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + index): byte for index, byte in enumerate(others)}


class Detokenizer:
    """Text of one request's output.

    Args:
        tokenizer: the model's transformers tokenizer.
        stop: strings that end the output.
        table: of the tokenizer (:func:`stream_table`), None if it has none.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), table: TokenBytes | None = None) -> None:
        self._tokenizer = tokenizer
        self._table = table
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        self._stream = DecodeStream(skip_special_tokens=True) if self._backend is not None else None
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._begun = False  # the UTF-8 decoder holds the beginning of a character
        self._stop = tuple(stop)
        self._longest_stop = max(map(len, self._stop), default=0)
        self._token_ids: list[int] = []
        self.pieces: list[str] = []  # text that was handed out; only ever appended to
        self._tail = ""  # text that was not yet
        self._ended = False

    @property
    def text(self) -> str:
        """Everything that is certain so far, or everything after :meth:`finish`."""
        return "".join(self.pieces)

    def append(self, token_id: int, *, may_stop: bool = True) -> str | None:
        """Add one output token.

        Args:
            may_stop: False while the output may not end yet (``min_tokens``): this token completes no stop string.

        Returns:
            The stop string that has just been completed (the text then ends before it), else None.
        """
        text = None
        if self._table is not None and not self._begun:  # nearly always: without a call, which 128 sequences would feel
            text = self._table[token_id][1]
        if text is None:
            text = self._decode_next(token_id)
        self._tail += text
        if self._stop and may_stop:
            return self._find_stop(len(self._tail) - len(text))
        return None

    def take(self) -> str:
        """Text that has become certain since the last call."""
        new, self._tail = self._tail, ""
        if self._stop and not self._ended and (held := self._held_back(new)):
            new, self._tail = new[:-held], new[-held:]
        if new:
            self.pieces.append(new)
        return new

    def finish(self) -> None:
        """No more tokens: what was held back becomes certain, an unfinished character included."""
        if self._ended:
            return
        self._ended = True
        if self._table is not None:
            self._tail += self._utf8.decode(b"", True)
            return
        complete: str = self._tokenizer.decode(self._token_ids, skip_special_tokens=True)
        decoded = self.text + self._tail
        if complete.startswith(decoded):
            self._tail += complete[len(decoded) :]

    def _decode_next(self, token_id: int) -> str:
        if self._table is not None:
            text = self._utf8.decode(self._table[token_id][0])
            self._begun = bool(self._utf8.getstate()[0])
            return text
        self._token_ids.append(token_id)
        if self._stream is not None and self._backend is not None:
            piece: str | None = self._stream.step(self._backend, token_id)
            return piece or ""
        complete: str = self._tokenizer.decode(self._token_ids, skip_special_tokens=True)
        decoded = self.text + self._tail
        if complete.endswith("\ufffd") or not complete.startswith(decoded):
            return ""
        return complete[len(decoded) :]

    def _find_stop(self, before: int) -> str | None:
        """The stop string that begins first of those that end in the tail behind ``before``; cuts the text before it.

        No stop string can begin in what was handed out: its beginning would have been held back. One that ends before
        was completed by a token that might not end the output; whether its text was handed out since, which depends on
        how many tokens a step brings, must make no difference.
        """
        hits = [(self._tail.find(stop, max(0, before - len(stop) + 1)), stop) for stop in self._stop]
        hits = [hit for hit in hits if hit[0] >= 0]
        if not hits:
            return None
        position, stop = min(hits)
        self._tail = self._tail[:position]
        self._ended = True
        return stop

    def _held_back(self, text: str) -> int:
        """Length of the longest end of the text that begins a stop string."""
        for length in range(min(self._longest_stop - 1, len(text)), 0, -1):
            end = text[-length:]
            if any(stop.startswith(end) and len(stop) > length for stop in self._stop):
                return length
        return 0
