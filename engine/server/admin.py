"""The admin API: status, configuration, series for charts, loading a model, measured runs. Guarded by a token."""

from __future__ import annotations

import dataclasses
import hmac
import os
import signal
import time
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request

from engine.config import EngineConfig, schema
from engine.errors import HeadroomError
from engine.measure import WORKLOADS
from engine.server.bodies import BodyReader, SafeJSONResponse, shorten
from engine.server.host import EngineHost, NotReadyError
from engine.server.jobs import JobRunner
from engine.server.schemas import MAX_WHOLE, RunBody
from engine.telemetry.sampler import TelemetrySampler
from engine.worker.loop import EngineLoop

Since = Annotated[int, Query(ge=-1, lt=MAX_WHOLE)]
Force = Annotated[bool, Query(description="Do it although a run is in progress; the run is marked as disturbed.")]


class UnauthorizedError(HeadroomError):
    """The bearer token is missing (401) or wrong (403)."""

    def __init__(self, message: str, *, status: int) -> None:
        super().__init__(message, field="Authorization", remedy="Send 'Authorization: Bearer' with the admin token.")
        self.status = status


def require_token(token: str) -> Callable[[Request], None]:
    """A dependency that refuses requests without the admin token (compared in constant time)."""

    def check(request: Request) -> None:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not given:
            raise UnauthorizedError("the admin API needs a token.", status=401)
        if not hmac.compare_digest(given.encode(), token.encode()):
            raise UnauthorizedError("the admin token is wrong.", status=403)

    return check


def _newest(loop: EngineLoop) -> dict[str, Any]:
    """The numbers of the last step and event, so that a reader asks for the series only where there is more."""
    events = loop.events.since(loop.events.last_index)
    return {
        "last_step": loop.steps.last_index,
        "last_event": events[-1].index if events else -1,
        "last_event_unix_s": events[-1].time_unix_s if events else None,  # another engine counts from 0 again
    }


def admin_router(
    host: EngineHost, jobs: JobRunner, telemetry: TelemetrySampler, token: str, bodies: BodyReader
) -> APIRouter:
    """Routes under ``/admin``. What would disturb a run in progress is refused unless forced."""
    router = APIRouter(
        prefix="/admin", dependencies=[Depends(require_token(token))], default_response_class=SafeJSONResponse
    )
    _add_state_routes(router, host, telemetry)
    _add_change_routes(router, host, jobs, bodies)
    _add_run_routes(router, host, jobs, bodies)
    _add_telemetry_route(router, telemetry)

    @router.post("/shutdown", status_code=202)
    def shutdown() -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGTERM)
        return {"stopping": True}

    return router


def _add_state_routes(router: APIRouter, host: EngineHost, telemetry: TelemetrySampler) -> None:
    @router.get("/status")
    def status() -> dict[str, Any]:
        load = dataclasses.asdict(host.state())
        worker = {"pid": os.getpid(), "uptime_s": time.time() - host.started_unix_s, "load": load}
        try:
            loop = host.loop
            engine = dataclasses.asdict(loop.status())
            worker |= _newest(loop)
        except NotReadyError:
            engine = None
        return {"worker": worker, "engine": engine, "telemetry": telemetry.latest().sample}

    @router.get("/config")
    def config() -> dict[str, Any]:
        try:
            current = host.loop.snapshot.config
        except NotReadyError:  # the knobs are needed all the same: to load a model with
            return {"config": None, "hash": None, "knobs": schema()}
        return {"config": current.to_dict(), "hash": current.hash(), "knobs": schema()}

    @router.get("/series")
    def series(steps_since: Since = -1, events_since: Since = -1) -> dict[str, Any]:
        """Steps and events numbered above the given ones."""
        loop = host.loop
        steps = loop.steps.since(steps_since + 1)
        events = loop.events.since(events_since + 1)
        return {
            "steps": [dataclasses.asdict(step) for step in steps],
            "events": [dataclasses.asdict(event) for event in events],
            "last_step": steps[-1].index if steps else loop.steps.last_index,
            "last_event": events[-1].index if events else loop.events.last_index,
        }


def _add_change_routes(router: APIRouter, host: EngineHost, jobs: JobRunner, bodies: BodyReader) -> None:
    body = Depends(bodies.document())

    @router.patch("/config")
    def patch_config(changes: dict[str, Any] = body, force: Force = False) -> dict[str, Any]:
        loop = host.loop
        mark = jobs.permit(f"knobs changed from outside: {_listed(changes)}", force=force)
        result = loop.reconfigure(changes)
        mark()
        return dataclasses.asdict(result)

    @router.post("/load", status_code=202)
    def load(knobs: dict[str, Any] = body, force: Force = False) -> dict[str, Any]:
        config = EngineConfig.from_mapping(knobs)
        mark = jobs.permit(f"another model was loaded: {shorten(config.model)}", force=force)
        host.load(config)
        mark()
        return {"load": dataclasses.asdict(host.state())}

    @router.post("/reset_prefix_cache")
    def reset_prefix_cache(force: Force = False) -> dict[str, Any]:
        mark = jobs.permit("the prefix cache was reset", force=force)
        blocks = host.loop.reset_prefix_cache()
        mark()
        return {"blocks": blocks}

    @router.post("/resize")
    def resize(force: Force = False) -> dict[str, Any]:
        """The KV cache takes the memory that lighter weights have left."""
        mark = jobs.permit("the KV cache was resized", force=force)
        result = host.loop.resize()
        mark()
        return dataclasses.asdict(result)


def _listed(changes: dict[str, Any]) -> str:
    return shorten(", ".join(f"{name}={value}" for name, value in changes.items()) or "none")


def _add_telemetry_route(router: APIRouter, telemetry: TelemetrySampler) -> None:
    @router.get("/telemetry")
    def samples(since: Since = -1) -> dict[str, Any]:
        """Samples numbered above the given one; the last quarter of an hour is kept."""
        entries = telemetry.since(since + 1)
        return {
            "samples": [entry.to_dict() for entry in entries],
            "last_index": entries[-1].index if entries else telemetry.last_index,
            "interval_s": telemetry.interval_s,
        }


def _add_run_routes(router: APIRouter, host: EngineHost, jobs: JobRunner, bodies: BodyReader) -> None:
    run_body = Depends(bodies.model(RunBody))

    @router.get("/workloads")
    def workloads() -> dict[str, Any]:
        return {"workloads": [workload.to_dict() for workload in WORKLOADS.values()]}

    @router.post("/runs", status_code=202)
    def start_run(body: RunBody = run_body) -> dict[str, Any]:
        job = jobs.start(host.loop, body)
        return {"job_id": job.job_id, "run_ids": job.run_ids}

    @router.get("/runs/{job_id}")
    def run_status(job_id: str) -> dict[str, Any]:
        return jobs.get(job_id).to_dict()

    @router.delete("/runs/{job_id}")
    def cancel_run(job_id: str) -> dict[str, Any]:
        jobs.get(job_id).cancel.set()
        return {"cancelled": job_id}
