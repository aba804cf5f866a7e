"""The OpenAI API: ``/v1/models``, ``/v1/completions``, ``/v1/chat/completions``, streamed and not."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from engine.errors import HeadroomError, RequestError
from engine.outputs import RequestOutput
from engine.sampling.params import SamplingParams
from engine.server.answers import error_answer, error_body, openai_error, status_of
from engine.server.bodies import BodyReader, SafeJSONResponse, UnprocessableError, json_text, shorten
from engine.server.host import EngineHost
from engine.server.limits import DoorSettings, ServerLimits
from engine.server.logprobs import ChoiceLogprobs, TokenTexts, joined
from engine.server.schemas import ChatRequest, CompletionRequest, too_many_characters
from engine.server.streaming import Submission
from engine.server.texts import TextPool
from engine.server.traffic import Traffic
from engine.worker.loop import EngineLoop

logger = logging.getLogger(__name__)

_FEW_TOKENS = 16_384  # are checked in a millisecond

Prompts = list[tuple[list[int], SamplingParams]]


class UnknownModelError(RequestError):
    """The request names a model that is not the one being served (404)."""


class ShutDownError(HeadroomError):
    """The engine was stopped before the answer was complete (503)."""

    status = 503


class StepError(HeadroomError):
    """The engine failed over a request (500)."""

    status = 500


@dataclasses.dataclass(slots=True)
class _Answer:
    """What an answer is made of, whichever endpoint and mode.

    Attributes:
        name: what the model is called.
        chat: chat completion or plain completion.
        n: choices per prompt.
        return_token_ids: add token ids to every choice (vLLM's extension).
    """

    loop: EngineLoop
    name: str
    chat: bool
    n: int
    return_token_ids: bool
    include_usage: bool
    texts: TokenTexts
    identifier: str = ""
    created: int = 0
    logprobs: dict[int, ChoiceLogprobs] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self.identifier = f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())

    def head(self, streamed: bool) -> dict[str, Any]:
        kind = "text_completion" if not self.chat else ("chat.completion.chunk" if streamed else "chat.completion")
        return {"id": self.identifier, "object": kind, "created": self.created, "model": self.name}

    def take_logprobs(self, index: int, output: RequestOutput) -> dict[str, Any] | None:
        """The log-probabilities that go along with an output of a choice."""
        if index not in self.logprobs:
            if output.logprobs is None:
                return None
            self.logprobs[index] = ChoiceLogprobs(self.texts, chat=self.chat)
        return self.logprobs[index].take(output)

    def choice(self, index: int, output: RequestOutput, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        """A complete choice of an answer that is not streamed."""
        choice: dict[str, Any] = {"index": index, "logprobs": logprobs, "finish_reason": output.finish_reason}
        choice["stop_reason"] = output.stop_reason
        if self.chat:
            choice["message"] = {"role": "assistant", "content": output.text, "refusal": None}
        else:
            choice["text"] = output.text
        if self.return_token_ids:
            choice |= {"token_ids": output.token_ids, "prompt_token_ids": output.prompt_token_ids}
        return choice

    def delta(self, index: int, output: RequestOutput, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        """A piece of a streamed choice; it may carry several tokens under speculation."""
        choice: dict[str, Any] = {"index": index, "logprobs": logprobs, "finish_reason": output.finish_reason}
        if output.finished:
            choice["stop_reason"] = output.stop_reason
        if self.chat:
            choice["delta"] = {"content": output.new_text}
        else:
            choice["text"] = output.new_text
        if self.return_token_ids:
            choice["token_ids"] = output.new_token_ids
        return choice

    def usage(self, finished: Sequence[RequestOutput]) -> dict[str, Any]:
        """Token counts; a prompt with several choices counts once, as in the OpenAI API."""
        prompt = sum(len(output.prompt_token_ids) for output in finished[:: self.n])
        completion = sum(len(output.token_ids) for output in finished)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(o.num_cached_tokens for o in finished[:: self.n])},
        }

    def failure(self, output: RequestOutput) -> HeadroomError:
        """Why an output has failed."""
        if output.refusal is not None:  # knobs were changed between the check of the request and its turn
            return output.refusal
        message = output.error or "the engine failed"
        if self.loop.alive:
            return StepError(message)
        return ShutDownError(message, remedy="Send it again in a moment.")


class _Service:
    """What the routes under ``/v1`` do."""

    def __init__(
        self, host: EngineHost, texts: TextPool, traffic: Traffic, limits: ServerLimits, door: DoorSettings
    ) -> None:
        self._host = host
        self._texts = texts
        self._traffic = traffic
        self._limits = limits
        self._names = door.served_names
        self._token_texts: TokenTexts | None = None

    def models(self) -> dict[str, Any]:
        """The model under each of its names."""
        loop = self._host.loop
        card = {
            "object": "model",
            "created": int(self._host.started_unix_s),
            "owned_by": "headroom",
            "max_model_len": loop.snapshot.max_model_len,
        }
        return {"object": "list", "data": [{"id": name, **card} for name in self._served(loop)]}

    async def complete(self, body: CompletionRequest, request: Request) -> Response:
        """Answer a plain completion."""
        loop = self._loop_for(body.model)
        body.check_extra_fields()
        self._check_choices(len(body.prompts), body.n)
        texts = [prompt for prompt in body.prompts if isinstance(prompt, str)]  # all of them or none
        self._check_characters(sum(map(len, texts)), "prompt")
        encoded = [prompt for prompt in body.prompts if not isinstance(prompt, str)]
        if texts:
            encoded = await self._texts.encode(loop.snapshot.tokenizer, texts)
        prompts = await _prompts(loop, body, encoded, body.logprobs)
        return await self._respond(self._answer(loop, body, chat=False), prompts, body, request)

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        """Answer a chat."""
        loop = self._loop_for(body.model)
        body.check_extra_fields()
        self._check_choices(1, body.n)
        tokenizer = loop.snapshot.tokenizer
        if not tokenizer.chat_template:
            remedy = "Use /v1/completions instead."
            raise RequestError("the model has no chat template.", field="messages", remedy=remedy)
        messages = [message.for_template() for message in body.messages]
        self._check_characters(sum(len(message["content"]) for message in messages), "messages")
        logprobs = body.logprobs_wanted()
        token_ids = await self._texts.chat(tokenizer, messages)
        prompts = await _prompts(loop, body, [token_ids], logprobs)
        return await self._respond(self._answer(loop, body, chat=True), prompts, body, request)

    def _served(self, loop: EngineLoop) -> tuple[str, ...]:
        return self._names or (loop.snapshot.model_name,)

    def _loop_for(self, model: str | None) -> EngineLoop:
        loop = self._host.loop
        served = self._served(loop)
        if model is not None and model not in served:
            message = f"{shorten(model)!r} is not served here."
            raise UnknownModelError(message, field="model", remedy=f"Use {' or '.join(map(repr, served))}.")
        return loop

    def _check_choices(self, prompts: int, n: int) -> None:
        most = self._limits.max_choices
        if prompts * n > most:
            message = f"{prompts:,} prompts of {n} answers each are more than {most:,} answers."
            remedy = "Send several requests, or raise --max-choices."
            raise UnprocessableError(message, field="n" if n > 1 else "prompt", remedy=remedy)

    def _check_characters(self, count: int, field: str) -> None:
        if count > self._limits.max_prompt_characters:
            raise too_many_characters(field, self._limits)

    def _answer(self, loop: EngineLoop, body: CompletionRequest | ChatRequest, *, chat: bool) -> _Answer:
        tokenizer = loop.snapshot.tokenizer
        if self._token_texts is None or self._token_texts.tokenizer is not tokenizer:
            self._token_texts = TokenTexts(tokenizer)
        usage = body.stream_options is not None and body.stream_options.include_usage
        return _Answer(loop, self._served(loop)[0], chat, body.n, body.return_token_ids, usage, self._token_texts)

    async def _respond(
        self, answer: _Answer, prompts: Prompts, body: CompletionRequest | ChatRequest, request: Request
    ) -> Response:
        submission = Submission(answer.loop, self._traffic)
        await submission.submit(prompts, body.priority)
        if body.stream:
            return _Stream(_events(answer, submission, request), submission)
        finished: dict[int, RequestOutput] = {}
        logprobs: dict[int, list[dict[str, Any] | None]] = {}
        async for index, output in submission.outputs(request):
            if output.finish_reason == "error":
                submission.abort()
                return error_answer(request.scope["path"], answer.failure(output))
            logprobs.setdefault(index, []).append(answer.take_logprobs(index, output))
            if output.finished:
                finished[index] = output
        if len(finished) < len(prompts):  # the client has gone: nobody reads this
            return Response(status_code=499)
        ordered = [finished[index] for index in sorted(finished)]
        choices = [answer.choice(index, output, joined(logprobs[index])) for index, output in enumerate(ordered)]
        return SafeJSONResponse({**answer.head(streamed=False), "choices": choices, "usage": answer.usage(ordered)})


def openai_router(
    host: EngineHost, texts: TextPool, traffic: Traffic, limits: ServerLimits, door: DoorSettings, bodies: BodyReader
) -> APIRouter:
    """Routes under ``/v1``."""
    router = APIRouter(prefix="/v1", default_response_class=SafeJSONResponse)
    service = _Service(host, texts, traffic, limits, door)
    completion_body, chat_body = Depends(bodies.model(CompletionRequest)), Depends(bodies.model(ChatRequest))

    @router.get("/models")
    async def models() -> dict[str, Any]:
        return service.models()

    @router.post("/completions", response_model=None)
    async def completions(request: Request, body: CompletionRequest = completion_body) -> Response:
        return await service.complete(body, request)

    @router.post("/chat/completions", response_model=None)
    async def chat_completions(request: Request, body: ChatRequest = chat_body) -> Response:
        return await service.chat(body, request)

    return router


class _Stream(StreamingResponse):
    """Server-sent events; also a client that leaves before the first of them ends its request."""

    def __init__(self, events: AsyncIterator[str], submission: Submission) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._submission = submission

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See starlette."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._submission.abort()


async def _prompts(
    loop: EngineLoop, body: CompletionRequest | ChatRequest, encoded: list[list[int]], logprobs: int | None
) -> Prompts:
    """As :func:`_with_params`; long prompts are looked through in a thread next to the event loop."""
    if sum(map(len, encoded)) <= _FEW_TOKENS:
        return _with_params(loop, body, encoded, logprobs)
    return await asyncio.to_thread(_with_params, loop, body, encoded, logprobs)


def _with_params(
    loop: EngineLoop, body: CompletionRequest | ChatRequest, encoded: list[list[int]], logprobs: int | None
) -> Prompts:
    """Token ids and parameters of every choice, prompts outermost."""
    prompts: Prompts = []
    try:
        for token_ids in encoded:
            tokens = _tokens_wanted(body, loop.snapshot.max_model_len - len(token_ids))
            choices = [body.sampling_params(tokens, logprobs, choice) for choice in range(body.n)]
            loop.snapshot.admission.check(token_ids, choices[0])  # the others differ by the seed alone
            prompts += [(token_ids, params) for params in choices]
    except RequestError as error:  # the engine speaks of its own fields
        raise type(error)(error.message, field=body.name_of(error.field), remedy=error.remedy) from None
    return prompts


def _tokens_wanted(body: CompletionRequest | ChatRequest, room: int) -> int:
    """What was asked for; a default gives way to the context, of which ``room`` tokens are left."""
    if body.wanted_tokens is not None:
        return body.wanted_tokens
    default = body.default_tokens
    return max(1, room if default is None else min(default, room))


async def _events(answer: _Answer, submission: Submission, request: Request) -> AsyncIterator[str]:
    """Server-sent events of a streamed answer; whatever goes wrong becomes the last of them."""
    try:
        async for document in _chunks(answer, submission, request):
            yield _event(document)
    except asyncio.CancelledError:
        raise
    except Exception as error:
        logger.exception("a streamed answer failed")
        yield _event(error_body(f"internal error: {type(error).__name__}.", "server_error", None, 500))
    yield "data: [DONE]\n\n"


async def _chunks(answer: _Answer, submission: Submission, request: Request) -> AsyncIterator[dict[str, Any]]:
    head = answer.head(streamed=True)
    usage_field = {"usage": None} if answer.include_usage else {}
    finished: dict[int, RequestOutput] = {}
    begun: set[int] = set()
    async for index, output in submission.outputs(request):
        if index not in begun and answer.chat:
            first = {"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
            yield {**head, "choices": [{**first, "logprobs": None}], **usage_field}
        begun.add(index)
        if output.finish_reason == "error":
            failure = answer.failure(output)
            yield openai_error(failure, status_of(failure))
            break
        logprobs = answer.take_logprobs(index, output)
        if output.new_text or output.finished or logprobs or answer.return_token_ids:
            yield {**head, "choices": [answer.delta(index, output, logprobs)], **usage_field}
        if output.finished:
            finished[index] = output
    if answer.include_usage and finished:
        ordered = [finished[index] for index in sorted(finished)]
        yield {**head, "choices": [], "usage": answer.usage(ordered)}


def _event(document: dict[str, Any]) -> str:
    return f"data: {json_text(document)}\n\n"
