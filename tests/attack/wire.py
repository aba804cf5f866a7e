"""HTTP as bytes: what is sent may be anything, and what comes back is read as far as it goes. Standard library only."""

from __future__ import annotations

import dataclasses
import http.client
import io
import json
import socket
import time
from collections.abc import Sequence
from typing import Any

READ_BYTES = 65_536


@dataclasses.dataclass(frozen=True)
class Answer:
    """What came back.

    Attributes:
        status: of the (first) answer; 0 if there was none.
        body: without headers and chunk lengths.
        count: complete answers that came.
        closed: the connection was ended by the other side, orderly or by a reset, rather than left hanging.
        seconds: until the last byte.
    """

    status: int
    headers: dict[str, str]
    body: bytes
    count: int
    closed: bool
    seconds: float

    @property
    def is_json_error(self) -> bool:
        """An error in the form that both APIs promise: an object with a message."""
        try:
            document = json.loads(self.body)
        except ValueError:
            return False
        if not isinstance(document, dict):
            return False
        inner = document.get("error", document.get("detail", document))
        return isinstance(inner, dict) and isinstance(inner.get("message"), str)


class _Recorded:
    """Bytes in the guise of a socket, for :class:`http.client.HTTPResponse`."""

    def __init__(self, stream: io.BytesIO) -> None:
        self.stream = stream

    def makefile(self, *_args: Any) -> io.BytesIO:
        return self.stream


class _Unclosed(io.BytesIO):
    """Stays open when one answer has been read: the next one follows in it."""

    def close(self) -> None:
        pass


def request(
    method: str, path: str, body: bytes | None = None, headers: Sequence[tuple[str, str]] = (), *, port: int = 0
) -> bytes:
    """A whole request, ``Connection: close``. Headers given replace those that would be made."""
    made = {"Host": f"127.0.0.1:{port}", "Connection": "close"}
    if body is not None:
        made |= {"Content-Type": "application/json", "Content-Length": str(len(body))}
    given = {name.lower() for name, _ in headers}
    lines = [f"{name}: {value}" for name, value in made.items() if name.lower() not in given]
    lines += [f"{name}: {value}" for name, value in headers]
    head = "\r\n".join([f"{method} {path} HTTP/1.1", *lines, "", ""])
    return head.encode("utf-8", "surrogateescape") + (body or b"")


def exchange(
    port: int,
    parts: Sequence[tuple[float, bytes]],
    *,
    timeout_s: float = 30.0,
    half_close: bool = False,
    answers: int = 1,
    method: str = "POST",
) -> Answer:
    """Send bytes part by part, each after a pause, and read until the other side has answered or closed.

    Args:
        parts: (seconds before it, bytes).
        half_close: end our direction after the last part.
        answers: so many are waited for.
        method: an answer to HEAD has no body.
    """
    began = time.monotonic()
    received, closed = bytearray(), False
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout_s)
        try:
            connection.connect(("127.0.0.1", port))
            try:
                for pause_s, part in parts:
                    time.sleep(pause_s)
                    connection.sendall(part)
                if half_close:
                    connection.shutdown(socket.SHUT_WR)
            except (BrokenPipeError, ConnectionResetError):
                pass  # it may have answered before it had heard everything
            while data := connection.recv(READ_BYTES):
                received += data
                if answers > 1 and len(_parse(bytes(received), method)) >= answers:
                    break
            else:
                closed = True
        except (ConnectionResetError, BrokenPipeError):
            closed = True
        except OSError:
            closed = False
    found = _parse(bytes(received), method)
    status, headers, body = found[0] if found else (0, {}, b"")
    return Answer(status, headers, body, len(found), closed, time.monotonic() - began)


def get(port: int, path: str, *, timeout_s: float = 10.0, headers: Sequence[tuple[str, str]] = ()) -> Answer:
    """A plain GET."""
    return exchange(port, [(0.0, request("GET", path, headers=headers, port=port))], timeout_s=timeout_s, method="GET")


def post(port: int, path: str, document: Any, *, timeout_s: float = 30.0, token: str = "") -> Answer:
    """A JSON document."""
    headers = [("Authorization", f"Bearer {token}")] if token else []
    body = json.dumps(document).encode()
    return exchange(port, [(0.0, request("POST", path, body, headers, port=port))], timeout_s=timeout_s)


def _parse(data: bytes, method: str) -> list[tuple[int, dict[str, str], bytes]]:
    """(status, headers, body) of every complete answer in the bytes."""
    stream, found = _Unclosed(data), []
    while stream.tell() < len(data):
        response = http.client.HTTPResponse(_Recorded(stream), method=method)  # type: ignore[arg-type]
        try:
            response.begin()
            body = response.read()
        except (http.client.HTTPException, ValueError, OSError):
            break
        found.append((response.status, {k.lower(): v for k, v in response.getheaders()}, body))
    return found
