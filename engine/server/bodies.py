"""Bodies in, documents out: read within the limits, parsed strictly, and always written as JSON that can be read."""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, TypeVar

import pydantic_core
from fastapi import Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from engine.errors import HeadroomError, QueueFullError, RequestError
from engine.server.limits import ServerLimits

Model = TypeVar("Model", bound=BaseModel)
T = TypeVar("T")

# A body of this size is parsed in a millisecond or two; larger ones one after the other, outside the event loop.
_SMALL_BODY_BYTES = 65_536
# Values that may not be finite numbers: only then is the whole document looked through.
_SUSPICIOUS = re.compile(rb"NaN|Infinity|[eE]\+?\d{3}|\d{300}")
_LONGEST_ECHO = 200
# Bodies are held in memory: as much as this many of the largest ones at a time.
_BODIES_AT_ONCE = 16


class TooLargeError(RequestError):
    """More than a limit allows (413)."""


class UnprocessableError(RequestError):
    """A valid request that asks for too much at once (422)."""


class MediaTypeError(RequestError):
    """The body says that it is not JSON (415)."""


class SlowClientError(RequestError):
    """The body has not come in time (408)."""


class BodyReader:
    """Reads bodies within the limits of a worker."""

    def __init__(self, limits: ServerLimits) -> None:
        self._limits = limits
        self._large = asyncio.Semaphore(1)
        self._held_bytes = 0  # of all bodies that are being read or wait to be parsed

    def document(self) -> Callable[[Request], Awaitable[dict[str, Any]]]:
        """A dependency: the body as a JSON object without numbers that are not finite."""

        async def read(request: Request) -> dict[str, Any]:
            return await self._object(request, dict)

        return read

    def model(self, kind: type[Model]) -> Callable[[Request], Awaitable[Model]]:
        """A dependency: the body as ``kind``."""

        async def read(request: Request) -> Model:
            return await self._object(request, validate)

        def validate(document: dict[str, Any]) -> Model:
            try:
                return kind.model_validate(document, context=self._limits)
            except ValidationError as error:
                raise describe_invalid(error.errors(include_url=False, include_input=False)) from None

        return read

    async def _object(self, request: Request, make: Callable[[dict[str, Any]], T]) -> T:
        _check_media_type(request.headers.get("content-type"))
        content = bytearray()
        try:
            await self._read(request, content)
            if len(content) <= _SMALL_BODY_BYTES:
                return make(parse_object(bytes(content)))
            async with self._large:
                return await asyncio.to_thread(lambda: make(parse_object(bytes(content))))
        finally:
            self._held_bytes -= len(content)

    async def _read(self, request: Request, content: bytearray) -> None:
        """The body, refused as soon as it is known to be too long, whether its length was announced or not."""
        limit = self._limits.max_body_bytes
        announced = request.headers.get("content-length", "")
        if announced.isdigit() and (len(announced) > 18 or int(announced) > limit):
            raise _too_long(limit)
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                async for chunk in request.stream():
                    content += chunk
                    self._held_bytes += len(chunk)
                    if len(content) > limit:
                        raise _too_long(limit)
                    if self._held_bytes > _BODIES_AT_ONCE * limit:
                        remedy = "Try again in a moment, or raise --max-body-bytes."
                        raise QueueFullError("too many large bodies come at once.", field="body", remedy=remedy)
        except TimeoutError:
            message = f"the body has not come within {self._limits.body_seconds:g} s."
            raise SlowClientError(message, remedy="Send it faster, or raise --body-seconds.") from None
        except ClientDisconnect:
            raise SlowClientError("the client disconnected.", remedy="Send the whole body.") from None


def _check_media_type(header: str | None) -> None:
    kind = (header or "application/json").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        message = f"{shorten(kind)!r} is not JSON."
        raise MediaTypeError(message, field="Content-Type", remedy="Send the body as application/json.")


def _too_long(limit: int) -> TooLargeError:
    return TooLargeError(
        f"the body is longer than {limit:,} bytes.", field="body", remedy="Send less, or raise --max-body-bytes."
    )


def parse_object(content: bytes) -> dict[str, Any]:
    """A JSON object from its bytes.

    Raises:
        RequestError: if it is none: not UTF-8, not JSON, nested more than 200 levels, a half of a surrogate pair, an
            integer of thousands of digits, a number that is not finite, or another kind of value.
    """
    if not content.strip():
        raise RequestError("the body is empty.", field="body", remedy="Send a JSON object.")
    try:
        document = pydantic_core.from_json(content)
    except ValueError as error:
        raise RequestError(f"the body is not JSON: {error}.", field="body", remedy="Correct it.") from None
    if not isinstance(document, dict):
        message = f"the body is a JSON {type(document).__name__}."
        raise RequestError(message, field="body", remedy="Send a JSON object.")
    if _SUSPICIOUS.search(content):
        for place, value in _numbers(document):
            if isinstance(value, int) and abs(value) > 10**300:
                raise RequestError("a whole number is too large.", field=place, remedy="Give a smaller one.")
            if not math.isfinite(value):
                raise RequestError(f"{value} is not a number.", field=place, remedy="Give a finite number.")
    return document


def _numbers(document: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Every number of a document with the name of the field that it is in, e.g. ``slo.ttft_ms``."""
    pending: list[tuple[str, Any]] = list(document.items())
    while pending:
        place, value = pending.pop()
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield place, value
        elif isinstance(value, dict):
            pending += [(f"{place}.{name}", item) for name, item in value.items()]
        elif isinstance(value, list):
            pending += [(place, item) for item in value]


def describe_invalid(errors: Any) -> RequestError:
    """The first of pydantic's errors as ours. A union reports one for each of its members; the first part of the
    place is the field's name."""
    first = errors[0]
    place = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
    cause = first.get("ctx", {}).get("error")
    carried = getattr(cause, "carried", None)
    if isinstance(carried, RequestError):
        return carried
    return RequestError(f"{first['msg']}.", field=place[0] if place else None, remedy="Correct the request.")


def shorten(text: str) -> str:
    """What was sent, short enough to be repeated in an answer."""
    return text if len(text) <= _LONGEST_ECHO else f"{text[:_LONGEST_ECHO]}…"


def json_text(value: Any) -> str:
    """JSON of whatever came about: numbers that JSON has no word for become null, halves of surrogate pairs U+FFFD."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except ValueError:
        text = json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


class SafeJSONResponse(JSONResponse):
    """An answer that can always be sent."""

    def render(self, content: Any) -> bytes:
        """See starlette."""
        return json_text(content).encode()


def error_document(error: HeadroomError) -> dict[str, Any]:
    """An error as the admin API answers it."""
    return {"error": error.to_dict()}
