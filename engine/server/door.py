"""The door of the worker: which requests are let in at all, and that each gets an answer in the API's form."""

from __future__ import annotations

import asyncio
import hmac
import logging
import traceback
from collections.abc import Iterable

from fastapi.responses import Response
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.errors import HeadroomError, RequestError
from engine.server.answers import error_answer
from engine.server.bodies import shorten
from engine.server.limits import DoorSettings, ServerLimits

logger = logging.getLogger(__name__)


class WrongHostError(RequestError):
    """The request is for another host (421)."""


class ApiKeyError(RequestError):
    """The API key is missing or wrong (401)."""


class HeadTooLargeError(RequestError):
    """The request's line and headers are too long (431)."""


class DrainingError(RequestError):
    """The worker is shutting down and takes nothing new (503)."""


class Gate:
    """Whether new work is taken, and how many requests are being answered. Used in the event loop's thread.

    Attributes:
        draining: nothing new is taken: the worker is about to end.
        active: requests of ``/v1`` being answered.
    """

    def __init__(self) -> None:
        self.draining = False
        self.active = 0


class ApiDoor:
    """ASGI middleware: host, API key and draining are looked at before anything else; nothing escapes unanswered.

    Args:
        app: what is behind the door.
        settings: who may come in.
        limits: how long the head of a request may be.
        gate: whether anybody new may.
        admin_token: opens ``/v1`` too: whoever may change the model may also use it.
    """

    def __init__(
        self, app: ASGIApp, settings: DoorSettings, limits: ServerLimits, gate: Gate, admin_token: str
    ) -> None:
        self._app = app
        self._most_head_bytes = limits.max_header_bytes
        self._settings = settings
        self._gate = gate
        key = settings.api_key
        self._keys = [] if key is None else [key.encode(), admin_token.encode()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        error = self._refusal(scope)
        if error is not None:
            await error_answer(scope["path"], error)(scope, receive, send)
            return
        counted = scope["path"].startswith("/v1/")
        self._gate.active += counted
        try:
            await self._answer(scope, receive, send)
        finally:
            self._gate.active -= counted

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except asyncio.CancelledError:
            if not self._gate.draining:
                raise
            if not started:
                await _draining_answer(scope["path"])(scope, receive, send)
        except Exception as exc:
            place = traceback.extract_tb(exc.__traceback__)[-1]
            what = f"{type(exc).__name__}: {shorten(str(exc))} ({place.filename}:{place.lineno})"
            logger.error("%s %s failed: %s", scope["method"], shorten(scope["path"]), what.replace("\n", " "))
            if not started:
                error = HeadroomError(f"internal error: {type(exc).__name__}.", remedy="See its log.")
                await error_answer(scope["path"], error, 500)(scope, receive, send)

    def _refusal(self, scope: Scope) -> HeadroomError | None:
        headers = [(name, value.decode("latin-1")) for name, value in scope["headers"]]
        head = len(scope["raw_path"] or b"") + len(scope["query_string"])
        if head + sum(len(name) + len(value) for name, value in headers) > self._most_head_bytes:
            message = f"the headers are longer than {self._most_head_bytes:,} bytes."
            return HeadTooLargeError(message, remedy="Send less, or raise --max-header-bytes.")
        for name, value in headers:
            if name == b"host" and not self._settings.admits(value):
                message = f"{shorten(value)!r} is not served here."
                return WrongHostError(message, field="Host", remedy="Name it with --allowed-host.")
        path, method = scope["path"], scope["method"]
        if path.startswith("/v1") and self._keys and not self._has_key(headers):
            remedy = "Send 'Authorization: Bearer' with the API key."
            return ApiKeyError("the API key is missing or wrong.", field="Authorization", remedy=remedy)
        ending = method in ("GET", "HEAD", "DELETE") or path == "/admin/shutdown"
        if self._gate.draining and not ending:
            return DrainingError("the worker is shutting down.", remedy="Send it to another one, or try again later.")
        return None

    def _has_key(self, headers: Iterable[tuple[bytes, str]]) -> bool:
        given = next((value for name, value in headers if name == b"authorization"), "")
        scheme, _, key = given.partition(" ")
        content = key.strip().encode("utf-8", "replace")
        # every comparison is made: how long it takes says nothing of which key it was
        matches = [hmac.compare_digest(content, known) for known in self._keys]
        return scheme.lower() == "bearer" and any(matches)


def _draining_answer(path: str) -> Response:
    return error_answer(path, DrainingError("the worker shut down before it answered.", remedy="Send it again."))


class OpenAICors(CORSMiddleware):
    """CORS for ``/v1`` alone: no page has any business with the administration."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        if scope["type"] == "http" and scope["path"].startswith("/v1"):
            await super().__call__(scope, receive, send)
        else:
            await self.app(scope, receive, send)
