"""The client of a worker: what the dashboard and other programs call. One method per route, errors as exceptions."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import httpx

from engine.errors import HeadroomError
from engine.outputs import ReconfigureResult

# Seconds. Polls are answered between two steps, so only as fast as a step; a swap prepares weights first.
_POLL_TIMEOUT = httpx.Timeout(5.0, connect=1.0)
_CHANGE_TIMEOUT = httpx.Timeout(600.0, connect=2.0)
_STREAM_TIMEOUT = httpx.Timeout(None, connect=2.0)


class WorkerError(HeadroomError):
    """The worker's answer to a request it did not carry out.

    Attributes:
        status_code: of the HTTP answer.
    """

    def __init__(
        self, message: str, *, field: str | None = None, remedy: str | None = None, status_code: int = 0
    ) -> None:
        super().__init__(message, field=field, remedy=remedy)
        self.status_code = status_code


class RunInProgressError(WorkerError):
    """The worker did not do it because a run is being recorded; most things can be forced, which marks the run."""


class EngineUnreachableError(HeadroomError):
    """No worker answers at the address: it is starting, gone, or elsewhere."""


class EngineClient:
    """Talks to one worker. Thread-safe.

    Args:
        base_url: e.g. ``http://127.0.0.1:8000``.
        admin_token: for the admin routes.
    """

    def __init__(self, base_url: str, admin_token: str = "") -> None:
        self.base_url = base_url
        headers = {"Authorization": f"Bearer {admin_token}"} if admin_token else {}
        # trust_env=False: a proxy set for the outside world must not sit between the dashboard and its own worker
        self._http = httpx.Client(base_url=base_url, headers=headers, trust_env=False)

    def close(self) -> None:
        """Close its connections."""
        self._http.close()

    def health(self) -> dict[str, Any]:
        """``{"status": loading | ready | failed | dead, "model", "stage", "progress", "error"}``."""
        response = self._send("GET", "/health", accept=(503,))
        return dict(response.json())

    def models(self) -> list[dict[str, Any]]:
        """The served models, as OpenAI lists them."""
        return list(self._send("GET", "/v1/models").json()["data"])

    def status(self) -> dict[str, Any]:
        """``{"worker", "engine", "telemetry"}``; ``engine`` is an EngineStatus as JSON, None while none is loaded."""
        return dict(self._send("GET", "/admin/status").json())

    def config(self) -> dict[str, Any]:
        """``{"config", "hash", "knobs"}``."""
        return dict(self._send("GET", "/admin/config").json())

    def patch_config(self, changes: Mapping[str, Any], *, force: bool = False) -> ReconfigureResult:
        """Change knobs while requests are in flight; all or nothing.

        Args:
            force: also while a run is being recorded, which is then marked as disturbed.

        Raises:
            RunInProgressError: if one is, and it is not forced.
        """
        response = self._send(
            "PATCH", "/admin/config", json=dict(changes), params=_forced(force), timeout=_CHANGE_TIMEOUT
        )
        document = dict(response.json())
        document["changed"] = {name: tuple(pair) for name, pair in document["changed"].items()}
        return ReconfigureResult(**document)

    def series(self, *, steps_since: int = -1, events_since: int = -1) -> dict[str, Any]:
        """Steps and events numbered above the given ones, and the numbers of the last of each."""
        parameters = {"steps_since": steps_since, "events_since": events_since}
        return dict(self._send("GET", "/admin/series", params=parameters).json())

    def telemetry(self, *, since: int = -1) -> dict[str, Any]:
        """``{"samples", "last_index", "interval_s"}``: samples numbered above the given one."""
        return dict(self._send("GET", "/admin/telemetry", params={"since": since}).json())

    def load(self, knobs: Mapping[str, Any], *, force: bool = False) -> dict[str, Any]:
        """Load a model with these knobs in the worker's background; :meth:`health` tells how far it is.

        Raises:
            RunInProgressError: if a run is being recorded, and it is not forced.
        """
        return dict(self._send("POST", "/admin/load", json=dict(knobs), params=_forced(force)).json())

    def reset_prefix_cache(self, *, force: bool = False) -> int:
        """Forget every reusable prefix; how many blocks that were.

        Raises:
            RunInProgressError: if a run is being recorded, and it is not forced.
        """
        return int(self._send("POST", "/admin/reset_prefix_cache", params=_forced(force)).json()["blocks"])

    def resize(self) -> ReconfigureResult:
        """Give the KV cache the memory that lighter weights have left; running requests are computed again."""
        return ReconfigureResult(**self._send("POST", "/admin/resize").json())

    def workloads(self) -> list[dict[str, Any]]:
        """The named workloads."""
        return list(self._send("GET", "/admin/workloads").json()["workloads"])

    def start_run(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Start a run or a comparison (see ``RunBody``); ``{"job_id", "run_ids"}``."""
        return dict(self._send("POST", "/admin/runs", json=dict(request)).json())

    def run_status(self, job_id: str) -> dict[str, Any]:
        """``{"status", "progress", "results", "error", …}`` of a job."""
        return dict(self._send("GET", f"/admin/runs/{job_id}").json())

    def cancel_run(self, job_id: str) -> None:
        """Ask a job to end; what it has measured is kept."""
        self._send("DELETE", f"/admin/runs/{job_id}")

    def shutdown(self) -> None:
        """Ask the worker to end."""
        self._send("POST", "/admin/shutdown")

    def complete(self, prompt: str | Sequence[int], **parameters: Any) -> dict[str, Any]:
        """A completion, not streamed."""
        body = {"prompt": prompt if isinstance(prompt, str) else list(prompt), **parameters}
        return dict(self._send("POST", "/v1/completions", json=body, timeout=_STREAM_TIMEOUT).json())

    def stream_chat(self, messages: Sequence[Mapping[str, str]], **parameters: Any) -> Iterator[dict[str, Any]]:
        """OpenAI chunks of a streamed chat answer, the last with the usage. Closing the iterator ends the request."""
        body = {
            "messages": [dict(message) for message in messages],
            "stream": True,
            "stream_options": {"include_usage": True},
            **parameters,
        }
        try:
            with self._http.stream("POST", "/v1/chat/completions", json=body, timeout=_STREAM_TIMEOUT) as response:
                if response.is_error:
                    response.read()
                    raise _error_of(response)
                yield from _chunks(response)
        except httpx.TransportError as error:
            raise self._unreachable(error) from error

    def _send(self, method: str, path: str, *, accept: tuple[int, ...] = (), **arguments: Any) -> httpx.Response:
        arguments.setdefault("timeout", _POLL_TIMEOUT)
        try:
            response = self._http.request(method, path, **arguments)
        except httpx.TransportError as error:
            raise self._unreachable(error) from error
        if response.is_error and response.status_code not in accept:
            raise _error_of(response)
        return response

    def _unreachable(self, error: Exception) -> EngineUnreachableError:
        return EngineUnreachableError(
            f"no worker answers at {self.base_url} ({error or type(error).__name__}).",
            remedy="Wait until it has started, or restart it.",
        )


def _forced(force: bool) -> dict[str, str]:
    return {"force": "true"} if force else {}


def _chunks(response: httpx.Response) -> Iterator[dict[str, Any]]:
    """The documents of a stream of server-sent events."""
    for line in response.iter_lines():
        if not line.startswith("data: "):
            continue
        payload = line.removeprefix("data: ")
        if payload == "[DONE]":
            return
        document = json.loads(payload)
        if "error" in document:
            raise WorkerError(document["error"]["message"], status_code=500)
        yield document


def _error_of(response: httpx.Response) -> WorkerError:
    """The exception for an error answer, in the admin's or in OpenAI's form."""
    try:
        error = response.json()["error"]
        if "remedy" in error:
            kind = RunInProgressError if response.status_code == 409 and error["field"] == "run" else WorkerError
            return kind(
                error["message"], field=error["field"], remedy=error["remedy"], status_code=response.status_code
            )
        return WorkerError(error["message"], status_code=response.status_code)
    except (ValueError, KeyError, TypeError):
        text = response.text[:300] or response.reason_phrase
        return WorkerError(f"the worker answered {response.status_code}: {text}", status_code=response.status_code)
