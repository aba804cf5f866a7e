"""The real OpenAI client against a real worker, and the API's behaviour at the edges."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from engine.core import Engine
from engine.errors import RequestError
from tests.server.conftest import wait_until

PROMPT = [72, 101, 108, 108, 111]


@pytest.fixture
def server(served: Any) -> Any:
    return served


@pytest.fixture
def client(server: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="unused", http_client=httpx.Client(trust_env=False))


@pytest.fixture
def model(tiny_llama: Path) -> str:
    return str(tiny_llama)


def post(server: Any, path: str, **body: Any) -> httpx.Response:
    return httpx.post(server.url + path, json=body, timeout=60, trust_env=False)


def test_models_are_listed(client: openai.OpenAI, model: str):
    assert [card.id for card in client.models.list()] == [model]


def test_completion_and_its_stream_agree(client: openai.OpenAI, model: str):
    whole = client.completions.create(model=model, prompt="Hello", max_tokens=20, temperature=0)
    chunks = list(
        client.completions.create(
            model=model,
            prompt="Hello",
            max_tokens=20,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole.choices[0].text
    assert whole.usage is not None
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert whole.usage.prompt_tokens == 5
    assert whole.usage.total_tokens == 5 + whole.usage.completion_tokens


def test_chat_and_its_stream_agree(client: openai.OpenAI, model: str):
    messages: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    whole = client.chat.completions.create(model=model, messages=messages, max_tokens=16, temperature=0)
    stream = client.chat.completions.create(model=model, messages=messages, max_tokens=16, temperature=0, stream=True)
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason in ("stop", "length")


def test_asynchronous_client_streams_many_at_once(server: Any, model: str):
    import asyncio

    async def run() -> list[str]:
        http = httpx.AsyncClient(trust_env=False)
        client = openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="x", http_client=http)

        async def one(prompt: str) -> str:
            stream = await client.completions.create(
                model=model, prompt=prompt, max_tokens=10, temperature=0, stream=True, extra_body={"ignore_eos": True}
            )
            return "".join([chunk.choices[0].text async for chunk in stream])

        together = await asyncio.gather(*(one(f"prompt {i}") for i in range(24)))
        alone = [await one(f"prompt {i}") for i in range(24)]
        assert together == alone
        return together

    # in a thread of its own: another test of the session may have left an event loop in this one
    with ThreadPoolExecutor(1) as pool:
        assert len(set(pool.submit(asyncio.run, run()).result())) > 1


def test_logprobs_in_both_forms(client: openai.OpenAI, model: str):
    plain = client.completions.create(model=model, prompt="Hello", max_tokens=4, temperature=0, logprobs=3)
    logprobs = plain.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    assert len(logprobs.token_logprobs) == plain.usage.completion_tokens  # type: ignore[union-attr]
    assert all(value <= 0 for value in logprobs.token_logprobs)
    chat = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Hi"}],
        max_tokens=4,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
    )
    content = chat.choices[0].logprobs.content  # type: ignore[union-attr]
    assert content
    assert all(len(entry.top_logprobs) == 2 for entry in content)


def test_several_choices_with_a_seed_differ_and_repeat(client: openai.OpenAI, model: str):
    def run() -> list[str]:
        answer = client.completions.create(
            model=model, prompt="Hello", max_tokens=12, n=3, seed=5, temperature=1.5, extra_body={"ignore_eos": True}
        )
        return [choice.text for choice in answer.choices]

    assert run() == run()
    assert len(set(run())) > 1


def test_prompts_as_token_ids_texts_and_lists(server: Any):
    by_ids = post(server, "/v1/completions", prompt=PROMPT, max_tokens=6, temperature=0).json()
    lists = post(server, "/v1/completions", prompt=[PROMPT, [1, 2]], max_tokens=6, temperature=0).json()
    assert lists["choices"][0]["text"] == by_ids["choices"][0]["text"]
    assert [choice["index"] for choice in lists["choices"]] == [0, 1]
    assert len(post(server, "/v1/completions", prompt=["a", "b"], max_tokens=2, temperature=0).json()["choices"]) == 2


def test_vllm_fields_are_obeyed(server: Any):
    body = {"prompt": PROMPT, "max_tokens": 30, "temperature": 0, "return_token_ids": True}
    ids = post(server, "/v1/completions", **body, ignore_eos=True).json()["choices"][0]["token_ids"]
    assert len(ids) == 30
    stopped = post(server, "/v1/completions", **body, ignore_eos=True, stop_token_ids=[ids[4]]).json()["choices"][0]
    assert stopped["token_ids"] == ids[: ids.index(ids[4]) + 1]
    assert stopped["stop_reason"] == ids[4]
    long = post(server, "/v1/completions", **body, stop_token_ids=[ids[0]], min_tokens=9).json()["choices"][0]
    assert len(long["token_ids"]) >= 9


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [99999]}, "prompt"),
        ({"prompt": "x", "max_tokens": -1}, "max_tokens"),
        ({"prompt": "x", "temperature": -1}, "temperature"),
        ({"prompt": "x", "temprature": 1}, "temprature"),
        ({"prompt": "x" * 600}, "prompt"),
        ({"prompt": "x", "max_tokens": 5000}, "max_tokens"),
        ({"prompt": "x", "best_of": 4}, "best_of"),
        ({"prompt": "x", "logit_bias": {"1": 2}}, "logit_bias"),
        ({"max_tokens": 3}, "prompt"),
        ({"prompt": "x", "n": 0}, "n"),
    ],
)
def test_bad_request_names_the_field(server: Any, body: dict[str, Any], field: str):
    response = post(server, "/v1/completions", **body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == field
    assert error["type"] == "invalid_request_error"
    assert len(error["message"]) > 20


def test_unknown_model_is_404_for_the_openai_client(client: openai.OpenAI):
    with pytest.raises(openai.NotFoundError, match="is not served here"):
        client.completions.create(model="gpt-5", prompt="x")


def test_body_that_is_not_json_is_refused(server: Any):
    response = httpx.post(server.url + "/v1/completions", content=b"{oops", trust_env=False)
    assert response.status_code == 400
    assert response.json()["error"]["message"]


def test_client_that_disconnects_from_a_stream_frees_its_blocks(server: Any):
    body = {"prompt": PROMPT, "max_tokens": 480, "temperature": 0, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", server.url + "/v1/completions", json=body, timeout=60, trust_env=False) as response:
        assert next(response.iter_lines()).startswith("data: ")
    wait_until(server.idle)
    assert (
        server.app.state.host.loop.call(lambda engine: engine.scheduler.pool.num_free)
        == server.engine.envelope.num_blocks
    )
    assert server.engine.steps[-1].index < 10_000


def test_client_that_gives_up_waiting_frees_its_blocks(server: Any):
    # Hold the engine so that the answer cannot come before the client gives up.
    release = threading.Event()
    holder = threading.Thread(target=lambda: server.app.state.host.loop.call(lambda engine: release.wait(20)))
    holder.start()
    body = {"prompt": PROMPT, "max_tokens": 480, "temperature": 0, "ignore_eos": True}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(server.url + "/v1/completions", json=body, timeout=0.5, trust_env=False)
    time.sleep(1)
    produced = server.engine.totals["output_tokens"]
    release.set()
    holder.join()
    wait_until(server.idle)
    assert server.engine.totals["output_tokens"] - produced < 480


def test_requests_go_on_while_knobs_are_toggled(server: Any):
    def ask(index: int) -> str:
        body = {"prompt": [index, 1, 2, 1, 2], "max_tokens": 40, "temperature": 0, "ignore_eos": True}
        return post(server, "/v1/completions", **body).json()["choices"][0]["text"]

    expected = [ask(index) for index in range(8)]
    with ThreadPoolExecutor(8) as pool:
        answers = pool.map(ask, range(8))
        for changes in (
            {"speculation": "ngram"},
            {"batching": "static"},
            {"batching": "continuous", "speculation": "off"},
        ):
            server.client.patch_config(changes)
        assert list(answers) == expected


def test_metrics_carry_vllms_names(server: Any):
    post(server, "/v1/completions", prompt=PROMPT, max_tokens=6, temperature=0, ignore_eos=True)
    text = httpx.get(server.url + "/metrics", trust_env=False).text
    for name in (
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "vllm:prompt_tokens_total",
        "vllm:generation_tokens_total",
        "vllm:time_to_first_token_seconds_bucket",
        "vllm:inter_token_latency_seconds_count",
        "vllm:e2e_request_latency_seconds_sum",
        "vllm:request_success_total",
        "vllm:num_preemptions_total",
        "vllm:prefix_cache_hits_total",
        "vllm:spec_decode_num_drafts_total",
        "vllm:spec_decode_num_draft_tokens_total",
        "vllm:spec_decode_num_accepted_tokens_total",
    ):
        assert name in text, name
    line = next(line for line in text.splitlines() if line.startswith("vllm:generation_tokens_total"))
    assert float(line.rsplit(" ", 1)[1]) >= 6


def test_draft_acceptance_is_counted_for_each_position(server: Any):
    server.client.patch_config({"speculation": "ngram", "ngram_min": 1, "draft_length": 3})
    try:
        post(server, "/v1/completions", prompt=[5, 6, 7, 8] * 6, max_tokens=60, temperature=0, ignore_eos=True)
    finally:
        server.client.patch_config({"speculation": "off", "ngram_min": 2, "draft_length": 4})
    time.sleep(0.3)  # a status may be a quarter of a second old
    engine = server.client.status()["engine"]
    counted = engine["speculation"]
    assert counted["drafts"] == engine["totals"]["drafts"] > 0
    assert sum(counted["accepted_per_position"]) == engine["totals"]["accepted_tokens"] > 0
    assert sum(counted["proposed_per_position"]) == engine["totals"]["draft_tokens"]
    text = httpx.get(server.url + "/metrics", trust_env=False).text
    lines = [
        line for line in text.splitlines() if line.startswith("vllm:spec_decode_num_accepted_tokens_per_pos_total")
    ]
    assert [float(line.rsplit(" ", 1)[1]) for line in lines] == counted["accepted_per_position"]
    assert 'position="0"' in lines[0]


def test_stream_events_are_well_formed(server: Any):
    body = {"prompt": PROMPT, "max_tokens": 5, "temperature": 0, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", server.url + "/v1/completions", json=body, timeout=60, trust_env=False) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    documents = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert documents[-1]["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("stream", [False, True])
def test_request_that_a_change_of_knobs_outruns_is_refused_and_not_failed(
    server: Any, monkeypatch: pytest.MonkeyPatch, stream: bool
):
    """It was checked under the envelope of before; its client hears why, as if it had been refused at once."""
    refusal = RequestError("12 tokens are more than the 8 a request may hold.", field="max_tokens", remedy="Ask less.")

    def refuse(*arguments: Any) -> None:
        raise refusal

    monkeypatch.setattr(Engine, "add_request", refuse)
    answer = post(server, "/v1/completions", prompt="hi", max_tokens=4, stream=stream)
    if stream:
        events = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
        assert events[-1] == "[DONE]"
        error = json.loads(events[-2])["error"]
    else:
        assert answer.status_code == 400
        error = answer.json()["error"]
    assert (error["param"], error["code"]) == ("max_tokens", 400)
    assert "Ask less." in error["message"]
