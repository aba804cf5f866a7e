"""Tokenizing and chat templates in a few processes of their own, each of which is ended if it takes too long."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import logging
import os
import pickle
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from engine.errors import QueueFullError, RequestError
from engine.server.bodies import TooLargeError, UnprocessableError
from engine.server.limits import ServerLimits
from engine.server.text_worker import Document, receive

logger = logging.getLogger(__name__)

_PROJECT = Path(__file__).resolve().parents[2]
_START_TIMEOUT_S = 60.0
# One thread each: a few texts at once is what this pool is for, and thread pools take address space.
_ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",
    "RAYON_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "2",
    "PYTHONUNBUFFERED": "1",
}
_SECRETS = ("HEADROOM_ADMIN_TOKEN", "HEADROOM_API_KEY")


class TextQueueFullError(QueueFullError):
    """Too many requests wait to be tokenized (503)."""


class _LostError(Exception):
    """The process did not answer: it was ended, or it ended itself."""


class _Process:
    """One process and the tokenizer that it holds. Used by one thread at a time."""

    def __init__(self) -> None:
        self._tokenizer: object = None
        self._popen: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None
        self._closed = False

    def ask(self, tokenizer: object, setup: bytes, job: Document, seconds: float) -> Document:
        """The answer to a job.

        Raises:
            TimeoutError: after ``seconds``; the process has been ended.
            _LostError: if it ended by itself.
        """
        try:
            if self._popen is None or self._popen.poll() is not None:
                self.start()
            assert self._channel is not None
            if self._tokenizer is not tokenizer:
                self._swap(self._channel, setup, _START_TIMEOUT_S)
                self._tokenizer = tokenizer
            return self._swap(self._channel, json.dumps(job).encode(), seconds)
        except (TimeoutError, OSError, _LostError) as error:
            self.end()
            if isinstance(error, TimeoutError | _LostError):
                raise
            raise _LostError from error

    def start(self) -> None:
        """Start it, without waiting for it."""
        self.end()
        if self._closed:
            raise _LostError
        ours, theirs = socket.socketpair()
        environment = {name: value for name, value in os.environ.items() if name not in _SECRETS} | _ENVIRONMENT
        command = [sys.executable, "-m", "engine.server.text_worker", str(theirs.fileno())]
        with theirs:
            self._popen = subprocess.Popen(
                command, cwd=_PROJECT, env=environment, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()]
            )
        self._channel, self._tokenizer = ours, None

    def close(self) -> None:
        """End it for good; in any thread."""
        self._closed = True
        self.end()

    def end(self) -> None:
        """End it; the next job starts another one."""
        popen, self._popen = self._popen, None
        if popen is not None:
            popen.kill()
            popen.wait()
        if self._channel is not None:
            self._channel.close()

    @staticmethod
    def _swap(channel: socket.socket, content: bytes, seconds: float) -> Document:
        # The socket's timeout is one of each call: the few calls of an answer share the deadline well enough, and the
        # process ends itself should they not.
        channel.settimeout(seconds)
        channel.sendall(len(content).to_bytes(4, "big") + content)
        answer = receive(channel)
        if answer is None:
            raise _LostError
        return answer


class TextPool:
    """Token ids of texts and chats.

    Args:
        limits: how many processes, how many may wait, and for how long.
    """

    def __init__(self, limits: ServerLimits) -> None:
        self._limits = limits
        self._threads = ThreadPoolExecutor(limits.text_workers, thread_name_prefix="texts")
        self._processes = [_Process() for _ in range(limits.text_workers)]
        self._idle: queue.LifoQueue[_Process] = queue.LifoQueue()  # one that has answered before is ready
        for process in self._processes:
            self._idle.put(process)
        self._slots = asyncio.Semaphore(limits.text_workers)
        # A template that never ends must not keep texts without one from being tokenized.
        self._chat_slots = asyncio.Semaphore(max(1, limits.text_workers - 1))
        self._waiting = 0
        self._setup: tuple[object, bytes] | None = None
        self._setup_lock = threading.Lock()
        self._processes[-1].start()  # the first to be asked; its imports need not wait for the model

    async def encode(self, tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, special tokens added as the tokenizer does.

        Raises:
            RequestError: if it takes too long or fails (422).
            TextQueueFullError: if too many wait (503).
        """
        answer = await self._run(tokenizer, {"texts": list(texts), "special": True}, "prompt")
        return [list(ids) for ids in answer["ids"]]

    async def chat(self, tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of the messages in the model's chat template.

        Raises:
            RequestError: if the template refuses them (400), takes too long or fails (422), writes too much (413).
            TextQueueFullError: if too many wait (503).
        """
        answer = await self._run(tokenizer, {"messages": [dict(message) for message in messages]}, "messages")
        return list(answer["ids"][0])

    def prepare(self, tokenizer: Any) -> None:
        """Have a process ready for this tokenizer, so that the first request need not wait for it. Blocks meanwhile."""
        began = time.monotonic()
        try:
            self._ask(tokenizer, {"texts": [], "special": False})
        except (TimeoutError, _LostError):
            logger.warning("the process that tokenizes did not start within %.0f s", time.monotonic() - began)

    def close(self) -> None:
        """End all processes; what they were at is answered with an error."""
        for process in self._processes:
            process.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _run(self, tokenizer: Any, job: Document, field: str) -> Document:
        chat = "messages" in job
        loop = asyncio.get_running_loop()
        await self._wait_for_a_slot(chat)
        try:
            work = loop.run_in_executor(self._threads, self._ask, tokenizer, job)
        except RuntimeError:
            self._release(chat)
            raise QueueFullError("the worker is shutting down.", remedy="Ask another one.") from None
        work.add_done_callback(lambda _: self._release(chat))  # not before: a client that leaves frees no process
        try:
            return self._checked(await asyncio.shield(work), field)
        except TimeoutError:
            what = "the model's chat template and tokenizer" if chat else "the model's tokenizer"
            message = f"{what} took more than {self._limits.text_seconds:g} s; that was ended."
            raise UnprocessableError(message, field=field, remedy="Send less text, or use another model.") from None
        except _LostError:
            message = "the process that tokenizes has ended over it."
            raise UnprocessableError(message, field=field, remedy="Send less text, or use another model.") from None

    def _checked(self, answer: Document, field: str) -> Document:
        if (refused := answer.get("refused")) is not None:
            message = f"the model's chat template refused them: {refused}"
            raise RequestError(message, field=field, remedy="Check roles and their order.")
        if (length := answer.get("too_long")) is not None:
            message = f"the model's chat template made {length:,} characters of them."
            raise TooLargeError(message, field=field, remedy="Send less text.")
        if (failed := answer.get("failed")) is not None:
            message = f"could not be tokenized: {failed}."
            raise UnprocessableError(message, field=field, remedy="Send another text.")
        return answer

    async def _wait_for_a_slot(self, chat: bool) -> None:
        if self._waiting >= self._limits.max_waiting_texts:
            raise self._full(f"{self._waiting} requests wait to be tokenized.")
        self._waiting += 1
        try:
            async with asyncio.timeout(self._limits.text_seconds):
                if chat:
                    await self._chat_slots.acquire()
                try:
                    await self._slots.acquire()
                except BaseException:
                    if chat:
                        self._chat_slots.release()
                    raise
        except TimeoutError:
            raise self._full(f"nothing could be tokenized for {self._limits.text_seconds:g} s.") from None
        finally:
            self._waiting -= 1

    def _full(self, message: str) -> TextQueueFullError:
        return TextQueueFullError(message, remedy="Try again later, or raise --text-workers.")

    def _release(self, chat: bool) -> None:
        self._slots.release()
        if chat:
            self._chat_slots.release()

    def _ask(self, tokenizer: Any, job: Document) -> Document:
        process = self._idle.get()
        try:
            return process.ask(tokenizer, self._setup_of(tokenizer), job, self._limits.text_seconds)
        finally:
            self._idle.put(process)

    def _setup_of(self, tokenizer: Any) -> bytes:
        """What a process is told of a tokenizer; made once for each."""
        with self._setup_lock:
            if self._setup is None or self._setup[0] is not tokenizer:
                self._setup = (tokenizer, json.dumps(self._describe(tokenizer)).encode())
            return self._setup[1]

    def _describe(self, tokenizer: Any) -> Document:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        template = None
        with contextlib.suppress(ValueError):  # several templates, none of which is the default
            template = tokenizer.get_chat_template() if tokenizer.chat_template else None
        return {
            "tokenizer": None if backend is None else backend.to_str(),
            "pickled": base64.b64encode(pickle.dumps(tokenizer)).decode() if backend is None else None,
            "template": template,
            "special_tokens": {name: _plain(value) for name, value in tokenizer.special_tokens_map.items()},
            "max_characters": 2 * self._limits.max_prompt_characters + 65_536,
            "memory_mib": self._limits.text_memory_mib,
            "seconds": self._limits.text_seconds,
        }


def _plain(value: Any) -> Any:
    return [str(item) for item in value] if isinstance(value, list | tuple) else str(value)
