"""A peer that computes nothing: for the tests of the protocol, and of how a failing process is reported."""

from __future__ import annotations

import os
import time
from collections import deque

from tests.benchmarks.peers.protocol import Order, Request, Timing, UnsupportedError, Work, drive, serve


class FakePeer:
    """Two sequences at a time, one token a step each."""

    SLOTS = 2

    def __init__(self, order: Order) -> None:
        if order.options.get("die_at_load"):
            raise RuntimeError("this machine lacks an instruction set")
        time.sleep(order.options.get("hang_s", 0.0))
        self.options = order.options
        self.queue: deque[list[int]] = deque()
        self.warmed: list[int] = []

    def versions(self) -> dict[str, str]:
        return {"fake": "1.0"}

    def path(self) -> dict[str, str]:
        return {"weights_bytes": "1000", "warmed": str(len(self.warmed))}

    def warm_up(self, work: Work) -> None:
        self.warmed = [timing.index for timing in drive(self, work.warmup)]

    def run(self, work: Work) -> list[Timing]:
        if work.changes:
            raise UnsupportedError("it has no knobs")
        if work.name == self.options.get("die_at"):
            os._exit(3)
        return drive(self, work.requests, one_by_one=work.one_by_one)

    def add(self, request: Request) -> None:
        short = bool(self.options.get("short"))
        self.queue.append([request.index, request.output_tokens - short])

    def step(self) -> list[tuple[int, int]]:
        running = [self.queue[slot] for slot in range(min(self.SLOTS, len(self.queue)))]
        for entry in running:
            entry[1] -= 1
        self.queue = deque(entry for entry in self.queue if entry[1] > 0)
        return [(entry[0], 1) for entry in running]

    def unfinished(self) -> bool:
        return bool(self.queue)


if __name__ == "__main__":
    serve(FakePeer)
