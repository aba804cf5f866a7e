"""vLLM's CPU backend as a peer, through its engine's own ``add_request`` and ``step``.

Options: dtype ("bfloat16" or "float32"), and any argument of ``vllm.EngineArgs``.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
from pathlib import Path
from typing import Any

from tests.benchmarks.peers.protocol import Order, Request, Timing, UnsupportedError, Work, drive, serve, shared_prefix

KV_CACHE_GIB = 4
"""Room for 64 sequences of 1024 tokens in float32; the prompts of no workload are ever put back."""


def environment(threads: int) -> dict[str, str]:
    """What vLLM's CPU documentation recommends: a fixed cache size and threads bound to cores, none left to others."""
    cores = sorted(os.sched_getaffinity(0))[:threads]
    return {
        "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB),
        "VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}-{cores[-1]}" if len(cores) > 1 else str(cores[0]),
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process: on so few cores a second one only competes with the first
        "VLLM_USE_AOT_COMPILE": "0",  # its saved form fails to load again, and every start would compile for minutes
        "VLLM_CACHE_ROOT": str(Path(sys.prefix) / "cache"),  # what it compiles goes when its environment goes
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": "1",
    }


class VllmCpu:
    """A vLLM engine."""

    def __init__(self, order: Order) -> None:
        os.environ.update({name: value for name, value in environment(order.threads).items() if name not in os.environ})
        from vllm import EngineArgs, LLMEngine, SamplingParams

        options = {"dtype": "bfloat16", "max_model_len": 4096, "max_num_seqs": 64} | order.options
        self.options = options
        self.engine: Any = LLMEngine.from_engine_args(EngineArgs(model=order.checkpoint, **options))
        self._sampling: Any = SamplingParams
        self._seen: dict[str, int] = {}
        self._indices: dict[str, int] = {}
        self._count = 0

    def versions(self) -> dict[str, str]:
        found = {}
        for name in ("vllm-cpu", "vllm", "torch", "transformers"):
            try:
                found[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
        return found

    def path(self) -> dict[str, str]:
        names = ("VLLM_CPU_KVCACHE_SPACE", "VLLM_CPU_OMP_THREADS_BIND", "VLLM_ENABLE_V1_MULTIPROCESSING")
        return {name: str(value) for name, value in self.options.items()} | {name: os.environ[name] for name in names}

    def warm_up(self, work: Work) -> None:
        drive(self, work.warmup)
        self.engine.reset_prefix_cache()
        if shared_prefix(work):
            drive(self, work.warmup[:1])

    def run(self, work: Work) -> list[Timing]:
        if work.changes:
            raise UnsupportedError("its settings are fixed when it is loaded")
        return drive(self, work.requests, one_by_one=work.one_by_one)

    # -- Stepper -----------------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        self._count += 1
        name = str(self._count)
        self._indices[name] = request.index
        params = self._sampling(
            temperature=0.0,
            max_tokens=request.output_tokens,
            min_tokens=request.output_tokens,
            ignore_eos=True,
            detokenize=False,
        )
        self.engine.add_request(name, {"prompt_token_ids": request.prompt_token_ids}, params)

    def step(self) -> list[tuple[int, int]]:
        news = []
        for output in self.engine.step():
            total, name = len(output.outputs[0].token_ids), self._name(output.request_id)
            news.append((self._indices[name], total - self._seen.get(name, 0)))
            self._seen[name] = total
        return news

    def unfinished(self) -> bool:
        return bool(self.engine.has_unfinished_requests())

    def _name(self, request_id: str) -> str:
        """Our id: newer versions append a suffix of their own."""
        return request_id if request_id in self._indices else request_id.partition("-")[0]


if __name__ == "__main__":
    serve(VllmCpu)
