"""Turning tokens into text as they come, and finding stop strings in it.

Two things must be held back from a client: bytes that are not yet a whole character (one token may end in the middle
of an emoji), and text that may turn out to be the beginning of a stop string. What has been handed out is kept as a
list of pieces, so that a token costs the same however long the text is.

Most tokenizers are byte-level: a token stands for the same bytes wherever it occurs (:class:`TokenBytes`, a look-up of
a fraction of a microsecond). All others are decoded by the stream decoder of the tokenizers library, which decodes a
few tokens anew each time: several microseconds a token, which 128 sequences would feel at every step.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import ByteLevel, DecodeStream


class TokenBytes(dict[int, tuple[bytes, str | None]]):
    """The bytes of every token of a byte-level tokenizer, and its text if they are whole characters. Shared by all
    requests of an engine; an entry is made when it is first asked for. Special tokens have no bytes.

    Args:
        backend: the ``tokenizers.Tokenizer``, whose decoder is ``ByteLevel``.
    """

    def __init__(self, backend: Any) -> None:
        super().__init__()
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        self._special = {token_id for token_id, token in added.items() if token.special}
        self._byte_of = _byte_of_character()

    def __missing__(self, token_id: int) -> tuple[bytes, str | None]:
        entry = self[token_id] = self._read(token_id)
        return entry

    def _read(self, token_id: int) -> tuple[bytes, str | None]:
        token = None if token_id in self._special else self._backend.id_to_token(token_id)
        if token is None:
            return b"", ""
        try:
            content = bytes(self._byte_of[character] for character in token)
        except KeyError:  # an added token, written as it is
            content = token.encode()
        try:
            return content, content.decode()
        except UnicodeDecodeError:
            return content, None


def token_bytes(tokenizer: Any) -> TokenBytes | None:
    """The table for a transformers tokenizer, or None if it is not byte-level."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return TokenBytes(backend) if isinstance(getattr(backend, "decoder", None), ByteLevel) else None


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
        table: of the tokenizer (:func:`token_bytes`), None if it has none.
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
            may_stop: False while the output may not end yet (``min_tokens``): stop strings are not looked for.

        Returns:
            The stop string that has just been completed (the text then ends before it), else None.
        """
        text = None
        if self._table is not None and not self._begun:  # nearly always: without a call, which 128 sequences would feel
            text = self._table[token_id][1]
        self._tail += self._decode_next(token_id) if text is None else text
        if self._stop and may_stop:
            return self._find_stop()
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
        complete = self._tokenizer.decode(self._token_ids, skip_special_tokens=True)
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
            return self._stream.step(self._backend, token_id) or ""
        complete = self._tokenizer.decode(self._token_ids, skip_special_tokens=True)
        decoded = self.text + self._tail
        if complete.endswith("\ufffd") or not complete.startswith(decoded):
            return ""
        return complete[len(decoded) :]

    def _find_stop(self) -> str | None:
        """The stop string that occurs first in the text not handed out; cuts the text before it.

        No stop string can begin in what was handed out: its beginning would have been held back.
        """
        hits = [(self._tail.find(stop), stop) for stop in self._stop]
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
