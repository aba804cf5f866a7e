"""Bad and odd requests to every route of the worker: more than 1,200 kinds, the same ones for the same seed."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from engine.config import Tier, knobs
from tests.attack.target import TOKEN
from tests.attack.wire import request

Expect = Literal["answer", "error", "end"]
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


@dataclasses.dataclass(frozen=True)
class Case:
    """One thing that is sent.

    Attributes:
        kind: family and what is odd about it; unique.
        parts: (pause in seconds before it, bytes).
        expect: "answer": served or refused in JSON. "error": must be refused in JSON. "end": not HTTP, or not all of
            it: a plain refusal or a clean close will do.
        answers: how many must come.
        timeout_s: without an answer or a close after so long it counts as lost.
    """

    kind: str
    parts: tuple[tuple[float, bytes], ...]
    expect: Expect = "answer"
    half_close: bool = False
    method: str = "POST"
    answers: int = 1
    timeout_s: float = 60.0


# JSON as text, since much of it is none that Python would write.
VALUES: dict[str, str] = {
    **{text: text for text in ("null", "true", "false", "0", "1", "-1", "2", "0.5", "-0.5", "-0.0", "1e-400")},
    **{
        text: text
        for text in ("1e308", "-1e308", "1e400", "NaN", "Infinity", "-Infinity", "{}", "[]", "[[]]", "[null]")
    },
    **{str(value): str(value) for value in (2**31, 2**32, 2**63 - 1, 2**63, -(2**63) - 1, 10**30)},
    "an integer of 5,000 digits": "9" * 5000,
    "an empty text": '""',
    "a text": '"x"',
    "a number as text": '"1"',
    "a lone surrogate": '"\\ud800"',
    "a reversed pair of surrogates": '"\\udc00\\ud800"',
    "NUL": '"a\\u0000b"',
    "5,000 characters": f'"{"x" * 5000}"',
    "controls": '"\\u0001\\u001b[31m\\u202e"',
    "a formula": "\"=HYPERLINK('http://evil.example')\"",
    "Markdown": '"![x](http://evil.example/p.png)<script>alert(1)</script>"',
    "nested 500 deep": "[" * 500 + "]" * 500,
    "objects nested 500 deep": '{"a":' * 500 + "1" + "}" * 500,
    "[0.5]": "[0.5]",
    "[-1]": "[-1]",
    "[2**63]": f"[{2**63}]",
    "a list with a surrogate": '["\\udfff"]',
    "a list with an empty text": '[""]',
    "a list of lists of ids": "[[1],[2,3]]",
    "a mixed list": '[1,"a",null,{}]',
    '{"a":null}': '{"a":null}',
    "the same key twice": '{"a":1,"a":2}',
}
COMPLETION_FIELDS = (
    *("model", "prompt", "max_tokens", "temperature", "top_p", "n", "stream", "stream_options", "stop", "seed"),
    *("priority", "top_k", "min_p", "repetition_penalty", "min_tokens", "ignore_eos", "stop_token_ids"),
    *("return_token_ids", "logprobs", "user", "best_of", "echo", "suffix", "frequency_penalty", "presence_penalty"),
    *("logit_bias", "tools", "response_format", "no_such_field"),
)
CHAT_FIELDS = ("messages", "logprobs", "top_logprobs", "max_completion_tokens", "tool_choice", "stream_options", "n")
MESSAGE_FIELDS = ("role", "content", "name", "tool_calls")
RUN_FIELDS = ("workload", "seed", "label", "changes", "slo", "comparison")
WORKLOAD_FIELDS = ("name", "num_requests", "prompt_tokens", "output_tokens", "arrival", "sampling", "prompt_source")
SLO_FIELDS = ("ttft_ms", "tpot_ms", "e2e_ms")
ROUTES = (
    *("/health", "/metrics", "/v1/models", COMPLETIONS, CHAT, "/admin/status", "/admin/config", "/admin/series"),
    *("/admin/telemetry", "/admin/workloads", "/admin/runs", "/admin/runs/none", "/admin/load"),
    *("/admin/reset_prefix_cache", "/", "/none"),
)
ADMIN_ROUTES = tuple(route for route in (*ROUTES, "/admin/shutdown") if route.startswith("/admin"))
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "TRACE", "BREW", "get")


def cases(seed: int, port: int, nowhere: Path) -> list[Case]:
    """All of them, in an order drawn by the seed.

    Args:
        port: of the worker, for the ``Host`` header.
        nowhere: a path where there is no model.
    """
    draw = random.Random(f"http/{seed}")
    found = [*_fields(port, nowhere), *_combinations(draw, port), *_routes(port), *_tokens(port), *_hosts(port)]
    found += [*_bodies(port), *_lengths(port), *_heads(port), *_protocol(draw, port), *_large(draw, port)]
    draw.shuffle(found)
    return found


def sample(found: Sequence[Case], count: int) -> list[Case]:
    """``count`` cases with some of every family."""
    families: dict[str, list[Case]] = {}
    for case in found:
        families.setdefault(case.kind.partition(":")[0], []).append(case)
    share = count / len(found)
    return [case for family in families.values() for case in family[: max(1, round(share * len(family)))]]


def json_case(kind: str, path: str, text: str, port: int, *, method: str = "POST", **fields) -> Case:
    """A document, as the text it is sent as; to admin routes with the token."""
    headers = [("Authorization", f"Bearer {TOKEN}")] if path.startswith("/admin") else []
    body = text.encode("utf-8", "surrogatepass")
    return Case(kind, ((0.0, request(method, path, body, headers, port=port)),), method=method, **fields)


def _object(**fields: str) -> str:
    return "{" + ",".join(f"{json.dumps(name)}:{value}" for name, value in fields.items()) + "}"


def _fields(port: int, nowhere: Path) -> Iterator[Case]:
    message = _object(role='"user"', content='"hi"')
    workload = {"name": '"attack"', "num_requests": "1", "prompt_tokens": "4", "output_tokens": "2"}
    for what, value in VALUES.items():
        for field in COMPLETION_FIELDS:
            body = _object(**({"prompt": '"hi"', "max_tokens": "2"} | {field: value}))
            yield json_case(f"completions: {field} = {what}", COMPLETIONS, body, port)
        for field in CHAT_FIELDS:
            body = _object(**({"messages": f"[{message}]", "max_tokens": "2"} | {field: value}))
            yield json_case(f"chat: {field} = {what}", CHAT, body, port)
        for field in MESSAGE_FIELDS:
            odd = _object(**({"role": '"user"', "content": '"hi"'} | {field: value}))
            yield json_case(
                f"chat: messages.{field} = {what}", CHAT, _object(messages=f"[{odd}]", max_tokens="2"), port
            )
        for field in RUN_FIELDS:
            body = _object(**({"workload": _object(**workload)} | {field: value}))
            yield json_case(f"runs: {field} = {what}", "/admin/runs", body, port)
        for field in WORKLOAD_FIELDS:
            body = _object(workload=_object(**(workload | {field: value})))
            yield json_case(f"runs: workload.{field} = {what}", "/admin/runs", body, port)
        for field in SLO_FIELDS:
            body = _object(workload=_object(**workload), slo=_object(**{field: value}))
            yield json_case(f"runs: slo.{field} = {what}", "/admin/runs", body, port)
        for spec in knobs():
            yield json_case(
                f"config: {spec.name} = {what}", "/admin/config", _object(**{spec.name: value}), port, method="PATCH"
            )
            if spec.tier is Tier.RELOAD and spec.name != "model":
                body = _object(model=json.dumps(str(nowhere)), **{spec.name: value})
                yield json_case(f"load: {spec.name} = {what}", "/admin/load", body, port)
        for path in (COMPLETIONS, CHAT, "/admin/runs", "/admin/config"):
            method = "PATCH" if path.endswith("config") else "POST"
            yield json_case(f"body: {path} {what}", path, value, port, method=method)


def _combinations(draw: random.Random, port: int) -> Iterator[Case]:
    names = list(VALUES)
    for number in range(200):
        chosen = draw.sample(COMPLETION_FIELDS, draw.randrange(2, 5))
        values = {field: draw.choice(names) for field in chosen}
        body = _object(
            **({"prompt": '"hi"', "max_tokens": "2"} | {field: VALUES[what] for field, what in values.items()})
        )
        yield json_case(f"combination: {number} {values}", COMPLETIONS, body, port)


def _routes(port: int) -> Iterator[Case]:
    for route in ROUTES:
        for method in METHODS:
            if (route, method) == ("/admin/load", "POST"):
                continue  # without a body that names a model it would load the default one
            head = [("Authorization", f"Bearer {TOKEN}")]
            yield Case(
                f"route: {method} {route}", ((0.0, request(method, route, b"", head, port=port)),), method=method
            )
    for path in (
        *(
            "//",
            "/v1",
            "/v1/",
            "/v1//models",
            "/v1/models/",
            "/V1/MODELS",
            "/v1/../admin/status",
            "/v1/%2e%2e/admin/status",
        ),
        *(
            "/admin",
            "/admin/",
            "/admin/../health",
            "/admin/%00",
            "/%",
            "/%zz",
            "/%ff",
            "/health?x=1",
            "/health#x",
            "/?",
        ),
        *(
            "/health/../../etc/passwd",
            "/..%2f..%2fetc/passwd",
            "/v1/models%0d%0aX:%20y",
            "/;/",
            "/\\",
            "/" + "a" * 8000,
        ),
        *("/" + "../" * 500, "/v1/models?" + "a=1&" * 2000, "/admin/runs/" + "x" * 3000, "/admin/runs/%f0%9f%92%a9"),
        *("/admin/series?steps_since=x", f"/admin/series?steps_since={10**30}", "/admin/series?steps_since=-1e9"),
        *("/admin/series?events_since=NaN", f"/admin/telemetry?since={2**63}", "/admin/telemetry?since=", "/metrics/x"),
        *("http://evil.example/health", "*", "/admin/runs/..", "/v1/models?\x7f", "/docs", "/openapi.json", "/redoc"),
    ):
        head = [("Authorization", f"Bearer {TOKEN}")]
        yield Case(f"path: {path[:60]}", ((0.0, request("GET", path, headers=head, port=port)),), "end", method="GET")


def _tokens(port: int) -> Iterator[Case]:
    odd = ("", "Bearer", "Bearer ", "Bearer x", f"Basic {TOKEN}", TOKEN, f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}")
    odd += (f"Bearer  {TOKEN}é", "Bearer \xff\xfe", f"Bearer {'x' * 5000}", "Bearer null", f"Bearer {TOKEN} {TOKEN}")
    for route in ADMIN_ROUTES:
        for number, value in enumerate(odd):
            for method in ("GET", "POST"):
                head = [("Authorization", value)] if value else []
                data = request(method, route, b"{}" if method == "POST" else None, head, port=port)
                yield Case(f"token: {method} {route} token {number}", ((0.0, data),), "error", method=method)


def _hosts(port: int) -> Iterator[Case]:
    evil = (
        "evil.example",
        f"evil.example:{port}",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "[::1].evil.example",
    )
    evil += (f"evil.example#127.0.0.1:{port}", f"127.0.0.1:{port}@evil.example", "evil.example:80:80", "EVIL.example")
    evil += ("10.0.0.1", "169.254.169.254", "0.0.0.0.evil", "xn--localhst-9za", "a" * 300 + ".example")
    for host in evil:
        for path in ("/health", "/v1/models", "/admin/status", "/metrics"):
            head = [("Host", host), ("Authorization", f"Bearer {TOKEN}")]
            data = request("GET", path, headers=head, port=port)
            yield Case(f"host: {host[:40]} {path}", ((0.0, data),), "error", method="GET")


def _bodies(port: int) -> Iterator[Case]:
    good = b'{"prompt":"hi","max_tokens":2}'
    odd: dict[str, bytes] = {
        "empty": b"",
        "not JSON": b"hello",
        "half a document": good[:-7],
        "two documents": good + good,
        "UTF-8 with a mark": b"\xef\xbb\xbf" + good,
        "UTF-16": good.decode().encode("utf-16"),
        "Latin-1": '{"prompt":"é","max_tokens":2}'.encode("latin-1"),
        "bytes that are no UTF-8": b'{"prompt":"\xff\xfe\xf0","max_tokens":2}',
        "an encoded surrogate": b'{"prompt":"\xed\xa0\x80","max_tokens":2}',
        "overlong UTF-8": b'{"prompt":"\xc0\xaf","max_tokens":2}',
        "NUL bytes": b"\0" * 100,
        "a trailing comma": b'{"prompt":"hi",}',
        "single quotes": b"{'prompt':'hi'}",
        "comments": b'{"prompt":"hi" /* x */}',
        "a form": b"prompt=hi&max_tokens=2",
        "XML": b"<prompt>hi</prompt>",
        "a pickle": b"\x80\x04\x95\x00",
        "the same field twice": b'{"prompt":"hi","max_tokens":2,"max_tokens":-1}',
        "100,000 brackets": b"[" * 100_000,
        "100,000 nested objects": b'{"prompt":' * 100_000,
        "a million digits": b'{"prompt":"hi","seed":' + b"1" * 1_000_000 + b"}",
        "1e999999": b'{"prompt":"hi","temperature":1e999999}',
        "10,000 unknown fields": b'{"prompt":"hi",' + b",".join(b'"f%d":1' % i for i in range(10_000)) + b"}",
        "a field name of 1 MB": b'{"prompt":"hi","' + b"n" * 1_000_000 + b'":1}',
        "a field name that is a surrogate": b'{"prompt":"hi","\\ud800":1}',
    }
    for what, body in odd.items():
        for path in (COMPLETIONS, CHAT, "/admin/runs", "/admin/config"):
            head = [("Authorization", f"Bearer {TOKEN}")]
            method = "PATCH" if path.endswith("config") else "POST"
            yield Case(f"bytes: {path} {what}", ((0.0, request(method, path, body, head, port=port)),), method=method)
    for kind in (
        "text/plain",
        "",
        "application/xml",
        "multipart/form-data",
        "application/json; charset=utf-16",
        "\xff",
    ):
        data = request("POST", COMPLETIONS, good, [("Content-Type", kind)], port=port)
        yield Case(f"content type: {kind!r}", ((0.0, data),))


def _lengths(port: int) -> Iterator[Case]:
    good = b'{"prompt":"hi","max_tokens":2}'
    for text in (
        "-1",
        "abc",
        "1e3",
        "0x10",
        "",
        "+30",
        " 30 ",
        "30, 30",
        "30, 31",
        str(2**63),
        str(10**30),
        "9" * 5000,
        "3.5",
    ):
        data = request("POST", COMPLETIONS, good, [("Content-Length", text)], port=port)
        yield Case(f"length: {text[:30]!r}", ((0.0, data),), "end", half_close=True)
    for count in (0, 1, 29):
        data = request("POST", COMPLETIONS, good, [("Content-Length", str(count))], port=port)
        yield Case(f"length: {count} of 30", ((0.0, data),), "end", half_close=True)
    for count in (31, 1000, 5_000_000):
        data = request("POST", COMPLETIONS, good, [("Content-Length", str(count))], port=port)
        yield Case(f"length: {count} promised, 30 sent", ((0.0, data),), "end", half_close=True)
    chunked = [("Transfer-Encoding", "chunked"), ("Content-Length", "30")]
    head = request("POST", COMPLETIONS, None, chunked[:1], port=port)
    for what, tail in {
        "well": b"1e\r\n" + good + b"\r\n0\r\n\r\n",
        "no such size": b"zz\r\n" + good + b"\r\n0\r\n\r\n",
        "a negative size": b"-1\r\n" + good + b"\r\n0\r\n\r\n",
        "a size of 2**64": b"10000000000000000\r\n" + good,
        "a size of 10,000 digits": b"1" * 10_000 + b"\r\n",
        "a chunk too short": b"ff\r\n" + good + b"\r\n0\r\n\r\n",
        "no end": b"1e\r\n" + good + b"\r\n",
        "a trailer": b"1e\r\n" + good + b"\r\n0\r\nX: y\r\n\r\n",
        "an extension of 9 kB": b"1e;" + b"x" * 9000 + b"\r\n" + good + b"\r\n0\r\n\r\n",
        "one byte a chunk": b"".join(b"1\r\n" + bytes([byte]) + b"\r\n" for byte in good) + b"0\r\n\r\n",
        "garbage": b"\r\n\r\n\0\0\0\xff",
    }.items():
        yield Case(f"chunked: {what}", ((0.0, head + tail),), "end", half_close=True)
    both = request("POST", COMPLETIONS, None, chunked, port=port) + b"1e\r\n" + good + b"\r\n0\r\n\r\n"
    yield Case("chunked: and a length", ((0.0, both),), "end", half_close=True)
    for coding in ("gzip", "chunked, chunked", "identity", "xchunked", "\x0bchunked"):
        data = request("POST", COMPLETIONS, good, [("Transfer-Encoding", coding)], port=port)
        yield Case(f"transfer encoding: {coding!r}", ((0.0, data),), "end", half_close=True)


def _heads(port: int) -> Iterator[Case]:
    for what, headers in {
        "a value of 1 MB": [("X-Big", "x" * 1_000_000)],
        "a value of 70 kB": [("X-Big", "x" * 70_000)],
        "a name of 70 kB": [("X" * 70_000, "y")],
        "5,000 headers": [(f"X-{i}", "y") for i in range(5000)],
        "the same header 3,000 times": [("Cookie", "a=b")] * 3000,
        "a name with a space": [("X Y", "z")],
        "an empty name": [("", "z")],
        "a value with NUL": [("X", "a\0b")],
        "a value with a bare CR": [("X", "a\rb")],
        "a folded value": [("X", "a\r\n b")],
        "bytes above 127": [("X", "\xff\xfe")],
        "Expect: 100-continue": [("Expect", "100-continue")],
        "Expect: nonsense": [("Expect", "the Spanish Inquisition")],
        "Upgrade: websocket": [("Upgrade", "websocket"), ("Connection", "Upgrade")],
        "Upgrade: h2c": [("Upgrade", "h2c"), ("Connection", "Upgrade"), ("HTTP2-Settings", "AAMAAABkAAQAoAAAAAIAAAAA")],
        "X-Forwarded-For": [("X-Forwarded-For", "1.2.3.4"), ("X-Forwarded-Host", "evil.example")],
        "Connection: nonsense": [("Connection", "nonsense, close")],
        "Accept nothing": [("Accept", "application/nothing;q=0")],
        "Range": [("Range", "bytes=0-1")],
        "two hosts": [("Host", f"127.0.0.1:{port}"), ("Host", "evil.example")],
        "Origin": [("Origin", "http://evil.example")],
    }.items():
        for path in ("/health", COMPLETIONS):
            body = b'{"prompt":"hi","max_tokens":2}' if path == COMPLETIONS else None
            method = "POST" if body else "GET"
            data = request(method, path, body, headers, port=port)
            yield Case(f"head: {path} {what}", ((0.0, data),), "end", method=method, half_close=True)
    for what, names in {
        "none": [],
        "empty": [("Host", "")],
        "a space": [("Host", " ")],
        "slashes": [("Host", "///")],
    }.items():
        made = request("GET", "/health", headers=names, port=port)
        data = made if names else made.replace(f"Host: 127.0.0.1:{port}\r\n".encode(), b"")
        yield Case(f"host header: {what}", ((0.0, data),), "end", method="GET")


def _protocol(draw: random.Random, port: int) -> Iterator[Case]:
    good = request("POST", COMPLETIONS, b'{"prompt":"hi","max_tokens":2}', port=port)
    stay = [("Connection", "keep-alive")]
    kept = request("POST", COMPLETIONS, b'{"prompt":"hi","max_tokens":2}', stay, port=port)
    for number in range(40):
        noise = bytes(draw.randrange(256) for _ in range(draw.choice((1, 7, 100, 5000))))
        yield Case(f"noise: {number}", ((0.0, noise),), "end", half_close=True)
    for number in range(40):  # a good request with some bytes of its head changed
        changed = bytearray(good)
        for _ in range(draw.randrange(1, 6)):
            changed[draw.randrange(good.index(b"\r\n\r\n"))] = draw.randrange(256)
        yield Case(f"damaged head: {number}", ((0.0, bytes(changed)),), "end", half_close=True, timeout_s=30.0)
    for number, cut in enumerate(sorted(draw.sample(range(len(good)), 12))):
        yield Case(f"cut off: {number}, half closed", ((0.0, good[:cut]),), "end", half_close=True)
    for what, line in {
        "HTTP/0.9": b"GET /health\r\n\r\n",
        "HTTP/1.0": b"GET /health HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n",
        "HTTP/2.0": b"GET /health HTTP/2.0\r\nHost: 127.0.0.1\r\n\r\n",
        "HTTP/9.9": b"GET /health HTTP/9.9\r\nHost: 127.0.0.1\r\n\r\n",
        "the preface of HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        "a TLS greeting": bytes.fromhex("16030100a50100") + bytes(160),
        "bare line feeds": b"GET /health HTTP/1.1\nHost: 127.0.0.1\nConnection: close\n\n",
        "no version": b"GET /health FOO\r\n\r\n",
        "spaces": b"GET   /health   HTTP/1.1\r\n\r\n",
        "empty lines": b"\r\n" * 50 + good,
        "SSH": b"SSH-2.0-OpenSSH_9.6\r\n",
        "a proxy's greeting": b"CONNECT evil.example:443 HTTP/1.1\r\nHost: evil.example:443\r\n\r\n",
        "nothing": b"",
    }.items():
        yield Case(f"protocol: {what}", ((0.0, line),), "end", half_close=True, method="GET")
    for count in (2, 5, 20):
        yield Case(f"pipelined: {count} requests", ((0.0, kept * (count - 1) + good),), answers=count)
    yield Case("pipelined: a good one, then noise", ((0.0, kept + b"\0\xff\r\n\r\n"),), "end", half_close=True)
    yield Case(
        "pipelined: smuggled behind a body",
        ((0.0, kept + b"GET /admin/status HTTP/1.1\r\n\r\n"),),
        "end",
        half_close=True,
    )
    for number in range(6):  # a byte now and then: must be given up, and nobody else may wait meanwhile
        drip = tuple((0.4, bytes([byte])) for byte in good[:40])
        yield Case(f"slow head: {number}", drip, "end", timeout_s=25.0)
    for number in range(4):
        head, _, body = good.partition(b"\r\n\r\n")
        drip = ((0.0, head + b"\r\n\r\n"), *((0.3, bytes([byte])) for byte in body))
        yield Case(f"slow body: {number}", drip, "answer", timeout_s=60.0)


def _large(draw: random.Random, port: int) -> Iterator[Case]:
    letters = "".join(draw.choice("abcdefgh \n") for _ in range(2_000_000))
    for number, text in enumerate(
        (letters, "a" * 2_000_000, " " * 2_000_000, "é" * 1_000_000, "\n" * 2_000_000, "💩" * 500_000)
    ):
        body = json.dumps({"prompt": text, "max_tokens": 2}, ensure_ascii=False)
        yield json_case(f"large: prompt of 2 MB, {number}", COMPLETIONS, body, port, expect="error")
        chat = json.dumps({"messages": [{"role": "user", "content": text}], "max_tokens": 2}, ensure_ascii=False)
        yield json_case(f"large: message of 2 MB, {number}", CHAT, chat, port, expect="error")
    for what, document in {
        "300 prompts × n 128": {"prompt": ["a"] * 300, "n": 128, "max_tokens": 1},
        "10,000 prompts": {"prompt": ["a"] * 10_000, "max_tokens": 1},
        "100,000 empty prompts": {"prompt": [""] * 100_000, "max_tokens": 1},
        "300,000 token ids": {"prompt": [1] * 300_000, "max_tokens": 1},
        "50,000 lists of ids": {"prompt": [[1]] * 50_000, "max_tokens": 1},
        "a prompt as long as the context": {"prompt": [1] * 512, "max_tokens": 1},
        "a stop string of 1 MB": {"prompt": "a", "stop": "x" * 1_000_000, "max_tokens": 2},
    }.items():
        yield json_case(f"large: {what}", COMPLETIONS, json.dumps(document), port, expect="error")
    for what, document in {
        "20,000 stop strings": {"prompt": "a", "stop": ["x"] * 20_000, "max_tokens": 2},
        "100,000 stop token ids": {"prompt": "a", "stop_token_ids": [1] * 100_000, "max_tokens": 2},
        "n 128": {"prompt": "a", "n": 128, "max_tokens": 2},
        "logprobs 100,000": {"prompt": "a", "logprobs": 100_000, "max_tokens": 2},
    }.items():
        yield json_case(f"large: {what}", COMPLETIONS, json.dumps(document), port)
    many = [{"role": "user", "content": "a"}] * 20_000
    yield json_case(
        "large: 20,000 messages", CHAT, json.dumps({"messages": many, "max_tokens": 2}), port, expect="error"
    )
    yield json_case("large: a label of 1 MB", "/admin/runs", json.dumps({"workload": "x", "label": "x" * 10**6}), port)
    yield json_case(
        "large: a body of 12 MB", COMPLETIONS, json.dumps({"prompt": "x" * 12_000_000}), port, expect="error"
    )
