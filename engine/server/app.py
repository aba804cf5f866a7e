"""The worker's application: routes, and how errors become answers."""

from __future__ import annotations

import dataclasses

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from engine.config import EngineConfig
from engine.errors import EngineDeadError, HeadroomError
from engine.outputs import RequestOutput
from engine.server.admin import UnauthorizedError, admin_router
from engine.server.host import EngineHost, NotReadyError, error_document
from engine.server.jobs import BusyError, JobRunner, UnknownJobError
from engine.server.metrics import RequestMetrics, metrics_router
from engine.server.openai import UnknownModelError, openai_error, openai_router
from engine.telemetry_sampler import TelemetrySampler

_STATUS = (
    (NotReadyError, 503),
    (EngineDeadError, 503),
    (BusyError, 409),
    (UnknownJobError, 404),
    (UnknownModelError, 404),
)


def create_app(config: EngineConfig | None, *, admin_token: str, telemetry: TelemetrySampler | None = None) -> FastAPI:
    """The worker's ASGI application.

    Args:
        config: load this at once, in the background; None serves nothing until ``POST /admin/load``.
        admin_token: what the admin API asks for.
        telemetry: not yet started; sampled at its default interval if not given. It ends with the host.
    """
    metrics = RequestMetrics()

    def observe(output: RequestOutput) -> None:
        metrics.model = host.state().model
        metrics.observe(output)

    telemetry = telemetry or TelemetrySampler()
    telemetry.start()
    host = EngineHost(observe, telemetry)
    app = FastAPI(title="Headroom worker", docs_url=None, redoc_url=None)
    app.state.host = host
    app.include_router(openai_router(host))
    app.include_router(admin_router(host, JobRunner(telemetry), telemetry, admin_token))
    app.include_router(metrics_router(host, metrics, telemetry))
    _add_error_answers(app)

    @app.get("/health")
    def health() -> JSONResponse:
        state = host.state()
        document = dataclasses.asdict(state)
        return JSONResponse(
            {"status": document.pop("phase"), **document}, status_code=200 if state.phase == "ready" else 503
        )

    if config is not None:
        host.load(config)
    return app


def status_of(problem: HeadroomError) -> int:
    """The HTTP status of an error: the caller's fault (400) unless it is one of the special kinds."""
    if isinstance(problem, UnauthorizedError):
        return problem.status
    return next((status for kind, status in _STATUS if isinstance(problem, kind)), 400)


def error_answer(request: Request, problem: HeadroomError, status: int) -> Response:
    """An error in the form of the API that was asked."""
    if request.url.path.startswith("/admin"):
        return JSONResponse(dict(error_document(problem)), status_code=status)
    return openai_error(problem, status)


def _add_error_answers(app: FastAPI) -> None:
    @app.exception_handler(HeadroomError)
    async def answer(request: Request, problem: HeadroomError) -> Response:
        return error_answer(request, problem, status_of(problem))

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, problem: HTTPException) -> Response:
        error = HeadroomError(f"{request.method} {request.url.path}: {problem.detail}.", remedy="Check the address.")
        return error_answer(request, error, problem.status_code)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, problem: RequestValidationError) -> Response:
        first = problem.errors()[0]
        place = [str(part) for part in first["loc"] if part != "body"]
        # A union reports one error for each of its members; the first part of the place is the field's name.
        error = HeadroomError(f"{first['msg']}.", field=place[0] if place else None, remedy="Correct the request.")
        return await answer(request, error)
