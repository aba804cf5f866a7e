"""Our engine, stepped directly (no HTTP), as one peer among the others."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import time
from typing import Any

import torch

from engine.config import EngineConfig
from engine.core import Engine
from engine.measure.provenance import versions
from engine.reconfigure import reconfigure
from engine.sampling.params import SamplingParams
from engine.status import path_of, take_status
from tests.benchmarks.peers.protocol import Order, Request, Timing, UnsupportedError, Work, drive, serve, shared_prefix
from tests.benchmarks.settings import label, shared_knobs

PREPARATION_TIMEOUT_S = 300.0


class Headroom:
    """An engine with one setting; a workload's variant changes live knobs for one run.

    Options are knobs of ``engine/config.py``.
    """

    def __init__(self, order: Order) -> None:
        self._shared = {"model": order.gguf or order.checkpoint} | shared_knobs(order.device, order.threads)
        self.engine = Engine.load(EngineConfig.from_mapping(self._shared | order.options))
        self._indices: dict[str, int] = {}
        self._count = 0

    def versions(self) -> dict[str, str]:
        return versions()

    def path(self) -> dict[str, str]:
        own = {name: value for name, value in self.engine.config.to_dict().items() if name not in self._shared}
        size = take_status(self.engine).memory.weights
        return path_of(self.engine) | {"weights_bytes": str(size), "knobs": label(own)}

    def warm_up(self, work: Work) -> None:
        """Run the warm-up requests with the execution mode ready; keep only a prefix that is meant to be kept."""
        self._await_preparation()
        self._run_with(work, work.warmup, one_by_one=False)
        self.engine.reset_prefix_cache()
        if shared_prefix(work):
            self._run_with(work, work.warmup[:1], one_by_one=True)

    def run(self, work: Work) -> list[Timing]:
        return self._run_with(work, work.requests, one_by_one=work.one_by_one)

    def _run_with(self, work: Work, requests: list[Request], *, one_by_one: bool) -> list[Timing]:
        previous = {name: getattr(self.engine.config, name) for name in work.changes}
        reconfigure(self.engine, work.changes)
        try:
            return drive(self, requests, one_by_one=one_by_one)
        finally:
            reconfigure(self.engine, previous)

    def _await_preparation(self) -> None:
        """Wait for what an execution mode prepares beside the running engine; the path tells what became of it."""
        deadline = time.monotonic() + PREPARATION_TIMEOUT_S
        while self._preparing() and time.monotonic() < deadline:
            time.sleep(0.2)

    def _preparing(self) -> bool:
        execution: Any = getattr(take_status(self.engine), "execution", None)
        return isinstance(execution, dict) and execution.get("preparing") is not None

    # -- Stepper -----------------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        self._count += 1
        name = str(self._count)
        self._indices[name] = request.index
        params = SamplingParams(max_tokens=request.output_tokens, temperature=0.0, ignore_eos=True)
        self.engine.add_request(name, request.prompt_token_ids, params)

    def step(self) -> list[tuple[int, int]]:
        news = []
        for output in self.engine.step():
            if output.finish_reason == "error":
                raise RuntimeError(output.error)
            news.append((self._indices[output.request_id], len(output.new_token_ids)))
        return news

    def unfinished(self) -> bool:
        return self.engine.has_unfinished()


def load(order: Order) -> Headroom:
    """Load the model."""
    if order.device == "cuda" and not torch.cuda.is_available():
        raise UnsupportedError("there is no CUDA device")
    return Headroom(order)


if __name__ == "__main__":
    serve(load)
