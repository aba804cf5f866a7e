"""HTTP connections with limits: how many, how long a request may take to arrive, how long an answer may stay unread."""

from __future__ import annotations

import asyncio
import functools
import json
import socket
import sys
import time
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from engine.server.answers import error_body
from engine.server.limits import ServerLimits

# What a client still sends of a body that nobody reads is thrown away this long, seconds: a connection that is closed
# at once would take the answer along.
_LINGER_S = 2.0


class BoundedProtocol(H11Protocol):
    """uvicorn's protocol, with deadlines and a limit of connections.

    Where the limit is reached, the connection that has been without a complete request for the longest time has to go:
    clients that open connections and say nothing keep nobody out.
    """

    def __init__(self, *arguments: Any, limits: ServerLimits, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._limits = limits
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._linger_timer: asyncio.TimerHandle | None = None
        self._quiet_since = time.monotonic()

    @property
    def in_request(self) -> bool:
        """True from the end of a request's head to the end of its answer."""
        return self.cycle is not None and not self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See :class:`asyncio.Protocol`."""
        super().connection_made(transport)
        # asyncio does this only for listeners that name their protocol. Without it the body of a short answer waits for
        # the client to acknowledge its head: 40 ms.
        if self.client is not None:
            transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._await_head()
        if len(self.connections) > self._limits.max_connections:
            self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        """See :class:`asyncio.Protocol`."""
        for timer in (self._head_timer, self._write_timer, self._linger_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        """As uvicorn's, and a request that has begun to arrive has to arrive in time."""
        super().handle_events()
        if self.in_request:
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None
        elif self._head_timer is None and self.conn.trailing_data[0]:
            self._await_head()

    def on_response_complete(self) -> None:
        """As uvicorn's; a connection whose request never ends is closed soon."""
        self._quiet_since = time.monotonic()
        unread = self.conn.their_state is h11.SEND_BODY
        super().on_response_complete()
        if unread and not self.transport.is_closing():
            self._linger_timer = self.loop.call_later(_LINGER_S, self.transport.close)

    def pause_writing(self) -> None:
        """See :class:`asyncio.Protocol`."""
        super().pause_writing()
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(self._limits.write_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """See :class:`asyncio.Protocol`."""
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def send_400_response(self, msg: str) -> None:
        """What is not HTTP is answered in JSON, and nothing else is sent afterwards."""
        cause = sys.exc_info()[1]
        too_large = isinstance(cause, h11.RemoteProtocolError) and cause.error_status_hint == 431
        begun = self.in_request and self.cycle.response_started
        if self.in_request:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if begun:
            self.transport.close()
        elif too_large:
            self._refuse(431, f"the headers are longer than {self._limits.max_header_bytes:,} bytes. Send less.")
        else:
            self._refuse(400, f"{msg} Send HTTP/1.1.")

    def _await_head(self) -> None:
        self._head_timer = self.loop.call_later(self._limits.header_seconds, self._head_is_late)

    def _head_is_late(self) -> None:
        if self.transport.is_closing() or self.in_request:
            return
        if self.conn.trailing_data[0]:
            self._refuse(408, f"the headers have not come within {self._limits.header_seconds:g} s. Send them faster.")
        else:
            self.transport.close()

    def _make_room(self) -> None:
        others = [other for other in self.connections if isinstance(other, BoundedProtocol) and other is not self]
        waiting = [other for other in others if not other.in_request or other._body_is_missing()]
        if waiting:
            min(waiting, key=lambda other: other._quiet_since).transport.abort()
        else:
            self._refuse(503, f"all {self._limits.max_connections} connections are in use. Try again later.")

    def _body_is_missing(self) -> bool:
        return bool(self.cycle.more_body and not self.cycle.response_started)

    def _refuse(self, status: int, message: str) -> None:
        """Answer without a request, and close."""
        kind = "service_unavailable" if status == 503 else "invalid_request_error"
        content = json.dumps(error_body(message, kind, None, status)).encode()
        head = f"HTTP/1.1 {status} -\r\ncontent-type: application/json\r\ncontent-length: {len(content)}\r\n"
        self.transport.write(f"{head}connection: close\r\n\r\n".encode() + content)
        self.transport.close()


def server_options(limits: ServerLimits) -> dict[str, Any]:
    """Arguments of ``uvicorn.Config`` under these limits."""
    return {
        "http": functools.partial(BoundedProtocol, limits=limits),
        "ws": "none",
        "h11_max_incomplete_event_size": limits.max_header_bytes,
        "timeout_keep_alive": limits.idle_seconds,
        "log_level": "warning",
        "lifespan": "off",
    }
