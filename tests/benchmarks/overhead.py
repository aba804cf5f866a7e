"""What Python costs a step: the whole engine around a decoder that computes nothing.

Scheduling, the tensors of the step, sampling, detokenizing, commit and statistics are the real ones; the decoder's
forward pass is a stub that gives every position the logits of one token out of 64, so that what is left is the time
that Python, and not the model, takes. The bar: below 150 µs and 5 µs for each sequence for schedule, prepare and
commit together. Sampling (choosing 1 of 64 logits) is listed by itself.

    python -m tests.benchmarks.overhead [--steps 300] [--prompt-tokens 512] [--speculation ngram]
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import time
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

from engine.config import DEFAULT_MODEL, EngineConfig
from engine.core import Engine
from engine.models import load_model
from engine.sampling.params import SamplingParams

BATCHES = (1, 8, 32, 128)
LOGITS = 64
WARM_UP = 20
BAR_US, BAR_US_PER_SEQUENCE = 150.0, 5.0


class StubDecoder:
    """Stands for the decoder: everything but the forward pass and the logits is the real one's."""

    def __init__(self, decoder: Any, rows: int) -> None:
        self._decoder = decoder
        self._hidden = torch.zeros(rows, 1)
        generator = torch.Generator().manual_seed(0)
        self._logits = torch.randn(rows, LOGITS, generator=generator)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decoder, name)

    def __call__(self, token_ids: torch.Tensor, *others: Any) -> torch.Tensor:
        return self._hidden[: len(token_ids)]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """One row a position, of a vocabulary so small that choosing from it costs next to nothing."""
        return self._logits[: len(hidden)]


def measure(model: Any, batch: int, steps: int, prompt_tokens: int, knobs: dict[str, Any]) -> dict[str, float]:
    """Median microseconds of each part of a decode step with ``batch`` sequences."""
    config = EngineConfig.from_mapping(
        {"max_num_seqs": 128, "max_running": 128, "token_budget": 2048, "memory_limit_gib": 8, "linear": "torch"}
        | knobs
    )
    instance = Engine(model, config)
    for index in range(batch):
        prompt = [100 + (index * 7 + position) % 1000 for position in range(prompt_tokens)]
        params = SamplingParams(max_tokens=steps + WARM_UP + 200, ignore_eos=True)
        instance.add_request(str(index), prompt, params)
    sampling = time_sampling(instance)
    while any(not request.in_decode for request in [*instance.scheduler.running, *instance.scheduler.waiting]):
        instance.step()
    for _ in range(WARM_UP):
        instance.step()
    sampling.clear()
    first = instance.steps.last_index + 1
    for _ in range(steps):
        instance.step()
    taken = instance.steps.since(first)
    sampled = statistics.median(sampling) * 1e6
    return {
        "schedule": statistics.median(step.schedule_ms for step in taken) * 1e3,
        "prepare": statistics.median(step.model_ms for step in taken) * 1e3,
        "commit": statistics.median(step.sample_ms for step in taken) * 1e3 - sampled,
        "sample": sampled,
    }


def time_sampling(instance: Engine) -> list[float]:
    """Seconds of every call of the sampler from now on."""
    taken: list[float] = []
    original = instance.kernels.sample

    def timed(*arguments: Any) -> Any:
        began = time.perf_counter()
        result = original(*arguments)
        taken.append(time.perf_counter() - began)
        return result

    instance.kernels = dataclasses.replace(instance.kernels, sample=timed)
    return taken


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--speculation", default="off")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = load_model(DEFAULT_MODEL, dtype="float32", device="cpu")
    model.decoder = StubDecoder(model.decoder, 4096)  # type: ignore[assignment]
    print(f"{arguments.prompt_tokens} prompt tokens, {arguments.steps} steps, median µs per step")
    print(f"{'batch':>5} {'schedule':>9} {'prepare':>8} {'commit':>7} {'together':>9} {'bar':>6}   {'sample':>6}")
    for batch in BATCHES:
        parts = measure(model, batch, arguments.steps, arguments.prompt_tokens, {"speculation": arguments.speculation})
        together = parts["schedule"] + parts["prepare"] + parts["commit"]
        bar = BAR_US + BAR_US_PER_SEQUENCE * batch
        print(
            f"{batch:>5} {parts['schedule']:>9.0f} {parts['prepare']:>8.0f} {parts['commit']:>7.0f} {together:>9.0f} "
            f"{bar:>6.0f}   {parts['sample']:>6.0f}"
        )


if __name__ == "__main__":
    main()
