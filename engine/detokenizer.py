"""Turning tokens into text as they come, and finding stop strings in it.

Two things must be held back from a client: bytes that are not yet a whole character (one token may end in the middle of
an emoji), and text that may turn out to be the beginning of a stop string.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream


class Detokenizer:
    """Text of one request's output.

    Args:
        tokenizer: the model's transformers tokenizer.
        stop: strings that end the output.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        self._stream = DecodeStream(skip_special_tokens=True) if self._backend is not None else None
        self._stop = tuple(stop)
        self._token_ids: list[int] = []
        self._decoded = ""  # text of the tokens so far, whole characters only
        self._emitted = 0  # characters of it that were handed out
        self._ended = False

    @property
    def text(self) -> str:
        """Everything that is certain so far, or everything after :meth:`finish`."""
        return self._decoded[: self._emitted]

    def append(self, token_id: int, *, may_stop: bool = True) -> str | None:
        """Add one output token.

        Args:
            may_stop: False while the output may not end yet (``min_tokens``): stop strings are not looked for.

        Returns:
            The stop string that has just been completed (the text then ends before it), else None.
        """
        self._token_ids.append(token_id)
        searched = max(0, len(self._decoded) - max((len(s) for s in self._stop), default=1) + 1)
        self._decoded += self._decode_next(token_id)
        return self._find_stop(searched) if may_stop else None

    def take(self) -> str:
        """Text that has become certain since the last call."""
        end = len(self._decoded) if self._ended else len(self._decoded) - self._held_back()
        new = self._decoded[self._emitted : end]
        self._emitted = max(self._emitted, end)
        return new

    def finish(self) -> None:
        """No more tokens: what was held back becomes certain, an unfinished character included."""
        if not self._ended:
            complete = self._tokenizer.decode(self._token_ids, skip_special_tokens=True)
            if complete.startswith(self._decoded):
                self._decoded = complete
            self._ended = True

    def _decode_next(self, token_id: int) -> str:
        if self._stream is not None and self._backend is not None:
            return self._stream.step(self._backend, token_id) or ""
        complete = self._tokenizer.decode(self._token_ids, skip_special_tokens=True)
        if complete.endswith("\ufffd") or not complete.startswith(self._decoded):
            return ""
        return complete[len(self._decoded) :]

    def _find_stop(self, searched: int) -> str | None:
        """The stop string that occurs first in the text from ``searched`` on; cuts the text before it."""
        hits = [(self._decoded.find(stop, searched), stop) for stop in self._stop]
        hits = [hit for hit in hits if hit[0] >= 0]
        if not hits:
            return None
        position, stop = min(hits)
        self._decoded = self._decoded[:position]
        self._ended = True
        return stop

    def _held_back(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        longest = 0
        for stop in self._stop:
            for length in range(min(len(stop) - 1, len(self._decoded)), longest, -1):
                if self._decoded.endswith(stop[:length]):
                    longest = length
                    break
        return longest
