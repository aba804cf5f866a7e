"""From the stepping thread to asyncio: one HTTP request's engine requests as an asynchronous stream of outputs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence

from fastapi import Request as HTTPRequest

from engine.outputs import RequestOutput
from engine.sampling.params import SamplingParams
from engine.server.traffic import Traffic
from engine.worker.loop import EngineLoop

# How often a request looks whether its client is still there, whether tokens come or not, seconds.
_DISCONNECT_POLL_S = 0.25
# Requests are submitted in slices of about this many tokens (a millisecond); each costs as much as a few tokens more.
_SLICE_TOKENS = 16_384
_REQUEST_TOKENS = 2048


class Submission:
    """The engine requests behind one HTTP request: prompts × n choices, their outputs in one queue.

    Leaving :meth:`outputs` early, for whatever reason, aborts what is unfinished, so that a client that has gone
    away holds no blocks.
    """

    def __init__(self, loop: EngineLoop, traffic: Traffic) -> None:
        self._loop = loop
        self._traffic = traffic
        self._visit = 0
        self._queue: asyncio.Queue[tuple[int, RequestOutput]] = asyncio.Queue()
        self._event_loop = asyncio.get_running_loop()
        self._unfinished: dict[int, str] = {}

    async def submit(self, prompts: Sequence[tuple[list[int], SamplingParams]], priority: int) -> None:
        """Queue all of them, in slices between which others get their turn; if one is refused the others are taken
        back.

        Raises:
            RequestError, QueueFullError, EngineDeadError: as the engine does.
        """
        self._visit = self._traffic.begin()
        try:
            slice_tokens = 0
            for index, (token_ids, params) in enumerate(prompts):
                self._unfinished[index] = self._loop.submit(
                    token_ids, params, on_output=self._receiver(index), priority=priority
                )
                slice_tokens += _REQUEST_TOKENS + len(token_ids)
                if slice_tokens >= _SLICE_TOKENS:
                    slice_tokens = 0
                    await asyncio.sleep(0)
        except BaseException:
            self.abort()
            raise

    async def outputs(self, http_request: HTTPRequest) -> AsyncIterator[tuple[int, RequestOutput]]:
        """(choice index, output) as they come, until all are finished or the client is gone."""
        looked = time.monotonic()
        try:
            while self._unfinished:
                if time.monotonic() - looked >= _DISCONNECT_POLL_S:
                    if await http_request.is_disconnected():
                        return
                    looked = time.monotonic()
                try:
                    index, output = await asyncio.wait_for(self._queue.get(), _DISCONNECT_POLL_S)
                except TimeoutError:
                    continue
                if output.finished:
                    del self._unfinished[index]
                yield index, output
        finally:
            self.abort()

    def abort(self) -> None:
        """End what is unfinished."""
        for request_id in self._unfinished.values():
            self._loop.abort(request_id)
        self._unfinished = {}
        self._traffic.end(self._visit)

    def _receiver(self, index: int) -> Callable[[RequestOutput], None]:
        def receive(output: RequestOutput) -> None:
            self._event_loop.call_soon_threadsafe(self._queue.put_nowait, (index, output))

        return receive
