"""HTTP: every case of :mod:`.http_cases` against a worker, with good requests between them that must not notice."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.attack.http_cases import COMPLETIONS, Case, cases, sample
from tests.attack.outcome import Tally
from tests.attack.target import TOKEN, Target
from tests.attack.wire import Answer, exchange, post, request

DEMANDED = 1200
CLIENTS = 6
CANARY_INTERVAL_S = 0.15
CANARY: dict[str, Any] = {"prompt": "the canary sings", "max_tokens": 24, "temperature": 0, "ignore_eos": True}
RACE_CHANGES: tuple[dict[str, str], ...] = (
    *({"kv_dtype": value} for value in ("int8", "fp8", "int4", "model")),
    *({"weights": value} for value in ("int8", "int4", "w4a8", "model")),
    *({"head_weights": value} for value in ("int8", "model")),
)
RACES = 40


def attack(seed: int, model: Path, folder: Path, home: Path, end: float, count: int | None = None) -> Tally:
    """Run it.

    Args:
        model: the tiny checkpoint.
        folder: scratch.
        home: see :func:`tests.attack.target.make_home`.
        end: ``time.monotonic()`` after which no further case is begun.
        count: about so many cases instead of all.
    """
    tally = Tally("HTTP", "requests", DEMANDED if count is None else count)
    with Target(model, folder, home, tally) as target:
        previous = target.client.config()["config"]
        canary = Canary(target, tally)
        found = cases(seed, target.port, folder / "nowhere")
        with canary:
            _send_all(found if count is None else sample(found, count), target, tally, end)
        _restore(target, previous)
        canary.check("after all cases")
        races = RACES if count is None else 8
        _race(random.Random(f"race/{seed}"), target, tally, races, end)
        _restore(target, previous)
        canary.check("after the races, everything restored")
    return tally


class Canary:
    """A greedy request again and again; its tokens may never change. ``with`` sends it beside what goes on."""

    def __init__(self, target: Target, tally: Tally) -> None:
        self._target, self._tally = target, tally
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sing, daemon=True)
        self._tokens = self._ask()[1]

    def __enter__(self) -> Canary:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(120)

    def check(self, when: str) -> None:
        """Once."""
        answer, tokens = self._ask()
        if tokens is not None and tokens == self._tokens:
            self._tally.canaries += 1
        elif answer.status == 0:
            self._tally.add("lost", f"canary {when}", "a good request got no answer")
        elif answer.status in (429, 503) and answer.is_json_error:
            self._tally.canaries += 1  # refused in time and in words, as a full queue may
        else:
            reason = f"a good request got {answer.status}" if tokens is None else "a good request got other tokens"
            self._tally.add("failed", f"canary {when}", f"{reason}\n{answer.body[:300]!r}")

    def _ask(self) -> tuple[Answer, list[int] | None]:
        answer = post(self._target.port, COMPLETIONS, CANARY | {"return_token_ids": True}, timeout_s=60.0)
        return answer, json.loads(answer.body)["choices"][0]["token_ids"] if answer.status == 200 else None

    def _sing(self) -> None:
        while not self._stop.wait(CANARY_INTERVAL_S) and self._target.alive:
            self.check("among the others")


def _send_all(found: Sequence[Case], target: Target, tally: Tally, end: float) -> None:
    """Several clients; the connections that dawdle have clients of their own, so that nobody waits for them."""
    slow = [case for case in found if len(case.parts) > 2]
    quick = [case for case in found if len(case.parts) <= 2]
    dead = threading.Event()

    def send(case: Case) -> None:
        if time.monotonic() > end or dead.is_set():
            return
        answer = _exchange(case, target)
        verdict, reason = judge(case, answer)
        if verdict != "served" and (not answer.status or answer.status >= 500) and target.note_death(case.kind):
            dead.set()
        tally.add(verdict, case.kind, reason)  # type: ignore[arg-type]
        if case.kind.startswith("runs:") and answer.status == 202:
            _cancel(target, answer)

    with ThreadPoolExecutor(len(slow) or 1) as dawdlers, ThreadPoolExecutor(CLIENTS) as clients:
        results = [*(dawdlers.submit(send, case) for case in slow), *(clients.submit(send, case) for case in quick)]
    for result in results:
        result.result()


def _exchange(case: Case, target: Target) -> Answer:
    return exchange(
        target.port,
        case.parts,
        timeout_s=case.timeout_s,
        half_close=case.half_close,
        answers=case.answers,
        method=case.method,
    )


def judge(case: Case, answer: Answer) -> tuple[str, str]:
    """(verdict, reason) of one answer."""
    if answer.status == 0:
        if case.expect == "end" and answer.closed:
            return "refused", ""
        return "lost", f"no answer ({'closed' if answer.closed else 'still open'} after {answer.seconds:.0f} s)"
    if answer.count < case.answers:
        return "lost", f"{answer.count} answers of {case.answers}"
    if answer.status >= 500 and answer.status not in (501, 503, 505):
        return "failed", f"HTTP {answer.status}\n{answer.body[:300]!r}"
    if answer.status >= 400:
        plain = case.expect == "end" or case.method in ("HEAD", "BREW", "get", "TRACE")
        if not plain and not answer.is_json_error:
            return "failed", f"HTTP {answer.status} without an error in JSON\n{answer.body[:300]!r}"
        return "refused", ""
    if case.expect == "error":
        return "failed", f"HTTP {answer.status} where it had to be refused\n{answer.body[:200]!r}"
    return _judge_served(answer)


def _judge_served(answer: Answer) -> tuple[str, str]:
    kind = answer.headers.get("content-type", "")
    if kind.startswith("text/event-stream"):
        whole = b"data: [DONE]" in answer.body
        return ("served", "") if whole else ("failed", f"a stream without [DONE]\n{answer.body[-200:]!r}")
    if kind.startswith("application/json") and answer.body:
        try:
            json.loads(answer.body, parse_constant=_no_json)
        except ValueError as problem:
            return "failed", f"an answer that is no JSON: {problem}\n{answer.body[:200]!r}"
    return "served", ""


def _no_json(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _cancel(target: Target, answer: Answer) -> None:
    job = json.loads(answer.body)["job_id"]
    head = [("Authorization", f"Bearer {TOKEN}")]
    data = request("DELETE", f"/admin/runs/{job}", headers=head, port=target.port)
    exchange(target.port, [(0.0, data)], method="DELETE")


def _restore(target: Target, config: dict[str, Any]) -> None:
    """The knobs as they were, whatever the cases that were served did to them."""
    if not target.steps():
        return
    live = {spec["name"] for spec in target.client.config()["knobs"] if spec["tier"] != "reload"}
    wanted = {name: value for name, value in config.items() if name in live}
    _patch(target, wanted, timeout_s=120.0)


def _patch(target: Target, changes: dict[str, Any], timeout_s: float) -> Answer:
    head = [("Authorization", f"Bearer {TOKEN}")]
    data = request("PATCH", "/admin/config", json.dumps(changes).encode(), head, port=target.port)
    return exchange(target.port, [(0.0, data)], timeout_s=timeout_s, method="PATCH")


def _race(draw: random.Random, target: Target, tally: Tally, races: int, end: float) -> None:
    """Weights and cache formats change while requests of all lengths come in: each gets an answer all the same."""

    def ask(number: int) -> None:
        prompt = [number % 250] * draw.choice((1, 9, 60, 300))
        document = {"prompt": prompt, "max_tokens": draw.choice((1, 8, 60)), "temperature": draw.choice((0, 1))}
        _add(f"race: request {number}", post(target.port, COMPLETIONS, document, timeout_s=90.0))

    def change(number: int) -> None:
        changes = draw.choice(RACE_CHANGES)
        _add(f"race: {changes} {number}", _patch(target, changes, timeout_s=120.0))

    def _add(kind: str, answer: Answer) -> None:
        verdict, reason = judge(Case(kind, ()), answer)
        if verdict != "served" and (not answer.status or answer.status >= 500):
            target.note_death(kind)
        tally.add(verdict, kind, reason)  # type: ignore[arg-type]

    tasks: list[tuple[Callable[[int], None], int]] = []
    for number in range(races):
        tasks += [(ask, 6 * number + part) for part in range(6)] + [(change, number)]
    with ThreadPoolExecutor(CLIENTS) as clients:
        results = [clients.submit(do, number) for do, number in tasks if time.monotonic() < end]
    for result in results:
        result.result()
