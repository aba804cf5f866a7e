"""Minutes of anything: random arrivals, lengths, priorities, cancellations, toggles and swaps on a small cache.

    python -m tests.soak [--minutes 10] [--seed 0]      (make soak)

Exits with 1 unless, at the end, no request is stuck, every block is back, the invariants held whenever they were
checked, every request that saw no other weights and no other cache got exactly its tokens, and the resident memory is
within 2 % of what it was after the warm-up (one fifth of the time, and until the log of steps, which is of bounded
length, is full).
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import psutil
import torch

from engine.batching.step_log import STEPS_KEPT
from engine.core import Engine
from engine.models import load_model
from engine.outputs import RequestOutput
from engine.reconfigure import reconfigure
from engine.sampling.params import SamplingParams
from engine.worker.loop import EngineLoop
from tests.conftest import save_tiny_llama
from tests.core.toggles import LOSSLESS
from tests.support import engine_with_blocks

BLOCKS, BLOCK_SIZE = 60, 4
PROMPTS, LONGEST_OUTPUT = 40, 48
MAX_IN_FLIGHT = 40
STUCK_S = 120.0
FLAT = 0.02
SWAPS = [
    {"weights": "int8"},
    {"weights": "w4a8"},
    {"weights": "int4"},
    {"kv_dtype": "int8"},
    {"kv_dtype": "fp8"},
    {"kv_dtype": "int4"},
]
LIMITS = [{"token_budget": 7}, {"token_budget": 64}, {"max_running": 3}, {"max_running": 16}]


@dataclasses.dataclass
class Flight:
    """A request under way; ``exact`` and ``swaps`` tell which weights and cache it was submitted to."""

    prompt: int
    max_tokens: int
    submitted: float
    swaps: int
    exact: bool
    cancelled: bool = False


@dataclasses.dataclass
class Outcome:
    """What happened."""

    requests: int = 0
    finished: int = 0
    cancelled: int = 0
    compared: int = 0
    wrong: int = 0
    failed: int = 0
    toggles: int = 0
    swaps: int = 0
    resets: int = 0
    checks: int = 0
    slowest_s: float = 0.0


class Soak:
    """Drives one engine through its loop, as many clients and an impatient operator would.

    Args:
        engine: not used by anybody else.
        prompts: to choose from.
        expected: greedy tokens of each prompt, ``LONGEST_OUTPUT`` of them.
    """

    def __init__(self, engine: Engine, prompts: list[list[int]], expected: list[list[int]], seed: int) -> None:
        self.loop = EngineLoop(engine)
        self.outcome = Outcome()
        self.resident: list[tuple[float, int]] = []
        self.warm_since: float | None = None
        self._prompts, self._expected = prompts, expected
        self._random = random.Random(seed)
        self._flights: dict[str, Flight] = {}
        self._lock = threading.Lock()
        self._swaps = 0
        self._exact = True
        self._process = psutil.Process()

    def run(self, seconds: float) -> None:
        """Keep it busy, then let it finish what it has."""
        self.loop.start()
        began = time.monotonic()
        looked = 0.0
        while (now := time.monotonic() - began) < seconds and self.loop.alive:
            self._act()
            if now - looked >= 1.0:
                looked = now
                self._look(now, seconds)
            time.sleep(self._random.expovariate(1 / 0.004))
        deadline = time.monotonic() + STUCK_S
        while self._flights and time.monotonic() < deadline:
            time.sleep(0.05)
        self.loop.call(lambda engine: engine.check_invariants())

    @property
    def stuck(self) -> int:
        """Requests that have not come to an end."""
        return len(self._flights)

    def growth(self) -> float:
        """Resident memory of the last tenth of the time over that of the first tenth after the warm-up, minus 1."""
        warm = [size for at, size in self.resident if self.warm_since is not None and at >= self.warm_since]
        tenth = max(len(warm) // 10, 1)
        return statistics.median(warm[-tenth:]) / statistics.median(warm[:tenth]) - 1 if warm else float("nan")

    def _act(self) -> None:
        draw = self._random.random()
        if draw < 0.5:
            for _ in range(self._random.randrange(1, 5)):
                self._submit()
        elif draw < 0.6:
            self._cancel()
        elif draw < 0.7:
            self.loop.reconfigure(self._random.choice(LOSSLESS + LIMITS))
            self.outcome.toggles += 1
        elif draw < 0.71:
            self._swap()
        elif draw < 0.715:
            self.loop.call(lambda engine: engine.reset_prefix_cache())
            self.outcome.resets += 1

    def _submit(self) -> None:
        with self._lock:
            if len(self._flights) >= MAX_IN_FLIGHT:
                return
            prompt, count = self._random.randrange(PROMPTS), self._random.randrange(1, LONGEST_OUTPUT)
            self.outcome.requests += 1
            name = f"r{self.outcome.requests}"
            self._flights[name] = Flight(prompt, count, time.monotonic(), self._swaps, self._exact)
        params = SamplingParams(max_tokens=count, ignore_eos=True)
        priority = self._random.randrange(3)
        self.loop.submit(self._prompts[prompt], params, on_output=self._receive, request_id=name, priority=priority)

    def _cancel(self) -> None:
        with self._lock:
            if not self._flights:
                return
            name = self._random.choice(sorted(self._flights))
            self._flights[name].cancelled = True
        self.loop.abort(name)

    def _swap(self) -> None:
        back = not self._exact
        change = {"weights": "model", "kv_dtype": "model"} if back else self._random.choice(SWAPS)
        self._now_exact(False)  # whoever is submitted from now on may see both
        self.loop.reconfigure(change)
        self._now_exact(back)
        self.outcome.swaps += 1

    def _now_exact(self, exact: bool) -> None:
        with self._lock:
            self._swaps += 1
            self._exact = exact

    def _receive(self, output: RequestOutput) -> None:
        if not output.finished:
            return
        with self._lock:
            flight = self._flights.pop(output.request_id)
            untouched = flight.exact and flight.swaps == self._swaps
        outcome = self.outcome
        outcome.slowest_s = max(outcome.slowest_s, time.monotonic() - flight.submitted)
        if output.finish_reason == "length":
            outcome.finished += 1
            outcome.wrong += len(output.token_ids) != flight.max_tokens
        elif output.finish_reason == "abort" and flight.cancelled:
            outcome.cancelled += 1
        else:
            outcome.failed += 1
        if untouched:
            outcome.compared += 1
            outcome.wrong += output.token_ids != self._expected[flight.prompt][: len(output.token_ids)]

    def _look(self, now: float, seconds: float) -> None:
        self.resident.append((now, self._process.memory_info().rss))
        self.loop.call(lambda engine: engine.check_invariants())
        self.outcome.checks += 1
        if self.warm_since is None and now >= seconds / 5 and self.loop.engine.steps.last_index >= STEPS_KEPT:
            self.warm_since = now


def make_prompts(generator: random.Random) -> list[list[int]]:
    """Prompts that share beginnings of every length and repeat themselves."""
    stems = [[generator.randrange(256) for _ in range(8)] * 4 for _ in range(4)]
    tails = [[generator.randrange(256) for _ in range(generator.randrange(1, 20))] for _ in range(PROMPTS)]
    return [generator.choice(stems)[: generator.randrange(0, 33)] + tail for tail in tails]


def expected_outputs(engine: Engine, prompts: list[list[int]]) -> list[list[int]]:
    """What an engine without any optimization gives for each prompt alone."""
    reconfigure(engine, {"attention": "reference", "prefix_cache": False, "max_running": 1})
    results: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        engine.add_request(str(index), prompt, SamplingParams(max_tokens=LONGEST_OUTPUT, ignore_eos=True))
    while engine.has_unfinished():
        results.update({output.request_id: output.token_ids for output in engine.step() if output.finished})
    return [results[str(index)] for index in range(len(prompts))]


def report(soak: Soak) -> bool:
    """Print the table; True if everything is as it should be."""
    engine, outcome = soak.loop.engine, soak.outcome
    totals, pool = engine.totals, engine.scheduler.pool
    growth = soak.growth()
    rows: list[tuple[str, Any, bool]] = [
        ("requests", outcome.requests, outcome.requests > 0),
        ("finished / cancelled", f"{outcome.finished} / {outcome.cancelled}", outcome.finished > 0),
        ("failed", outcome.failed, outcome.failed == 0),
        ("stuck", soak.stuck, soak.stuck == 0),
        ("slowest request, s", f"{outcome.slowest_s:.1f}", outcome.slowest_s < STUCK_S),
        ("compared with the reference / wrong", f"{outcome.compared} / {outcome.wrong}", outcome.wrong == 0),
        ("toggles, swaps, resets", f"{outcome.toggles}, {outcome.swaps}, {outcome.resets}", outcome.swaps > 0),
        ("steps, preemptions", f"{soak.loop.engine.steps.last_index + 1}, {totals['preemptions']}", True),
        ("prefix-hit tokens", totals["prefix_hit_tokens"], totals["prefix_hit_tokens"] > 0),
        ("accepted draft tokens", totals["accepted_tokens"], totals["accepted_tokens"] > 0),
        ("invariants checked", outcome.checks, outcome.checks > 0),
        ("blocks back", f"{pool.num_free} of {pool.num_blocks}", pool.num_free == pool.num_blocks),
        ("resident MiB at the end", f"{soak.resident[-1][1] / 2**20:.1f}", True),
        ("growth after the warm-up", f"{100 * growth:+.2f} %", growth <= FLAT),
    ]
    for name, value, good in rows:
        print(f"{name:<38} {value!s:>16}  {'ok' if good else 'FAILED'}")
    return all(good for _, _, good in rows)


def main() -> int:
    """Run it; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # a tiny model: waking a second thread costs more than it computes
    with tempfile.TemporaryDirectory() as folder:
        path = str(save_tiny_llama(Path(folder)))
        prompts = make_prompts(random.Random(arguments.seed))
        plain = load_model(path, dtype="float32", device="cpu")
        expected = expected_outputs(engine_with_blocks(plain, 2 * BLOCKS, block_size=BLOCK_SIZE), prompts)
        model = load_model(path, dtype="float32", device="cpu")
        engine = engine_with_blocks(model, BLOCKS, block_size=BLOCK_SIZE, max_num_seqs=16)
        soak = Soak(engine, prompts, expected, arguments.seed)
        soak.run(60 * arguments.minutes)
        good = report(soak) and soak.loop.alive
        soak.loop.stop()
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
