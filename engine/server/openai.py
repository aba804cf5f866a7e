"""The OpenAI API: ``/v1/models``, ``/v1/completions``, ``/v1/chat/completions``, streamed and not."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from engine.errors import HeadroomError, RequestError
from engine.loop import EngineLoop
from engine.outputs import RequestOutput, TokenLogprob
from engine.sampling import SamplingParams
from engine.server.host import EngineHost
from engine.server.schemas import ChatRequest, CompletionRequest
from engine.server.streaming import Submission

Prompts = list[tuple[list[int], SamplingParams]]


@dataclasses.dataclass(slots=True)
class _Answer:
    """What an answer is made of, whichever endpoint and mode.

    Attributes:
        chat: chat completion or plain completion.
        n: choices per prompt.
        return_token_ids: add token ids to every choice (vLLM's extension).
    """

    loop: EngineLoop
    chat: bool
    n: int
    return_token_ids: bool
    include_usage: bool
    identifier: str = ""
    created: int = 0

    def __post_init__(self) -> None:
        self.identifier = f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())

    def head(self, streamed: bool) -> dict[str, Any]:
        kind = "text_completion" if not self.chat else ("chat.completion.chunk" if streamed else "chat.completion")
        return {
            "id": self.identifier,
            "object": kind,
            "created": self.created,
            "model": self.loop.engine.model.name,
        }

    def choice(self, index: int, output: RequestOutput) -> dict[str, Any]:
        """A complete choice of an answer that is not streamed."""
        logprobs = self._logprobs(output.logprobs, 0)
        choice: dict[str, Any] = {"index": index, "logprobs": logprobs, "finish_reason": output.finish_reason}
        choice["stop_reason"] = output.stop_reason
        if self.chat:
            choice["message"] = {"role": "assistant", "content": output.text, "refusal": None}
        else:
            choice["text"] = output.text
        if self.return_token_ids:
            choice |= {"token_ids": output.token_ids, "prompt_token_ids": output.prompt_token_ids}
        return choice

    def delta(self, index: int, output: RequestOutput, offset: int) -> dict[str, Any]:
        """A piece of a streamed choice; it may carry several tokens under speculation."""
        choice: dict[str, Any] = {
            "index": index,
            "logprobs": self._logprobs(output.logprobs, offset),
            "finish_reason": output.finish_reason,
        }
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

    def _logprobs(self, entries: list[TokenLogprob] | None, offset: int) -> dict[str, Any] | None:
        if entries is None:
            return None
        decode = self.loop.engine.model.tokenizer.decode
        if self.chat:
            return {"content": [_chat_logprob(entry, decode) for entry in entries]}
        tokens = [decode([entry.token_id]) for entry in entries]
        offsets = [offset + sum(map(len, tokens[:i])) for i in range(len(tokens))]
        return {
            "tokens": tokens,
            "token_logprobs": [entry.logprob for entry in entries],
            # several tokens may have the same text (parts of a character): the most likely one stands for it
            "top_logprobs": [{decode([t]): v for t, v in reversed(entry.top.items())} for entry in entries],
            "text_offset": offsets,
        }


def _chat_logprob(entry: TokenLogprob, decode: Any) -> dict[str, Any]:
    def line(token_id: int, logprob: float) -> dict[str, Any]:
        text = decode([token_id])
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    top = [line(token_id, value) for token_id, value in entry.top.items()]
    return {**line(entry.token_id, entry.logprob), "top_logprobs": top}


def openai_router(host: EngineHost) -> APIRouter:
    """Routes under ``/v1``."""
    router = APIRouter(prefix="/v1")

    @router.get("/models")
    def models() -> dict[str, Any]:
        loop = host.loop
        card = {
            "id": loop.engine.model.name,
            "object": "model",
            "created": int(host.started_unix_s),
            "owned_by": "headroom",
            "max_model_len": loop.engine.envelope.max_model_len,
        }
        return {"object": "list", "data": [card]}

    @router.post("/completions", response_model=None)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        loop = _loop_for(host, body.model)
        body.check_extra_fields()
        prompts = await asyncio.to_thread(_completion_prompts, loop, body)
        usage = body.stream_options is not None and body.stream_options.include_usage
        answer = _Answer(loop, False, body.n, body.return_token_ids, usage)
        return await _respond(answer, prompts, body.priority, body.stream, request)

    @router.post("/chat/completions", response_model=None)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        loop = _loop_for(host, body.model)
        body.check_extra_fields()
        prompts = await asyncio.to_thread(_chat_prompts, loop, body)
        usage = body.stream_options is not None and body.stream_options.include_usage
        answer = _Answer(loop, True, body.n, body.return_token_ids, usage)
        return await _respond(answer, prompts, body.priority, body.stream, request)

    return router


class UnknownModelError(RequestError):
    """The request names a model that is not the one being served (404)."""


def _loop_for(host: EngineHost, model: str | None) -> EngineLoop:
    loop = host.loop
    served = loop.engine.model.name
    if model is not None and model != served:
        raise UnknownModelError(f"{model!r} is not served here.", field="model", remedy=f"Use {served!r}.")
    return loop


def _completion_prompts(loop: EngineLoop, body: CompletionRequest) -> Prompts:
    """Token ids and parameters of every choice, prompts outermost."""
    prompt: Any = body.prompt
    several = isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], str | list)
    texts: list[Any] = prompt if several else [prompt]
    tokenizer = loop.engine.model.tokenizer
    encoded = [tokenizer(item).input_ids if isinstance(item, str) else list(item) for item in texts]
    return _with_params(loop, body, encoded, body.max_tokens, body.logprobs)


def _chat_prompts(loop: EngineLoop, body: ChatRequest) -> Prompts:
    tokenizer = loop.engine.model.tokenizer
    if not tokenizer.chat_template:
        raise RequestError("the model has no chat template.", field="messages", remedy="Use /v1/completions instead.")
    messages = [{"role": message.role, "content": message.text()} for message in body.messages]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as problem:  # templates raise whatever they like for roles they do not know
        raise RequestError(
            f"the model's chat template refused them: {problem}",
            field="messages",
            remedy="Check roles and their order.",
        ) from problem
    token_ids = tokenizer(text, add_special_tokens=False).input_ids
    wanted = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    try:
        return _with_params(loop, body, [token_ids], wanted, body.logprobs_wanted())
    except RequestError as problem:  # the engine speaks of its own fields
        raise RequestError(problem.message, field=body.name_of(problem.field), remedy=problem.remedy) from None


def _with_params(
    loop: EngineLoop,
    body: CompletionRequest | ChatRequest,
    encoded: list[list[int]],
    max_tokens: int | None,
    logprobs: int | None,
) -> Prompts:
    prompts: Prompts = []
    for token_ids in encoded:
        room = loop.engine.envelope.max_model_len - len(token_ids)
        for choice in range(body.n):
            params = body.sampling_params(max(1, room) if max_tokens is None else max_tokens, logprobs, choice)
            loop.engine.validate_request(token_ids, params)
            prompts.append((token_ids, params))
    return prompts


async def _respond(answer: _Answer, prompts: Prompts, priority: int, stream: bool, request: Request) -> Response:
    submission = Submission(answer.loop)
    submission.submit(prompts, priority)
    if stream:
        return StreamingResponse(_events(answer, submission, request), media_type="text/event-stream")
    finished: dict[int, RequestOutput] = {}
    logprobs: dict[int, list[TokenLogprob]] = {}
    async for index, output in submission.outputs(request):
        logprobs.setdefault(index, []).extend(output.logprobs or [])
        if output.finished:
            if output.finish_reason == "error":
                submission.abort()
                return JSONResponse(error_body(output.error or "the engine failed", "server_error"), status_code=500)
            finished[index] = output
            if output.logprobs is not None:
                output.logprobs = logprobs[index]
    if len(finished) < len(prompts):  # the client has gone: nobody reads this
        return Response(status_code=499)
    ordered = [finished[index] for index in sorted(finished)]
    choices = [answer.choice(index, output) for index, output in enumerate(ordered)]
    return JSONResponse({**answer.head(streamed=False), "choices": choices, "usage": answer.usage(ordered)})


async def _events(answer: _Answer, submission: Submission, request: Request) -> AsyncIterator[str]:
    """Server-sent events of a streamed answer."""
    head = answer.head(streamed=True)
    usage_field = {"usage": None} if answer.include_usage else {}
    finished: dict[int, RequestOutput] = {}
    offsets: dict[int, int] = {}
    async for index, output in submission.outputs(request):
        if index not in offsets and answer.chat:
            first = {"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
            yield _event({**head, "choices": [{**first, "logprobs": None}], **usage_field})
        if output.finish_reason == "error":
            yield _event(error_body(output.error or "the engine failed", "server_error"))
            break
        offset = offsets.setdefault(index, 0)
        if output.new_text or output.finished or output.logprobs or answer.return_token_ids:
            yield _event({**head, "choices": [answer.delta(index, output, offset)], **usage_field})
        offsets[index] = offset + len(output.new_text)
        if output.finished:
            finished[index] = output
    if answer.include_usage and finished:
        ordered = [finished[index] for index in sorted(finished)]
        yield _event({**head, "choices": [], "usage": answer.usage(ordered)})
    yield "data: [DONE]\n\n"


def _event(document: dict[str, Any]) -> str:
    return f"data: {json.dumps(document, ensure_ascii=False)}\n\n"


def error_body(message: str, kind: str, field: str | None = None, code: int | str | None = None) -> dict[str, Any]:
    """An error as the OpenAI API answers it."""
    return {"error": {"message": message, "type": kind, "param": field, "code": code}}


def openai_error(problem: HeadroomError, status: int) -> JSONResponse:
    """The answer for a request that cannot be served."""
    kind = {404: "not_found_error", 503: "service_unavailable"}.get(status, "invalid_request_error")
    message = f"{problem.message} {problem.remedy or ''}".strip()
    text = f"{problem.field}: {message}" if problem.field else message
    return JSONResponse(error_body(text, kind, problem.field, status), status_code=status)
