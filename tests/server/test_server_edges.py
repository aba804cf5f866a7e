"""Where servers usually break: clients that vanish, engines that fail, fields that contradict each other."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from transformers import AutoModelForCausalLM

from engine.config import EngineConfig
from engine.worker.client import EngineClient, WorkerError
from tests.server.conftest import ServedApp, slowed, wait_until

pytestmark = pytest.mark.slow

CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"
LONG = {"max_tokens": 400, "temperature": 0, "ignore_eos": True}
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def http(served: ServedApp) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served.url, timeout=30, trust_env=False) as client:
        yield client


def body_of(path: str, **fields: Any) -> dict[str, Any]:
    return {**({"messages": HELLO} if path == CHAT else {"prompt": "hello"}), **fields}


def stream(http: httpx.Client, path: str, **fields: Any) -> list[Any]:
    """The documents of a streamed answer, its end checked and left out."""
    with http.stream("POST", path, json=body_of(path, **fields, stream=True)) as response:
        assert response.status_code == 200
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


# -- clients that vanish -------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [PLAIN, CHAT])
@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
def test_client_that_vanishes_while_tokens_flow_frees_its_blocks_at_once(served: ServedApp, path: str, streamed: bool):
    with slowed(served, 0.02):  # 400 tokens would take 8 s
        before = served.engine.totals["output_tokens"]
        leave_early(served, path, streamed)
        wait_until(served.idle, 3)
    assert served.engine.totals["output_tokens"] - before < 200


def leave_early(served: ServedApp, path: str, streamed: bool) -> None:
    """Ask for a long answer and close the connection after half a second."""
    fields = body_of(path, **LONG, stream=streamed)
    timeout = httpx.Timeout(5.0, read=0.5)
    with httpx.Client(base_url=served.url, timeout=timeout, trust_env=False) as client:
        if streamed:
            with client.stream("POST", path, json=fields) as response:
                assert next(response.iter_lines()).startswith("data: ")
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post(path, json=fields)


def test_client_that_vanishes_takes_all_its_choices_along(served: ServedApp):
    fields = {"prompt": ["one", "two"], "n": 4, **LONG, "stream": True}
    with slowed(served, 0.02), httpx.stream("POST", served.url + PLAIN, json=fields, trust_env=False) as response:
        lines = response.iter_lines()
        next(lines)
        wait_until(lambda: served.client.status()["engine"]["running"] == 8, 5)
        response.close()
        wait_until(served.idle, 3)


def test_stopping_the_clients_iterator_ends_the_request(served: ServedApp):
    with slowed(served, 0.02):
        chunks = served.client.stream_chat(HELLO, **LONG)
        next(chunks)
        chunks.close()  # type: ignore[attr-defined]
        wait_until(served.idle, 3)


# -- answers in detail -----------------------------------------------------------------------------------------


def test_missing_max_tokens_means_16_for_a_text_and_all_that_remains_for_a_chat(http: httpx.Client):
    fields = {"temperature": 0, "ignore_eos": True}
    assert http.post(PLAIN, json=body_of(PLAIN, **fields)).json()["usage"]["completion_tokens"] == 16
    assert http.post(CHAT, json=body_of(CHAT, **fields)).json()["usage"]["total_tokens"] == 512


@pytest.mark.parametrize("path", [PLAIN, CHAT])
def test_streamed_logprobs_are_those_of_the_whole_answer(http: httpx.Client, path: str):
    fields = {**LONG, "max_tokens": 12, **logprobs_asked(path)}
    whole = http.post(path, json=body_of(path, **fields)).json()["choices"][0]["logprobs"]
    parts = [part for chunk in stream(http, path, **fields) if (part := chunk["choices"][0].get("logprobs"))]
    streamed = {name: [entry for part in parts for entry in part[name]] for name in whole}
    assert without_values(streamed) == without_values(whole)
    assert values(streamed) == pytest.approx(values(whole), abs=1e-5)
    assert len(values(whole)) >= 2 * 12


@pytest.mark.parametrize("path", [PLAIN, CHAT])
@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
def test_logprobs_are_the_log_softmax_of_transformers(http: httpx.Client, tiny_llama: Path, path: str, streamed: bool):
    fields = {**LONG, "max_tokens": 12, **logprobs_asked(path), "return_token_ids": True}
    whole = http.post(path, json=body_of(path, **fields)).json()["choices"][0]
    prompt, answer = whole["prompt_token_ids"], whole["token_ids"]
    parts = [chunk["choices"][0] for chunk in stream(http, path, **fields)] if streamed else [whole]
    parts = [part["logprobs"] for part in parts if part["logprobs"]]
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    expected = logits.log_softmax(-1)
    chosen = [expected[index, token].item() for index, token in enumerate(answer)]
    best, second = expected.topk(2).values.T.tolist()
    if path == CHAT:
        content = [entry for part in parts for entry in part["content"]]
        assert [entry["logprob"] for entry in content] == pytest.approx(chosen, abs=1e-4)
        assert [entry["top_logprobs"][0]["logprob"] for entry in content] == pytest.approx(best, abs=1e-4)
        assert [entry["top_logprobs"][1]["logprob"] for entry in content] == pytest.approx(second, abs=1e-4)
        return
    tops = [top for part in parts for top in part["top_logprobs"]]
    assert [value for part in parts for value in part["token_logprobs"]] == pytest.approx(chosen, abs=1e-4)
    assert [max(top.values()) for top in tops] == pytest.approx(best, abs=1e-4)
    # two tokens that are parts of characters have one text
    seconds = [min(top.values()) if len(top) == 2 else second[index] for index, top in enumerate(tops)]
    assert seconds == pytest.approx(second, abs=1e-4)


def logprobs_asked(path: str) -> dict[str, Any]:
    return {"logprobs": True, "top_logprobs": 2} if path == CHAT else {"logprobs": 2}


def values(document: Any) -> list[float]:
    """Every log-probability of a document, in its order."""
    if isinstance(document, float):
        return [document]
    parts = document.values() if isinstance(document, dict) else document if isinstance(document, list) else ()
    return [value for part in parts for value in values(part)]


def without_values(document: Any) -> Any:
    """The document with its log-probabilities, which rounding may change, left out."""
    if isinstance(document, dict):
        return {name: without_values(part) for name, part in document.items()}
    if isinstance(document, list):
        return [without_values(part) for part in document]
    return None if isinstance(document, float) else document


def test_only_the_last_chunk_has_the_usage_and_only_if_asked_for(http: httpx.Client):
    asked = stream(http, PLAIN, **{**LONG, "max_tokens": 5}, n=2, stream_options={"include_usage": True})
    assert asked[-1]["choices"] == []
    assert asked[-1]["usage"] == {**asked[-1]["usage"], "prompt_tokens": 5, "completion_tokens": 10, "total_tokens": 15}
    assert all(chunk["usage"] is None for chunk in asked[:-1])
    assert all("usage" not in chunk for chunk in stream(http, PLAIN, **{**LONG, "max_tokens": 5}))


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
def test_stop_string_is_never_seen_by_the_client(http: httpx.Client, streamed: bool):
    fields = {**LONG, "max_tokens": 60}
    text = http.post(PLAIN, json=body_of(PLAIN, **fields)).json()["choices"][0]["text"]
    stop = next(text[i : i + 3] for i in range(5, len(text)) if "\ufffd" not in text[i : i + 3])
    if streamed:
        choices = [chunk["choices"][0] for chunk in stream(http, PLAIN, **fields, stop=[stop, "never there"])]
        found, last = "".join(choice["text"] for choice in choices), choices[-1]
    else:
        last = http.post(PLAIN, json=body_of(PLAIN, **fields, stop=stop)).json()["choices"][0]
        found = last["text"]
    assert found == text[: text.index(stop)]
    assert (last["finish_reason"], last["stop_reason"]) == ("stop", stop)


@pytest.mark.parametrize(
    ("path", "fields", "field"),
    [
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {"messages": [{"role": "user"}]}, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": "x" * 600}]}, "messages"),
        (CHAT, {"tools": [{"type": "function"}]}, "tools"),
        (CHAT, {"max_completion_tokens": 0}, "max_completion_tokens"),
        (CHAT, {"max_completion_tokens": -3}, "max_completion_tokens"),
        (CHAT, {"max_tokens": 0}, "max_tokens"),
        (CHAT, {"top_logprobs": 3}, "top_logprobs"),
        (CHAT, {"logprobs": True, "top_logprobs": 99}, "top_logprobs"),
        (PLAIN, {"echo": True}, "echo"),
        (PLAIN, {"top_p": 0}, "top_p"),
        (PLAIN, {"top_k": -7}, "top_k"),
        (PLAIN, {"logprobs": 99}, "logprobs"),
        (PLAIN, {"min_tokens": 99}, "min_tokens"),
        (PLAIN, {"stop": ["x", ""]}, "stop"),
        (PLAIN, {"prompt": ["fine", ""]}, "prompt"),
        (PLAIN, {"prompt": [3, -5]}, "prompt"),
        (PLAIN, {"stop_token_ids": [99999]}, "stop_token_ids"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_contradictory_or_impossible_fields_are_refused_by_name(
    http: httpx.Client, served: ServedApp, path: str, fields: dict[str, Any], field: str
):
    response = http.post(path, json=body_of(path, **fields))
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == field
    assert served.idle()


def test_values_that_json_has_no_word_for_are_refused(http: httpx.Client):
    for value in ("NaN", "Infinity", "1e999"):
        text = f'{{"prompt": "x", "temperature": {value}}}'
        response = http.post(PLAIN, content=text, headers={"content-type": "application/json"})
        assert response.status_code == 400, value
        assert response.json()["error"]["param"] == "temperature"


def test_unknown_paths_and_methods_are_answered_in_the_apis_form(http: httpx.Client):
    for response, status in ((http.get("/v1/embeddings"), 404), (http.get(PLAIN), 405)):
        assert response.status_code == status
        assert response.json()["error"]["message"]


# -- engines that fail -----------------------------------------------------------------------------------------


def test_failing_step_is_answered_and_the_next_request_works(served: ServedApp, http: httpx.Client):
    def broken() -> None:
        raise RuntimeError("a broken kernel")

    served.engine.step = broken
    try:
        whole = http.post(PLAIN, json=body_of(PLAIN))
        pieces = stream(http, PLAIN)
    finally:
        del served.engine.step
    assert whole.status_code == 500
    assert "a broken kernel" in whole.json()["error"]["message"]
    assert "a broken kernel" in pieces[-1]["error"]["message"]
    assert http.post(PLAIN, json=body_of(PLAIN)).status_code == 200
    assert served.idle()


def test_engine_that_gave_up_says_so_and_can_be_replaced(
    start_app: Callable[..., ServedApp], tiny_config: EngineConfig
):
    served = start_app(tiny_config)
    served.wait_ready()

    def broken() -> None:
        raise RuntimeError("a broken device")

    served.engine.step = broken
    for _ in range(3):
        with pytest.raises(WorkerError, match="a broken device"):
            served.client.complete("x")
    wait_until(lambda: served.client.health()["status"] == "dead")
    with pytest.raises(WorkerError) as refused:
        served.client.complete("x")
    assert refused.value.status_code == 503
    assert served.client.status()["engine"] is None
    served.client.load(tiny_config.to_dict())
    served.wait_ready()
    assert served.client.complete("x", max_tokens=2)["choices"]


def test_stream_of_a_model_that_is_replaced_ends_with_an_error(
    start_app: Callable[..., ServedApp], tiny_config: EngineConfig
):
    served = start_app(tiny_config)
    served.wait_ready()
    with slowed(served, 0.02):
        received = served.client.stream_chat(HELLO, **LONG)
        next(received)
        threading.Timer(0.2, lambda: served.client.load(tiny_config.to_dict())).start()
        with pytest.raises(WorkerError, match="shut down"):
            list(received)
        wait_until(lambda: served.client.health()["status"] == "ready")


def test_failed_load_leaves_the_configuration_readable_and_another_model_loadable(
    start_app: Callable[..., ServedApp], tiny_config: EngineConfig
):
    served = start_app(tiny_config.with_changes({"model": "/no/such/folder"}))
    wait_until(lambda: served.client.health()["status"] == "failed")
    document = served.client.config()
    assert document["config"] is None
    assert {knob["name"] for knob in document["knobs"]} == tiny_config.to_dict().keys()
    served.client.load(tiny_config.to_dict())
    served.wait_ready()


def test_load_that_does_not_fit_keeps_the_former_model(start_app: Callable[..., ServedApp], tiny_config: EngineConfig):
    served = start_app(tiny_config)
    served.wait_ready()
    host, phases, left = served.app.state.host, set(), False
    served.client.load({**tiny_config.to_dict(), "memory_limit_gib": 0.001})
    end = time.monotonic() + 30
    while not (left and (state := host.state()).phase == "ready"):  # without a pause: no state in between is missed
        assert time.monotonic() < end, phases
        phases.add(host.state().phase)
        left = left or "loading" in phases
    assert phases <= {"loading", "ready"}, "a model that is replaced has not died"
    assert state.error is not None, "ready again, and not a word of why"
    assert served.client.health()["error"]["field"] == "memory_limit_gib"
    assert served.client.config()["config"]["memory_limit_gib"] == 0.25
    assert served.client.complete("x", max_tokens=2)["choices"]


# -- the admin API and metrics -------------------------------------------------------------------------------


def test_no_admin_route_is_open(served: ServedApp, http: httpx.Client):
    schema = served.app.openapi()
    routes = [(method, path) for path, methods in schema["paths"].items() for method in methods]
    guarded = [(method, path) for method, path in routes if path.startswith("/admin")]
    assert len(guarded) >= 9
    for method, path in guarded:
        place = path.replace("{job_id}", "x")
        assert http.request(method, place).status_code == 401, place
        for wrong, status in (("Bearer wrong", 403), ("Bearer tökën", 403), ("Bearer", 401), ("Basic eDp5", 401)):
            response = http.request(method, place, headers={"Authorization": wrong.encode()})
            assert response.status_code == status, (place, wrong)


def test_client_without_the_token_is_told_the_remedy(served: ServedApp):
    with pytest.raises(WorkerError, match="token") as refused:
        EngineClient(served.url).status()
    assert refused.value.status_code == 401


def test_two_workers_in_one_process_keep_their_own_counters(
    start_app: Callable[..., ServedApp], tiny_config: EngineConfig
):
    first, second = start_app(tiny_config), start_app(tiny_config)
    first.wait_ready()
    second.wait_ready()
    first.client.complete("x", max_tokens=7, temperature=0, ignore_eos=True)
    assert (generated(first), generated(second)) == (7.0, 0.0)


def generated(served: ServedApp) -> float:
    text = httpx.get(served.url + "/metrics", trust_env=False).text
    samples = {s.name: s.value for family in text_string_to_metric_families(text) for s in family.samples}
    return samples["vllm:generation_tokens_total"]


def test_metrics_of_a_finished_request_agree_with_its_answer(served: ServedApp, http: httpx.Client):
    def read() -> dict[str, float]:
        families = text_string_to_metric_families(http.get("/metrics").text)
        labelled = (s for family in families for s in family.samples if "le" not in s.labels)
        return {s.name + s.labels.get("finished_reason", ""): s.value for s in labelled}

    before = read()
    http.post(PLAIN, json=body_of(PLAIN, **{**LONG, "max_tokens": 9}))
    wait_until(lambda: read()["vllm:generation_tokens_total"] > before["vllm:generation_tokens_total"])
    time.sleep(0.3)  # the status that a scrape reads may be a quarter of a second old
    after = read()
    grown = {name: after[name] - before.get(name, 0.0) for name in after}
    assert grown["vllm:generation_tokens_total"] == 9
    assert grown["vllm:prompt_tokens_total"] == 5
    assert grown["vllm:request_success_totallength"] == 1
    assert grown["vllm:time_to_first_token_seconds_count"] == 1
    assert grown["vllm:inter_token_latency_seconds_count"] == 8
    assert 0 < grown["vllm:time_to_first_token_seconds_sum"] <= grown["vllm:e2e_request_latency_seconds_sum"]
