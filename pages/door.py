"""Who may come in by HTTP and WebSocket, and what a page may load and be framed by.

A browser sends whatever name it resolved as ``Host``. Without a list of the names that are ours, a page on
``evil.example`` whose DNS answer turns to 127.0.0.1 speaks to the dashboard as if it were of the same origin (DNS
rebinding). The door stands before everything that Streamlit serves, its WebSocket and its uploads included.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any
from urllib.parse import SplitResult, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.errors import ConfigError

HOSTS_VARIABLE = "HEADROOM_ALLOWED_HOSTS"
LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "::1")
_WILDCARD_ADDRESSES = ("", "0.0.0.0", "::")

# Scripts: Vega compiles its expressions unless it is given an interpreter, and Streamlit writes one line in its page.
# Styles: emotion writes them into the page. Images: never from elsewhere, whatever a model, a label or an error says.
_CONTENT_POLICY = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "media-src 'self' data: blob:",
        "font-src 'self' data:",
        "connect-src 'self'",
        "worker-src 'self' blob:",
        "frame-src 'none'",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'self'",
        "frame-ancestors 'none'",
    )
)
PAGE_HEADERS = {
    "Content-Security-Policy": _CONTENT_POLICY,
    "X-Frame-Options": "DENY",  # for what does not know frame-ancestors
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
}


def allowed_hosts(address: str | None, extra: str | None) -> frozenset[str]:
    """The host names that requests may name.

    Args:
        address: what the server is bound to; a wildcard names nobody.
        extra: more names or addresses, separated by commas; ``*.example.com`` stands for every name below it,
            ``*`` for every name.

    Raises:
        ConfigError: if one of them is no host name, an address (URL) for instance.

    >>> sorted(allowed_hosts("192.168.1.5", "gpu.example.com:8443, *.Lab.example"))
    ['*.lab.example', '127.0.0.1', '192.168.1.5', '::1', 'gpu.example.com', 'localhost']
    """
    bound = [address] if address and address not in _WILDCARD_ADDRESSES else []
    named = [name.strip() for name in (extra or "").split(",") if name.strip()]
    return frozenset(map(_host_name, (*LOOPBACK_HOSTS, *bound, *named)))


def check_environment() -> None:
    """Raises ConfigError if ``HEADROOM_ALLOWED_HOSTS`` is wrong: at the start, not with the first request."""
    allowed_hosts(None, os.environ.get(HOSTS_VARIABLE))


def _host_name(text: str) -> str:
    """A name or address without its port, as it is compared."""
    bare = text.count(":") > 1 and not text.startswith("[")  # an IPv6 address needs brackets beside a port
    parts = _authority(f"[{text}]" if bare else text)
    if parts is None or not parts.hostname:
        remedy = "Give names such as gpu.example.com, separated by commas, without a scheme or a path."
        raise ConfigError(f"{text!r} is not the name of a host.", field=HOSTS_VARIABLE, remedy=remedy)
    return parts.hostname.rstrip(".")


def host_is_allowed(host: str, allowed: Iterable[str]) -> bool:
    """True if a ``Host`` header, with or without a port, names one of ``allowed``.

    >>> host_is_allowed("[::1]:8501", LOOPBACK_HOSTS), host_is_allowed("localhost.evil.example", LOOPBACK_HOSTS)
    (True, False)
    """
    parts = _authority(host)
    if parts is None or parts.hostname is None:
        return False
    name = parts.hostname.rstrip(".")
    return any(entry in ("*", name) or (entry.startswith("*.") and name.endswith(entry[1:])) for entry in allowed)


def origin_is_allowed(origin: str, host: str) -> bool:
    """True if an ``Origin`` is the one that the request was sent to: a proxy must hand the browser's ``Host`` on.

    >>> origin_is_allowed("https://gpu.example.com", "gpu.example.com")
    True
    >>> origin_is_allowed("http://localhost:3000", "localhost:8501")  # another program of this machine
    False
    """
    scheme, _, authority = origin.partition("://")
    return scheme in ("http", "https") and authority.lower() == host.lower()


def _authority(host: str) -> SplitResult | None:
    """``name:port`` taken apart; None if it is anything else."""
    try:
        parts = urlsplit(f"//{host}")
        _ = parts.port  # raises if it is no number
    except ValueError:
        return None
    return parts if parts.netloc == host and "@" not in host else None


class Door:
    """ASGI middleware: refuses other hosts and origins (421, 403), and adds the headers that guard the pages.

    Args:
        app: what stands behind it.
        address: what the server is bound to; Streamlit's ``server.address`` if not given.
        extra: as in :func:`allowed_hosts`; the variable ``HEADROOM_ALLOWED_HOSTS`` if not given.
    """

    def __init__(self, app: ASGIApp, address: str | None = None, extra: str | None = None) -> None:
        self._app = app
        extra = os.environ.get(HOSTS_VARIABLE, "") if extra is None else extra
        self._allowed = allowed_hosts(address or _bound_address(), extra)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let one request or handshake in, or answer why not."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(Headers(scope=scope))
        if refusal is None:
            await self._app(scope, receive, _with_headers(send))
        elif scope["type"] == "http":
            status, text = refusal
            await PlainTextResponse(text, status)(scope, receive, _with_headers(send))
        else:
            await receive()  # the handshake; closing before it is accepted answers 403
            await send({"type": "websocket.close", "code": 1008, "reason": ""})

    def _refusal(self, headers: Headers) -> tuple[int, str] | None:
        hosts, origins = headers.getlist("host"), headers.getlist("origin")
        if len(hosts) != 1 or not host_is_allowed(hosts[0], self._allowed):
            text = f"This dashboard is not known under the name of this request. Add it to {HOSTS_VARIABLE}.\n"
            return 421, text
        if any(not origin_is_allowed(origin, hosts[0]) for origin in origins):
            return 403, "This dashboard takes no requests from pages of another origin.\n"
        return None


def _with_headers(send: Send) -> Send:
    async def guarded(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in PAGE_HEADERS.items():
                headers[name] = value
        await send(message)

    return guarded


def _bound_address() -> str | None:
    from streamlit import config

    address: Any = config.get_option("server.address")
    return None if address is None else str(address)
