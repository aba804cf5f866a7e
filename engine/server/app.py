"""The worker's application: routes, and how errors become answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from engine.config import EngineConfig
from engine.errors import HeadroomError
from engine.outputs import RequestOutput
from engine.server.admin import admin_router
from engine.server.answers import error_answer
from engine.server.bodies import BodyReader, SafeJSONResponse, describe_invalid, shorten
from engine.server.door import ApiDoor, Gate, OpenAICors
from engine.server.host import EngineHost
from engine.server.jobs import JobRunner
from engine.server.limits import DoorSettings, ServerLimits
from engine.server.metrics import RequestMetrics, metrics_router
from engine.server.openai import openai_router
from engine.server.texts import TextPool
from engine.server.traffic import Traffic
from engine.telemetry.sampler import TelemetrySampler


def create_app(
    config: EngineConfig | None,
    *,
    admin_token: str,
    telemetry: TelemetrySampler | None = None,
    limits: ServerLimits | None = None,
    door: DoorSettings | None = None,
    before_load: Callable[[], None] | None = None,
) -> FastAPI:
    """The worker's ASGI application.

    Args:
        config: load this at once, in the background; None serves nothing until ``POST /admin/load``.
        admin_token: what the admin API asks for.
        telemetry: not yet started; sampled at its default interval if not given. It ends with the host.
        limits: how much is accepted from outside.
        door: who may come in.
        before_load: called in the thread that loads, before each load.

    Returns:
        The application; its state has ``host``, ``jobs``, ``texts`` and ``gate``.
    """
    limits, door = limits or ServerLimits(), door or DoorSettings()
    metrics, traffic, texts, gate = RequestMetrics(), Traffic(), TextPool(limits), Gate()

    def observe(output: RequestOutput) -> None:
        metrics.model = host.state().model
        metrics.observe(output)

    telemetry = telemetry or TelemetrySampler()
    telemetry.start()
    host = EngineHost(observe, telemetry, lambda snapshot: texts.prepare(snapshot.tokenizer), before_load)
    jobs, bodies = JobRunner(telemetry, traffic), BodyReader(limits)
    app = FastAPI(title="Headroom worker", docs_url=None, redoc_url=None, default_response_class=SafeJSONResponse)
    app.state.host, app.state.jobs, app.state.texts, app.state.gate = host, jobs, texts, gate
    app.include_router(openai_router(host, texts, traffic, limits, door, bodies))
    app.include_router(admin_router(host, jobs, telemetry, admin_token, bodies))
    app.include_router(metrics_router(host, metrics, telemetry))
    _add_error_answers(app)
    _add_health(app, host, gate)
    app.add_middleware(ApiDoor, settings=door, limits=limits, gate=gate, admin_token=admin_token)
    if door.cors_origins:  # outside of the door: a page must be able to read why it is kept out
        app.add_middleware(
            OpenAICors, allow_origins=list(door.cors_origins), allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    if config is not None:
        host.load(config)
    return app


def _add_health(app: FastAPI, host: EngineHost, gate: Gate) -> None:
    # async: answered in the event loop, whatever the threads that answer other routes are waiting for
    @app.get("/health")
    async def health() -> JSONResponse:
        state = host.state()
        document = dataclasses.asdict(state)
        if gate.draining:
            document["stage"] = "shutting down"
        ready = state.phase == "ready" and not gate.draining
        return SafeJSONResponse({"status": document.pop("phase"), **document}, status_code=200 if ready else 503)


def _add_error_answers(app: FastAPI) -> None:
    # The path is the scope's own: a URL that is put together from what a client sent may not be one.
    @app.exception_handler(HeadroomError)
    async def answer(request: Request, error: HeadroomError) -> Response:
        return error_answer(request.scope["path"], error)

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> Response:
        what = f"{request.method} {shorten(request.scope['path'])}: {error.detail}."
        answered = HeadroomError(what, remedy="Check the address.")
        return error_answer(request.scope["path"], answered, error.status_code)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return error_answer(request.scope["path"], describe_invalid(error.errors()))
