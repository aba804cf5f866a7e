"""How errors are answered: the status of each kind, in the form of the API that was asked."""

from __future__ import annotations

from typing import Any

from fastapi.responses import Response

from engine.errors import HeadroomError
from engine.server.bodies import SafeJSONResponse, error_document, shorten

_RETRY_AFTER_S = "1"
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable",
}
# By the name of the class or of one that it derives from: the classes are defined where they are raised.
_STATUS = {
    "NotReadyError": 503,
    "EngineDeadError": 503,
    "QueueFullError": 503,
    "DrainingError": 503,
    "BusyError": 409,
    "UnknownJobError": 404,
    "UnknownModelError": 404,
    "TooLargeError": 413,
    "UnprocessableError": 422,
    "MediaTypeError": 415,
    "SlowClientError": 408,
    "WrongHostError": 421,
    "ApiKeyError": 401,
    "HeadTooLargeError": 431,
}


def status_of(error: HeadroomError) -> int:
    """The HTTP status of an error: the caller's fault (400) unless it is one of the special kinds."""
    stated = getattr(error, "status", None)
    if isinstance(stated, int):
        return stated
    return next((_STATUS[kind.__name__] for kind in type(error).__mro__ if kind.__name__ in _STATUS), 400)


def error_answer(path: str, error: HeadroomError, status: int | None = None) -> Response:
    """An error in the form of the API that was asked."""
    code = status_of(error) if status is None else status
    document = error_document(error) if path.startswith("/admin") else openai_error(error, code)
    headers = {"Retry-After": _RETRY_AFTER_S} if code == 503 else {}
    if code == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return SafeJSONResponse(document, status_code=code, headers=headers)


def error_body(message: str, kind: str, field: str | None = None, code: int | str | None = None) -> dict[str, Any]:
    """An error as the OpenAI API answers it."""
    return {"error": {"message": message, "type": kind, "param": field, "code": code}}


def openai_error(error: HeadroomError, status: int) -> dict[str, Any]:
    """The document for a request that cannot be served."""
    message = f"{error.message} {error.remedy or ''}".strip()
    field = None if error.field is None else shorten(error.field)
    text = f"{field}: {message}" if field else message
    return error_body(text, _TYPES.get(status, "invalid_request_error"), field, status)
