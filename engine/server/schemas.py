"""Bodies of the OpenAI requests, with vLLM's extra fields. Unknown fields are refused: no typo passes silently."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from engine.errors import RequestError
from engine.sampling import SamplingParams

TokenIds = list[Annotated[int, Field(ge=0)]]

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


class StreamOptions(BaseModel):
    """``include_usage`` adds a last chunk with the token counts."""

    include_usage: bool = False


class _SamplingFields(BaseModel):
    """What completions and chat completions share."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    n: int = Field(default=1, ge=1, le=128)
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    priority: int = 0
    # vLLM's
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: TokenIds = Field(default_factory=list)
    return_token_ids: bool = False

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
            seed=None if self.seed is None else self.seed + choice,
            stop=stop,
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            logprobs=logprobs,
        )


class CompletionRequest(_SamplingFields):
    """Body of ``POST /v1/completions``. ``prompt``: a text, token ids, or a list of either."""

    prompt: str | TokenIds | list[str] | list[TokenIds]
    max_tokens: int | None = 16
    logprobs: int | None = None


class ChatMessage(BaseModel):
    """One turn. ``content`` may be OpenAI's list of parts as long as all are text."""

    role: str
    content: str | list[dict[str, Any]]
    name: str | None = None

    def text(self) -> str:
        """The content as one string.

        Raises:
            RequestError: if a part is not text.
        """
        if isinstance(self.content, str):
            return self.content
        for part in self.content:
            if part.get("type") != "text":
                raise RequestError(
                    f"a part of type {part.get('type')!r} cannot be read.", field="messages", remedy="Send text only."
                )
        return "".join(str(part.get("text", "")) for part in self.content)


class ChatRequest(_SamplingFields):
    """Body of ``POST /v1/chat/completions``."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None

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
        names = {"prompt": "messages", "logprobs": "top_logprobs"}
        if self.max_completion_tokens is not None:
            names["max_tokens"] = "max_completion_tokens"
        return names.get(field, field) if field else None


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
    seed: int = Field(default=0, ge=0)
    label: str = ""
    changes: dict[str, Any] = Field(default_factory=dict)
    slo: dict[str, Any] | None = None
    comparison: ComparisonBody | None = None
