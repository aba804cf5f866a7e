"""How long a launch takes on the device: replayed from a CUDA graph, with cold caches, the median of many.

What is timed is the device's work, not Python's launching of it: an engine that captures its decode steps pays none of
the latter, and what it costs elsewhere is part of the engine's own measurement.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

FLUSH_BYTES = 256 * 2**20  # more than any level-2 cache
WARM_UPS = 2
MOST_SAMPLES = 60
FEWEST_SAMPLES = 5


def seconds(run: Callable[[], Any], device: torch.device, budget_s: float = 0.4) -> float:
    """Median time of one call.

    Args:
        run: launches work on ``device``; on a CPU it is called three times at most.
        budget_s: about so long is measured; at least :data:`FEWEST_SAMPLES` calls.
    """
    if device.type != "cuda":
        return _host_seconds(run)
    for _ in range(WARM_UPS):
        run()
    torch.cuda.synchronize(device)
    replay = _captured(run) or run
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
    samples: list[float] = []
    end = time.monotonic() + budget_s
    while len(samples) < FEWEST_SAMPLES or (time.monotonic() < end and len(samples) < MOST_SAMPLES):
        samples.append(_one(replay, flush))
    return statistics.median(samples)


def _one(run: Callable[[], Any], flush: torch.Tensor) -> float:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    flush.zero_()  # empties the caches, and gives the host time to enqueue what follows
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3


def _captured(run: Callable[[], Any]) -> Callable[[], None] | None:
    """A replay of ``run``; None if it cannot be captured (a peer that waits for the device)."""
    graph = torch.cuda.CUDAGraph()
    try:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            run()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph.replay


def _host_seconds(run: Callable[[], Any]) -> float:
    samples = []
    for _ in range(2):
        began = time.perf_counter()
        run()
        samples.append(time.perf_counter() - began)
    return min(samples)
