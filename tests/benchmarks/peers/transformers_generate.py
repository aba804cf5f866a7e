"""transformers as a peer: ``generate`` in static batches padded left, or its own continuous batching.

Options:
    dtype: "float32" or "bfloat16".
    batching: "static" (``generate``) or "continuous" (``ContinuousBatchingManager``).
    cache: "dynamic", or "static" (fixed shapes, which ``generate`` compiles on a GPU).
    compile: with a static cache, compile also where ``generate`` would not by itself (the CPU).
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import importlib.metadata
import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, CompileConfig, ContinuousBatchingConfig, GenerationConfig

from tests.benchmarks.peers.protocol import Order, Request, Timing, UnsupportedError, Work, drive_static, serve

BATCH_LIMIT = 64
PAGE_SIZE = 32
NO_TOKEN = -1


class Transformers:
    """One model in one dtype."""

    def __init__(self, order: Order) -> None:
        torch.set_num_threads(order.threads)
        self.options = {"dtype": "bfloat16", "batching": "static", "cache": "dynamic", "compile": False} | order.options
        dtype = getattr(torch, self.options["dtype"])
        self.model: Any = AutoModelForCausalLM.from_pretrained(order.checkpoint, dtype=dtype).to(order.device).eval()
        self.device = order.device
        # nothing ends a generation but its length, and no logits processor is needed to see to it
        self.model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)

    def versions(self) -> dict[str, str]:
        return {name: importlib.metadata.version(name) for name in ("transformers", "torch")}

    def path(self) -> dict[str, str]:
        parameters = list(self.model.parameters())
        return {
            "dtype": self.options["dtype"],
            "attention": str(self.model.config._attn_implementation),
            "batching": self.options["batching"],
            "cache": self.options["cache"],
            "threads": str(torch.get_num_threads()),
            "weights_bytes": str(sum(p.numel() * p.element_size() for p in parameters)),
        }

    def warm_up(self, work: Work) -> None:
        # a compiled static cache has one shape a batch and length: only the workload itself warms it up
        fixed = self.options["cache"] == "static"
        self.run(Work(work.name, False, work.requests if fixed else work.warmup, []))

    def run(self, work: Work) -> list[Timing]:
        if work.changes:
            raise UnsupportedError("it has no such setting")
        if self.options["batching"] == "continuous":  # computes in a thread of its own, without inference mode
            return self._run_continuous(work)
        with torch.inference_mode():
            return drive_static(self._generate, work.requests, BATCH_LIMIT, work.one_by_one)

    def _generate(self, batch: Sequence[Request]) -> list[float]:
        """Moments at which the i-th token of the batch became known."""
        longest = max(len(request.prompt_token_ids) for request in batch)
        ids = torch.zeros((len(batch), longest), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(batch):
            length = len(request.prompt_token_ids)
            ids[row, longest - length :] = torch.tensor(request.prompt_token_ids)
            mask[row, longest - length :] = 1
        moments: list[float] = []

        def watch(input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            if input_ids.is_cuda:
                torch.cuda.synchronize()
            moments.append(time.perf_counter())
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

        self.model.generate(
            ids.to(self.device),
            attention_mask=mask.to(self.device),
            max_new_tokens=max(request.output_tokens for request in batch),
            stopping_criteria=[watch],
            **self._cache_arguments(),
        )
        return moments

    def _cache_arguments(self) -> dict[str, Any]:
        if self.options["cache"] != "static":
            return {}
        arguments: dict[str, Any] = {"cache_implementation": "static"}
        if self.options["compile"]:
            config = CompileConfig(mode="reduce-overhead" if self.device == "cuda" else "default")
            config._compile_all_devices = True  # the only way to have `generate` compile on a CPU
            arguments["compile_config"] = config
        return arguments

    def _run_continuous(self, work: Work) -> list[Timing]:
        if work.one_by_one:
            raise UnsupportedError("requests one by one gain nothing from continuous batching")
        tokens = [len(request.prompt_token_ids) + request.output_tokens for request in work.requests]
        config = ContinuousBatchingConfig(
            page_size=PAGE_SIZE,
            num_blocks=sum(-(-count // PAGE_SIZE) for count in tokens) + 1,  # masked attention reads all of the cache
            max_batch_tokens=512,
            max_requests_per_batch=BATCH_LIMIT,
        )
        with self.model.continuous_batching_context_manager(
            generation_config=GenerationConfig(do_sample=False, eos_token_id=NO_TOKEN, pad_token_id=0),
            continuous_batching_config=config,
        ) as manager:
            return _drive_manager(manager, work.requests)


def _drive_manager(manager: Any, requests: Sequence[Request]) -> list[Timing]:
    start = time.perf_counter()
    results: dict[str, Any] = {}
    for request in requests:
        time.sleep(max(0.0, request.arrival_s - (time.perf_counter() - start)))
        manager.add_request(
            request.prompt_token_ids,
            request_id=str(request.index),
            max_new_tokens=request.output_tokens,
            record_timestamps=True,
            eos_token_id=NO_TOKEN,
        )
    while len(results) < len(requests):
        result = manager.get_result(timeout=1)
        if result is None and not manager.is_running():
            raise RuntimeError("its generation thread ended")
        if result is not None and result.is_finished():
            if result.error is not None:
                raise RuntimeError(result.error)
            results[result.request_id] = result
    return [
        Timing(request.index, request.arrival_s, [moment - start for moment in results[str(request.index)].timestamps])
        for request in requests
    ]


if __name__ == "__main__":
    serve(Transformers)
