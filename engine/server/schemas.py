"""Bodies of the OpenAI requests, with vLLM's extra fields. Unknown fields are refused: no typo passes silently."""

from __future__ import annotations

from typing import Annotated, Any, Self

import pydantic_core
from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationInfo, model_validator

from engine.errors import RequestError
from engine.sampling.params import SamplingParams
from engine.server.bodies import TooLargeError, UnprocessableError, shorten
from engine.server.limits import ServerLimits

MIN_WHOLE, MAX_WHOLE = -(2**63), 2**63 - 1
MAX_LABEL = 1000  # characters of a run's label

Whole = Annotated[int, Field(ge=MIN_WHOLE, le=MAX_WHOLE)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0, le=MAX_WHOLE)]], Field(fail_fast=True)]

# Fields of the OpenAI API that are accepted but have no meaning for a single local model.
_IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls")
# Fields that would change the answer and are not supported: refused unless they have their neutral value.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (None, 1),
    "echo": (None, False),
    "suffix": (None, ""),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "logit_bias": (None, {}),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "response_format": (None, {"type": "text"}),
}


class _RefusedError(ValueError):
    """Carries an error of ours through pydantic."""

    def __init__(self, carried: RequestError) -> None:
        super().__init__(carried.message)
        self.carried = carried


def _limits(info: ValidationInfo) -> ServerLimits:
    return info.context if isinstance(info.context, ServerLimits) else ServerLimits()


def _check_count(value: Any, field: str, most: int, flag: str) -> None:
    if isinstance(value, list) and len(value) > most:
        error = UnprocessableError(
            f"has {len(value):,} entries, more than {most:,}.", field=field, remedy=f"Send fewer, or raise --{flag}."
        )
        raise _RefusedError(error)


def _prompt(value: Any, info: ValidationInfo) -> Any:
    """A text, token ids, or a list of either: looked through once, and only if it is not too much."""
    limits = _limits(info)
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("give a text, token ids, or a list of either")
    if value and isinstance(value[0], str | list):
        _check_count(value, "prompt", limits.max_choices, "max-choices")
        kind = type(value[0])
        if any(type(item) is not kind for item in value):
            raise ValueError("give texts or lists of token ids, not both")
        if kind is str:
            return value
    several = value if value and isinstance(value[0], list) else [value]
    if sum(map(len, several)) > limits.max_prompt_characters:
        raise _RefusedError(too_many_characters("prompt", limits))
    for ids in several:
        if any(type(token_id) is not int or not 0 <= token_id <= MAX_WHOLE for token_id in ids):
            raise ValueError("token ids are whole numbers of at least 0")
    return value


def too_many_characters(field: str, limits: ServerLimits) -> TooLargeError:
    """The error of more text than is tokenized."""
    most = limits.max_prompt_characters
    message = f"is longer than {most:,} characters or token ids in all."
    return TooLargeError(message, field=field, remedy="Send less, or raise --max-prompt-characters.")


class _Body(BaseModel):
    """A part of a request. ``null`` in an optional field means its default, as in the OpenAI API."""

    model_config = ConfigDict(allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if value is not None or name not in cls.model_fields}


class StreamOptions(_Body):
    """``include_usage`` adds a last chunk with the token counts."""

    include_usage: bool = False


class _SamplingFields(_Body):
    """What completions and chat completions share."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    model: str | None = None
    max_tokens: Whole | None = None
    max_completion_tokens: Whole | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    n: int = Field(default=1, ge=1, le=128)
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: str | Annotated[list[str], Field(fail_fast=True)] | None = None
    seed: Whole | None = None
    priority: Whole = 0
    # vLLM's
    top_k: Whole = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    min_tokens: Whole = 0
    ignore_eos: bool = False
    stop_token_ids: TokenIds = Field(default_factory=list)
    return_token_ids: bool = False

    @model_validator(mode="before")
    @classmethod
    def _check_counts(cls, values: Any, info: ValidationInfo) -> Any:
        """Before anything is looked at one by one."""
        limits = _limits(info)
        if isinstance(values, dict):
            for name in ("stop", "stop_token_ids"):
                _check_count(values.get(name), name, limits.max_stop_strings, "max-stop-strings")
            _check_count(values.get("messages"), "messages", limits.max_messages, "max-messages")
        return values

    @model_validator(mode="after")
    def _check_stop(self, info: ValidationInfo) -> Self:
        limit = _limits(info).max_stop_characters
        if self.stop and sum(map(len, self.stop)) > limit:
            remedy = "Use shorter ones, or raise --max-stop-characters."
            raise _RefusedError(UnprocessableError(f"has more than {limit:,} characters.", field="stop", remedy=remedy))
        return self

    @property
    def wanted_tokens(self) -> int | None:
        """The output tokens asked for; None if the request says nothing of them."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def name_of(self, field: str | None) -> str | None:
        """What this request calls a field of the engine."""
        if field == "max_tokens" and self.max_completion_tokens is not None:
            return "max_completion_tokens"
        return field

    def check_extra_fields(self) -> None:
        """Refuse unknown fields, and known ones that are not supported.

        Raises:
            RequestError: naming the field.
        """
        for name, value in (self.model_extra or {}).items():
            if name in _IGNORED or (name in _NEUTRAL and value in _NEUTRAL[name]):
                continue
            message = "is not supported." if name in _NEUTRAL else "is not a field of this request."
            raise RequestError(message, field=name, remedy="Leave it out.")

    def sampling_params(self, max_tokens: int, logprobs: int | None, choice: int) -> SamplingParams:
        """The engine's parameters for the ``choice``-th of ``n`` answers (each has a seed of its own)."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return SamplingParams(
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            seed=None if self.seed is None else (self.seed + choice - MIN_WHOLE) % 2**64 + MIN_WHOLE,
            stop=stop,
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            logprobs=logprobs,
        )


class CompletionRequest(_SamplingFields):
    """Body of ``POST /v1/completions``. ``prompt``: a text, token ids, or a list of either."""

    prompt: Annotated[Any, PlainValidator(_prompt)]
    logprobs: Whole | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts one by one."""
        several = isinstance(self.prompt, list) and bool(self.prompt) and isinstance(self.prompt[0], str | list)
        return self.prompt if several else [self.prompt]

    @property
    def default_tokens(self) -> int:
        """Output tokens where the request says nothing of them, if there is room."""
        return 16


class ChatMessage(_Body):
    """One turn. ``content`` may be OpenAI's list of parts as long as all are text; a turn of the assistant may have
    none, nor need it where it called tools."""

    role: str
    content: str | Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None = None
    name: str | None = None
    tool_calls: Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _check_parts(cls, values: Any, info: ValidationInfo) -> Any:
        if isinstance(values, dict):
            for name in ("content", "tool_calls"):
                if isinstance(values.get(name), list):
                    _check_count(values[name], "messages", _limits(info).max_messages, "max-messages")
        return values

    @model_validator(mode="after")
    def _needs_content(self) -> Self:
        if self.content is None and self.role != "assistant":
            message = f"a message of role {shorten(self.role)!r} has no content."
            raise _RefusedError(RequestError(message, field="messages", remedy="Only the assistant's may have none."))
        return self

    def text(self) -> str:
        """The content as one string.

        Raises:
            RequestError: if a part is not text.
        """
        if self.content is None:
            return ""
        if isinstance(self.content, str):
            return self.content
        for part in self.content:
            if part.get("type") != "text" or not isinstance(part.get("text", ""), str):
                kind = shorten(str(part.get("type")))
                raise RequestError(
                    f"a part of type {kind!r} cannot be read.", field="messages", remedy="Send text only."
                )
        return "".join(part.get("text", "") for part in self.content)

    def for_template(self) -> dict[str, Any]:
        """The turn as chat templates expect it: the arguments of tool calls as objects instead of their JSON."""
        turn: dict[str, Any] = {"role": self.role, "content": self.text()}
        given = {"name": self.name, "tool_call_id": self.tool_call_id}
        turn |= {name: value for name, value in given.items() if value is not None}
        if self.tool_calls:
            turn["tool_calls"] = [_with_parsed_arguments(call) for call in self.tool_calls]
        return turn


def _with_parsed_arguments(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = pydantic_core.from_json(function["arguments"])
    except ValueError:  # what the model wrote was no JSON: the template gets it as it was
        return call
    return {**call, "function": {**function, "arguments": arguments}}


class ChatRequest(_SamplingFields):
    """Body of ``POST /v1/chat/completions``."""

    messages: Annotated[list[ChatMessage], Field(fail_fast=True)] = Field(min_length=1)
    logprobs: bool | None = None
    top_logprobs: Whole | None = None

    @property
    def default_tokens(self) -> int | None:
        """All that remains of the context."""
        return None

    def logprobs_wanted(self) -> int | None:
        """How many alternatives to report for each token; None for no log-probabilities.

        Raises:
            RequestError: if alternatives are asked for without log-probabilities.
        """
        if not self.logprobs and self.top_logprobs:
            raise RequestError("needs logprobs.", field="top_logprobs", remedy="Set logprobs to true.")
        return (self.top_logprobs or 0) if self.logprobs else None

    def name_of(self, field: str | None) -> str | None:
        """What this request calls a field of the engine."""
        return super().name_of({"prompt": "messages", "logprobs": "top_logprobs"}.get(field or "", field))


class ComparisonBody(BaseModel):
    """Two settings against each other: changes of knobs, and how often each is run."""

    model_config = ConfigDict(extra="forbid")

    arm_a: dict[str, Any]
    arm_b: dict[str, Any]
    repeats: int = Field(default=5, ge=1, le=100)
    quality: bool = True


class RunBody(BaseModel):
    """Body of ``POST /admin/runs``: a workload by name or definition, once or as a comparison."""

    model_config = ConfigDict(extra="forbid")

    workload: str | dict[str, Any]
    seed: int = Field(default=0, ge=0, le=MAX_WHOLE - 1000)
    label: str = Field(default="", max_length=MAX_LABEL)
    changes: dict[str, Any] = Field(default_factory=dict)
    slo: dict[str, Any] | None = None
    comparison: ComparisonBody | None = None
