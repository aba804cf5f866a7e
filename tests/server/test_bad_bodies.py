"""Whatever a body, path or header holds: a clear refusal in JSON or an answer, never a 500, and the engine goes on."""

from __future__ import annotations

import itertools
import json
import socket
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx
import pytest

from engine.measure import WORKLOADS
from engine.server.bodies import json_text, parse_object
from tests.server.conftest import TOKEN, ServedApp

PLAIN, CHAT = "/v1/completions", "/v1/chat/completions"
ADMIN = {"Authorization": f"Bearer {TOKEN}"}
JSON = {"content-type": "application/json"}

VALUES: list[str] = [
    *('"\\ud83d hi"', '"\\udc00"', '"\\u0000"', f'"{"x" * 5000}"', '""', '" "', '"../../etc/passwd"', '"%s%n"'),
    *("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1e-999", "1e-38", "1e308", "-0.0", "0.5"),
    *("9223372036854775807", "9223372036854775808", "-9223372036854775809", "9" * 400, "9" * 5000, "-1", "0"),
    *("null", "true", "[]", "{}", "[null]", "[[]]", "[[[1]]]", '[{"a": 1}]', '["\\ud83d"]', '{"a": NaN}'),
    *("[" * 150 + "]" * 150, "[" * 100_000, '{"a":' * 100_000, "[1e999]", '[""]', '["a", 1]'),
]
PLAIN_FIELDS = (
    *("prompt", "model", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "min_p", "n", "seed"),
    *("stop", "stop_token_ids", "logprobs", "min_tokens", "repetition_penalty", "priority", "stream", "stream_options"),
    *("ignore_eos", "return_token_ids", "user", "best_of", "logit_bias", "response_format", "nonsense", "\\ud83d"),
)
CHAT_FIELDS = ("messages", "top_logprobs", "max_tokens", "stop", "model", "tools")
MESSAGE_FIELDS = ("role", "content", "name", "tool_calls", "tool_call_id", "nonsense")
RUN_FIELDS = ("workload", "seed", "label", "changes", "slo", "comparison")
WHOLE_BODIES: list[bytes] = [
    *(b"", b" ", b"null", b"1", b'"x"', b"[]", b"{", b"{}", b"}{", b'{"prompt": "x"}{', b"\x00", b"\xff\xfe{", b"NaN"),
    *(b'{"prompt": "\xff"}', b'{"prompt": "\xed\xa0\xbd"}', '{"prompt": "x"}'.encode("utf-16"), b"\xef\xbb\xbf{}"),
    *(b'{"prompt": "x", "prompt": 7}', b"[" * 100_000, b'{"a":' * 100_000, b"prompt=x", b"<xml/>", b"1" * 100_000),
]


@pytest.fixture(scope="module")
def http(served: ServedApp) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served.url, timeout=30, trust_env=False) as client:
        yield client


def check(response: httpx.Response, what: object) -> None:
    """Not a 500, and JSON that any reader takes; an error says what is wrong."""
    assert response.status_code < 500, (what, response.text[:300])
    if response.headers["content-type"].startswith("application/json"):
        document = json.loads(response.content, parse_constant=pytest.fail)
        if response.is_error:
            assert document["error"]["message"], what


def bodies() -> Iterator[tuple[str, str]]:
    """(path, body) of every field with every value."""
    for field, value in itertools.product(PLAIN_FIELDS, VALUES):
        first = "" if field == "prompt" else '"prompt": "hi", '
        rest = "" if field in ("max_tokens", "max_completion_tokens") else ', "max_tokens": 1'
        yield PLAIN, f'{{{first}"{field}": {value}{rest}}}'
    for field, value in itertools.product(CHAT_FIELDS, VALUES):
        first = "" if field == "messages" else '"messages": [{"role": "user", "content": "hi"}], '
        rest = "" if field == "max_tokens" else ', "max_tokens": 1'
        yield CHAT, f'{{{first}"{field}": {value}{rest}}}'
    for field, value in itertools.product(MESSAGE_FIELDS, VALUES):
        others = {"role": '"user"', "content": '"hi"'}
        turn = {**others, field: value}
        text = ", ".join(f'"{name}": {item}' for name, item in turn.items())
        yield CHAT, f'{{"messages": [{{{text}}}], "max_tokens": 1}}'


def test_no_value_of_any_field_gives_a_500(served: ServedApp, http: httpx.Client):
    cases = list(bodies())
    assert len(cases) > 1200
    for path, body in cases:
        check(http.post(path, content=body, headers=JSON), (path, body[:200]))
    assert http.post(PLAIN, json={"prompt": "hi", "max_tokens": 2}).status_code == 200
    assert served.idle()


@pytest.mark.parametrize("path", [PLAIN, CHAT, "/admin/config", "/admin/load", "/admin/runs"])
def test_what_is_no_json_object_is_refused_with_the_reason(http: httpx.Client, path: str):
    method = "PATCH" if path == "/admin/config" else "POST"
    for body in WHOLE_BODIES:
        if body == b"{}" and path == "/admin/config":
            continue  # no change at all is fine
        if path == "/admin/load" and (body == b"{}" or body.startswith(b'{"prompt": "x", "prompt"')):
            continue  # the default model would be loaded
        if path == PLAIN and b"7}" in body:
            continue  # the last of two values counts
        response = http.request(method, path, content=body, headers={**ADMIN, **JSON})
        assert response.status_code == 400, (body[:60], response.text[:200])
        check(response, body[:60])


def test_body_of_another_type_is_refused(http: httpx.Client):
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "é"):
        response = http.post(PLAIN, content=b'{"prompt": "x"}', headers={"content-type": kind.encode()})
        assert response.status_code == 415
        assert "application/json" in response.json()["error"]["message"]
    fine = {"content-type": "application/vnd.api+json; charset=utf-8"}
    assert http.post(PLAIN, content=b'{"prompt": "x", "max_tokens": 1}', headers=fine).status_code == 200


def test_half_a_surrogate_pair_is_replaced_or_refused_everywhere(http: httpx.Client):
    for path, body in (
        (PLAIN, '{"prompt": "\\ud83d hi"}'),
        (PLAIN, '{"prompt": "hi", "stop": "\\ud83d"}'),
        (PLAIN, '{"prompt": "hi", "model": "\\ud83d"}'),
        (CHAT, '{"messages": [{"role": "user", "content": "\\ud83d hi"}]}'),
        (CHAT, '{"messages": [{"role": "user", "content": "hi", "name": "\\ud83d"}]}'),
    ):
        response = http.post(path, content=body, headers=JSON)
        assert response.status_code in (200, 400)
        check(response, body)


def test_run_with_values_that_cannot_be_measured_is_refused(http: httpx.Client, served: ServedApp):
    for value, field in itertools.product(("NaN", "Infinity", "1e999", "-1", '"x"', "[]", "9" * 400), ("ttft_ms", "x")):
        body = f'{{"workload": "{next(iter(WORKLOADS))}", "slo": {{"{field}": {value}}}}}'
        response = http.post("/admin/runs", content=body, headers={**ADMIN, **JSON})
        assert response.status_code == 400, (body, response.text)
        assert response.json()["error"]["field"].startswith("slo")
    for field, value in itertools.product(RUN_FIELDS, VALUES):
        first = "" if field == "workload" else '"workload": "no-such", '
        body = f'{{{first}"{field}": {value}}}'
        response = http.post("/admin/runs", content=body, headers={**ADMIN, **JSON})
        assert response.status_code == 400, (body[:200], response.text[:200])
        check(response, body[:200])
    label = {"workload": next(iter(WORKLOADS)), "label": "x" * 5000}
    assert http.post("/admin/runs", json=label, headers=ADMIN).json()["error"]["field"] == "label"
    assert served.app.state.jobs.running() is None


def test_knobs_of_any_value_are_refused_or_taken(http: httpx.Client, served: ServedApp):
    for field, value in itertools.product(("token_budget", "batching", "draft_length", "\\u0000", "x" * 5000), VALUES):
        body = f'{{"{field}": {value}}}'
        check(http.patch("/admin/config", content=body, headers={**ADMIN, **JSON}), body[:200])
    served.client.patch_config({"token_budget": served.client.config()["config"]["token_budget"]})
    assert served.idle()


def test_queries_paths_and_methods_of_any_kind_are_answered(http: httpx.Client):
    for number in ("9" * 30, "9" * 5000, "-" + "9" * 30, "1e9", "NaN", "", "x", "%00", "%ff"):
        for path in ("/admin/telemetry?since=", "/admin/series?steps_since=", "/admin/series?events_since="):
            check(http.get(path + number, headers=ADMIN), number)
    for force in ("x", "%00", "9" * 30):
        check(http.patch(f"/admin/config?force={force}", json={}, headers=ADMIN), force)
    for job in ("x" * 5000, "%00", "%ff", "%2e%2e", "a%2fb", "%F0%9F%98%8A", "..", "'; drop table", "%ed%a0%bd", "{}"):
        for method in ("GET", "DELETE"):
            response = http.request(method, f"/admin/runs/{job}", headers=ADMIN)
            assert response.status_code in (404, 405), job
            check(response, job)
    for path in ("/", "//", "/v1", "/v1//models", "/%00", "/%ff", "/v1/%2e%2e/admin", "/admin", "/x" * 2000):
        for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS", "TRACE", "HEAD", "BREW", "PROPFIND"):
            response = http.request(method, path)
            assert response.status_code < 500, (method, path)


def exchange(url: str, content: bytes) -> bytes:
    """What is answered to these bytes."""
    place = urlsplit(url)
    with socket.create_connection((place.hostname or "", place.port or 0), timeout=15) as connection:
        connection.sendall(content)
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
    return answer


@pytest.mark.parametrize(
    "content",
    [
        b"nonsense\r\n\r\n",
        b"GET / HTTP/9.9\r\nHost: localhost\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",
        b"GET http://[/ HTTP/1.1\r\nHost: [\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999999999999\r\n\r\n{}",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{\"a",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
    ids=lambda content: repr(content[:40]),
)  # fmt: skip
def test_what_is_no_http_is_refused_in_json(served: ServedApp, content: bytes):
    answer = exchange(served.url, content)
    if answer:
        head, _, body = answer.partition(b"\r\n\r\n")
        assert b" 4" in head[:14], head
        document, _ = json.JSONDecoder().raw_decode(body.decode())  # there may be more than one answer
        assert document["error"]["message"]
    assert httpx.get(served.url + "/health", trust_env=False).status_code == 200


def test_answers_are_json_whatever_they_hold():
    text = json_text({"a": float("nan"), "b": [float("inf"), 1.5], "c": ("\ud83d", "😊"), "d": {"e": -float("inf")}})
    assert json.loads(text) == {"a": None, "b": [None, 1.5], "c": ["�", "😊"], "d": {"e": None}}
    text.encode()


def test_numbers_in_strings_are_not_taken_for_numbers():
    assert parse_object(b'{"a": "NaN and 1e999", "b": 1e3}') == {"a": "NaN and 1e999", "b": 1000.0}
