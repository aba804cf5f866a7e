"""Streams: two hundred at once, some cut at random, some read slowly, and a SIGTERM in the midst of the last of them.

Each stream that its client does not cut ends with ``data: [DONE]`` or with an error event; the process ends.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from pathlib import Path
from typing import Literal

from tests.attack.outcome import Tally
from tests.attack.target import Target
from tests.attack.wire import request

DEMANDED = 200
DRAINED = 0.3
PATIENCE_S = 120.0
END_S = 40.0
Manner = Literal["whole", "cut", "slow"]


def attack(seed: int, model: Path, folder: Path, home: Path, end: float, count: int = DEMANDED) -> Tally:
    """Open ``count`` streams, the last third of them shortly before SIGTERM."""
    tally = Tally("streams", "streams", count)
    draw = random.Random(f"streams/{seed}")
    with Target(model, folder, home, tally) as target:
        drained = max(1, round(DRAINED * count))
        asyncio.run(_many(target, tally, [_manner(draw) for _ in range(count - drained)], draw, terminate=False))
        target.note_death("after the streams")
        if target.alive and time.monotonic() < end:
            asyncio.run(_many(target, tally, ["whole"] * drained, draw, terminate=True))
            code = target.wait(END_S)
            if code != 0:
                tally.add("failed", "SIGTERM", f"the worker's exit code was {code} within {END_S:.0f} s")
    return tally


def _manner(draw: random.Random) -> Manner:
    return draw.choices(("whole", "cut", "slow"), (5, 3, 2))[0]  # type: ignore[return-value]


async def _many(target: Target, tally: Tally, manners: list[Manner], draw: random.Random, *, terminate: bool) -> None:
    tasks = [
        asyncio.create_task(_stream(target.port, tally, number, manner, random.Random(draw.random()), long=terminate))
        for number, manner in enumerate(manners)
    ]
    if terminate:
        await asyncio.sleep(0.5)
        target.terminate()
    await asyncio.gather(*tasks)


async def _stream(port: int, tally: Tally, number: int, manner: Manner, draw: random.Random, *, long: bool) -> None:
    what = f"{'drained' if long else manner} stream {number}"
    try:
        async with asyncio.timeout(PATIENCE_S):
            data = await _read(port, number, manner, draw, long=long)
    except TimeoutError:
        tally.add("lost", what, f"it had not ended after {PATIENCE_S:.0f} s")
        return
    except OSError as problem:
        if long:  # came when the door was closed already: never accepted, so nothing is lost
            tally.add("refused", what)
        else:
            tally.add("lost", what, f"{type(problem).__name__}: {problem}")
        return
    verdict, reason = judge(data, manner)
    tally.add(verdict, what, reason)  # type: ignore[arg-type]


async def _read(port: int, number: int, manner: Manner, draw: random.Random, *, long: bool) -> bytes:
    """Everything that came; a client that cuts stops after some of it."""
    length = 440 if long else draw.choice((1, 5, 40, 200, 400))
    body = {"prompt": [number % 250] * draw.choice((1, 10, 60)), "max_tokens": length, "stream": True}
    body |= {"ignore_eos": True, "temperature": draw.choice((0, 1)), "n": draw.choice((1, 1, 1, 3))}
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request("POST", "/v1/completions", json.dumps(body).encode(), port=port))
        await writer.drain()
        if manner == "cut" and draw.random() < 0.3:
            return b""  # before anything came
        data = bytearray()
        stop_after = draw.randrange(1, 20_000) if manner == "cut" else None
        while piece := await reader.read(256 if manner == "slow" else 65_536):
            data += piece
            if stop_after is not None and len(data) >= stop_after:
                break
            if manner == "slow":
                await asyncio.sleep(draw.uniform(0.0, 0.05))
        return bytes(data)
    finally:
        writer.close()


def judge(data: bytes, manner: Manner) -> tuple[str, str]:
    """(verdict, reason) of what a stream's client received."""
    if manner == "cut":
        return "served", ""
    head, _, body = data.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 "):
        return "lost", "no answer"
    status = int(head.split()[1])
    if status in (429, 503) and b'"message"' in body:
        return "refused", ""
    if status != 200:
        return "failed", f"HTTP {status}\n{body[:300]!r}"
    if b"data: [DONE]" in body or b'"error"' in body:
        return "served", ""
    return "lost", f"a stream broke off without [DONE] or an error\n{body[-200:]!r}"
