"""Chat streams that run next to the script: a rerun of the page (a toggle, another prompt) does not touch them."""

from __future__ import annotations

import dataclasses
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol

StreamState = Literal["waiting", "streaming", "done", "stopped", "failed"]


class ChatSource(Protocol):
    """The part of :class:`engine.worker.client.EngineClient` that a chat needs: OpenAI chunks of one answer."""

    def stream_chat(self, messages: Sequence[Mapping[str, str]], **parameters: Any) -> Iterator[Mapping[str, Any]]: ...


@dataclasses.dataclass
class ChatStream:
    """One prompt and the answer as far as it has come. Written by its thread, read by the page.

    Attributes:
        prompt: what the person wrote; ``parameters``: sampling parameters as sent.
        state: "waiting" until the first token, then "streaming", then one of the three ends.
        error: what the worker answered if it failed.
        finish_reason: as the API gave it ("stop", "length").
        started, first, ended: ``time.perf_counter()`` seconds at the dashboard, so TTFT includes the way through HTTP.
        completion_tokens: from the API's usage where it has come, else the chunks counted so far.
    """

    prompt: str
    parameters: dict[str, Any]
    stream_id: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)
    state: StreamState = "waiting"
    error: str | None = None
    finish_reason: str | None = None
    started: float = dataclasses.field(default_factory=time.perf_counter)
    first: float | None = None
    ended: float | None = None
    completion_tokens: int = 0
    prompt_tokens: int | None = None
    _parts: list[str] = dataclasses.field(default_factory=list)
    _stop: threading.Event = dataclasses.field(default_factory=threading.Event)

    @property
    def text(self) -> str:
        """The answer so far."""
        return "".join(self._parts)

    @property
    def active(self) -> bool:
        """True until it has ended."""
        return self.state in ("waiting", "streaming")

    @property
    def ttft_ms(self) -> float | None:
        """Time to the first token in ms, None before it."""
        return None if self.first is None else 1000 * (self.first - self.started)

    @property
    def tokens_per_second(self) -> float | None:
        """Output tokens per second after the first token; None for fewer than two tokens."""
        if self.first is None or self.completion_tokens < 2:
            return None
        elapsed = (self.ended or time.perf_counter()) - self.first
        return (self.completion_tokens - 1) / elapsed if elapsed > 0 else None

    def stop(self) -> None:
        """End it at the next chunk; closing the connection frees the request's blocks in the worker."""
        self._stop.set()

    def run(self, source: ChatSource, messages: Sequence[Mapping[str, str]]) -> None:
        """Read the whole stream (in a thread of its own)."""
        try:
            chunks = source.stream_chat(messages, **self.parameters)
            for chunk in chunks:
                if self._stop.is_set():
                    close = getattr(chunks, "close", None)
                    if close is not None:
                        close()
                    break
                self._take(chunk)
            self.state = "stopped" if self._stop.is_set() else "done"
        except Exception as error:  # whatever went wrong belongs under the prompt, not in a log
            self.state, self.error = "failed", str(error) or type(error).__name__
        finally:
            self.ended = time.perf_counter()

    def _take(self, chunk: Mapping[str, Any]) -> None:
        usage = chunk.get("usage") or {}
        for choice in chunk.get("choices") or ():
            text = (choice.get("delta") or {}).get("content") or ""
            if text:
                if self.first is None:
                    self.first, self.state = time.perf_counter(), "streaming"
                self._parts.append(text)
                self.completion_tokens += 0 if usage else 1
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
        if usage:
            self.completion_tokens = int(usage.get("completion_tokens", self.completion_tokens))
            self.prompt_tokens = usage.get("prompt_tokens", self.prompt_tokens)


def start_stream(
    source: ChatSource, prompt: str, parameters: Mapping[str, Any], history: Sequence[ChatStream] = ()
) -> ChatStream:
    """Send a prompt and return at once. ``history``: earlier turns that the model should see."""
    messages: list[dict[str, str]] = []
    for turn in history:
        if turn.text:
            messages += [{"role": "user", "content": turn.prompt}, {"role": "assistant", "content": turn.text}]
    messages.append({"role": "user", "content": prompt})
    stream = ChatStream(prompt, dict(parameters))
    threading.Thread(target=stream.run, args=(source, messages), name="chat-stream", daemon=True).start()
    return stream
