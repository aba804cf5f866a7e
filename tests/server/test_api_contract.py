"""Cases that clients of the OpenAI API rely on, as users of other servers have reported them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.config import EngineConfig
from tests.server.conftest import KNOBS, ServedApp

PLAIN, CHAT = "/v1/completions", "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]
OPTIONAL = (
    *("model", "max_tokens", "max_completion_tokens", "temperature", "top_p", "n", "stream", "stream_options", "stop"),
    *("seed", "priority", "top_k", "min_p", "repetition_penalty", "min_tokens", "ignore_eos", "stop_token_ids"),
    *("return_token_ids", "logprobs", "user", "best_of", "logit_bias", "response_format"),
)
GREEDY = {"temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def http(served: ServedApp) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served.url, timeout=30, trust_env=False) as client:
        yield client


def body_of(path: str, **fields: Any) -> dict[str, Any]:
    return {**({"messages": HELLO} if path == CHAT else {"prompt": "hello"}), **fields}


def streamed(http: httpx.Client, path: str, **fields: Any) -> list[dict[str, Any]]:
    """The first choice of every chunk."""
    with http.stream("POST", path, json=body_of(path, **fields, stream=True)) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    return [choice for line in lines for choice in json.loads(line)["choices"]]


@pytest.mark.parametrize("path", [PLAIN, CHAT])
def test_null_in_any_optional_field_means_its_default(http: httpx.Client, path: str):
    fields = (*OPTIONAL, "top_logprobs", "tools", "tool_choice") if path == CHAT else OPTIONAL
    if path == CHAT:  # all that remains of the context would be generated
        fields = tuple(name for name in fields if name not in ("max_tokens", "max_completion_tokens"))
    for name in fields:
        body = body_of(path, **{"max_tokens": 2, name: None})
        response = http.post(path, json=body)
        assert response.status_code == 200, (name, response.text)
    everything = body_of(path, max_tokens=2) | dict.fromkeys(fields)
    assert http.post(path, json={**everything, "max_tokens": 2}).status_code == 200
    options = {"stream_options": {"include_usage": None}, "stream": True, "max_tokens": 2}
    assert http.post(path, json=body_of(path, **options)).status_code == 200


def test_null_in_a_required_field_is_refused_by_name(http: httpx.Client):
    for path, field in ((PLAIN, "prompt"), (CHAT, "messages")):
        response = http.post(path, json={field: None})
        assert (response.status_code, response.json()["error"]["param"]) == (400, field)


@pytest.mark.parametrize("content", [{"content": None}, {}, {"content": ""}, {"content": "x"}])
def test_turn_of_the_assistant_that_called_tools_needs_no_content(http: httpx.Client, content: dict[str, Any]):
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    messages = [
        *HELLO,
        {"role": "assistant", "tool_calls": [call], **content},
        {"role": "tool", "tool_call_id": "call_1", "name": "weather", "content": "sunny"},
        {"role": "user", "content": [{"type": "text", "text": "thanks"}], "name": None},
    ]
    response = http.post(CHAT, json={"messages": messages, "max_tokens": 2})
    assert response.status_code == 200, response.text


def test_other_turns_need_content(http: httpx.Client):
    for role in ("user", "system", "tool"):
        response = http.post(CHAT, json={"messages": [{"role": role, "content": None}]})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "messages")


def test_bytes_of_chat_logprobs_joined_are_the_utf8_of_the_answer(http: httpx.Client):
    found = 0
    for seed in range(6):  # random bytes: some of them happen to be characters of several bytes
        fields = {"max_tokens": 30, "temperature": 1.2, "seed": seed, "logprobs": True, "top_logprobs": 2}
        choice = http.post(CHAT, json=body_of(CHAT, **fields)).json()["choices"][0]
        content = bytes(byte for entry in choice["logprobs"]["content"] for byte in entry["bytes"])
        assert content.decode("utf-8", "replace") == choice["message"]["content"]
        found += any(character != "\ufffd" and ord(character) > 127 for character in choice["message"]["content"])
        assert all(len(line["bytes"]) <= 1 for entry in choice["logprobs"]["content"] for line in entry["top_logprobs"])
    assert found


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("with_stop", [False, True])
def test_text_offsets_streamed_are_those_of_the_whole_and_never_beyond_the_text(
    http: httpx.Client, seed: int, with_stop: bool
):
    fields: dict[str, Any] = {"max_tokens": 30, "temperature": 1.2, "seed": seed, "logprobs": 1, "ignore_eos": True}
    if with_stop:
        text = http.post(PLAIN, json=body_of(PLAIN, **fields)).json()["choices"][0]["text"]
        fields["stop"] = [text[len(text) // 2 : len(text) // 2 + 2], "never there"]
    whole = http.post(PLAIN, json=body_of(PLAIN, **fields)).json()["choices"][0]
    parts = streamed(http, PLAIN, **fields)
    known = [part["logprobs"] for part in parts if part["logprobs"]]
    for name in ("tokens", "text_offset"):
        assert [item for part in known for item in part[name]] == whole["logprobs"][name]
    text, offsets = whole["text"], whole["logprobs"]["text_offset"]
    assert "".join(part["text"] for part in parts) == text
    assert offsets == sorted(offsets)
    assert all(offset < len(text) for offset in offsets)
    tokens, special = whole["logprobs"]["tokens"], ("\ufffd", "<|end|>")
    assert all(text[at] == token for at, token in zip(offsets, tokens, strict=True) if token not in special)
    if with_stop:
        assert whole["finish_reason"] == "stop"
        assert len(tokens) < 30


def test_default_of_max_tokens_gives_way_to_the_context_and_a_stated_one_is_refused(
    start_app: Callable[..., ServedApp], tiny_llama: Path
):
    served = start_app(EngineConfig.from_mapping({**KNOBS, "model": str(tiny_llama), "max_model_len": 64}))
    served.wait_ready()
    with httpx.Client(base_url=served.url, timeout=30, trust_env=False) as http:
        body = {"prompt": [1] * 49, **GREEDY}
        assert http.post(PLAIN, json=body).json()["usage"]["completion_tokens"] == 15
        assert http.post(PLAIN, json={**body, "max_tokens": None}).json()["usage"]["completion_tokens"] == 15
        for name in ("max_tokens", "max_completion_tokens"):
            refused = http.post(PLAIN, json={**body, name: 16})
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, name)


@pytest.mark.parametrize("path", [PLAIN, CHAT])
def test_max_completion_tokens_is_accepted_by_both_endpoints(http: httpx.Client, path: str):
    answer = http.post(path, json=body_of(path, max_completion_tokens=5, max_tokens=9, **GREEDY))
    assert answer.json()["usage"]["completion_tokens"] == 5


def test_choices_with_a_seed_differ_and_the_first_is_that_of_one_alone(http: httpx.Client):
    fields = {"max_tokens": 12, "temperature": 1.5, "seed": 3, "ignore_eos": True}
    texts = [c["text"] for c in http.post(PLAIN, json=body_of(PLAIN, n=3, **fields)).json()["choices"]]
    assert len(set(texts)) == 3
    assert http.post(PLAIN, json=body_of(PLAIN, **fields)).json()["choices"][0]["text"] == texts[0]
    largest = {**fields, "seed": 2**63 - 1}
    assert http.post(PLAIN, json=body_of(PLAIN, n=3, **largest)).status_code in (200, 400)


def test_many_prompts_and_long_stop_strings_are_served(http: httpx.Client):
    answer = http.post(PLAIN, json={"prompt": ["x"] * 65, "max_tokens": 1})
    assert len(answer.json()["choices"]) == 65
    assert http.post(PLAIN, json={"prompt": "x", "stop": "y" * 200_000, "max_tokens": 2}).status_code == 200
    assert http.post(PLAIN, json={"prompt": ["fine", ""]}).json()["error"]["param"] == "prompt"
