"""OpenVINO GenAI as a peer, through ``add_request`` and ``step`` of its continuous batching pipeline.

It reads the GGUF file itself: Q4_1 becomes unsigned INT4 with scale and zero point for each group of 32, Q8_0 (the tied
embedding and head) INT8. What the CPU plugin computes in where an option does not say otherwise (on AVX2: float32
products, activations quantized in groups, a KV cache of 8 bits) stands in ``path``.

Options: properties of the CPU plugin in capitals, e.g. ``KV_CACHE_PRECISION`` ("f32", "u8"),
``DYNAMIC_QUANTIZATION_GROUP_SIZE`` (0: activations stay as they are); and ``weights``, which names what the file holds.
"""

from __future__ import annotations

import importlib.metadata
from typing import Any

from tests.benchmarks.peers.protocol import Order, Request, Timing, UnsupportedError, Work, drive, serve, shared_prefix

KV_CACHE_GIB = 4
MAX_SEQUENCES = 64
MAX_BATCHED_TOKENS = 2048
SHOWN = ("INFERENCE_PRECISION_HINT", "KV_CACHE_PRECISION", "DYNAMIC_QUANTIZATION_GROUP_SIZE", "INFERENCE_NUM_THREADS")


class OpenVinoGenAi:
    """A pipeline with a paged cache, stepped by hand."""

    def __init__(self, order: Order) -> None:
        if not order.gguf:
            raise UnsupportedError("it is measured on the GGUF file, and there is none of this shape")
        import numpy
        import openvino
        import openvino_genai

        self._genai: Any = openvino_genai
        self._tensor: Any = openvino.Tensor
        self._numpy: Any = numpy
        self.options = order.options
        properties = {name: value for name, value in order.options.items() if name.isupper()}
        properties |= {"INFERENCE_NUM_THREADS": order.threads, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
        core = openvino.Core()
        core.set_property("CPU", properties)
        self._runs_with = {name: str(core.get_property("CPU", name)) for name in SHOWN}
        self.pipeline: Any = openvino_genai.ContinuousBatchingPipeline(order.gguf, self._scheduler(), "CPU", properties)
        self._flights: dict[int, tuple[Request, Any]] = {}
        self._count = 0

    def _scheduler(self) -> Any:
        scheduler = self._genai.SchedulerConfig()
        scheduler.cache_size = KV_CACHE_GIB
        scheduler.max_num_seqs = MAX_SEQUENCES
        scheduler.max_num_batched_tokens = MAX_BATCHED_TOKENS
        scheduler.dynamic_split_fuse = True
        scheduler.enable_prefix_caching = bool(self.options.get("prefix_cache", True))
        return scheduler

    def versions(self) -> dict[str, str]:
        return {name: importlib.metadata.version(name) for name in ("openvino-genai", "openvino")}

    def path(self) -> dict[str, str]:
        return {name: str(value) for name, value in self.options.items()} | self._runs_with

    def warm_up(self, work: Work) -> None:
        """The warm-up's prompts are others than the workload's, except for a prefix that is meant to be shared."""
        drive(self, work.warmup, one_by_one=len(work.requests) == 1 or work.one_by_one)
        if shared_prefix(work):
            drive(self, work.warmup[:1])

    def run(self, work: Work) -> list[Timing]:
        if work.changes:
            raise UnsupportedError("its settings are fixed when it is loaded")
        return drive(self, work.requests, one_by_one=work.one_by_one)

    # -- Stepper -----------------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        config = self._genai.GenerationConfig()
        config.do_sample, config.ignore_eos = False, True
        config.max_new_tokens = config.min_new_tokens = request.output_tokens
        prompt = self._tensor(self._numpy.array([request.prompt_token_ids], dtype=self._numpy.int64))
        self._count += 1
        self._flights[self._count] = (request, self.pipeline.add_request(self._count, prompt, config))

    def step(self) -> list[tuple[int, int]]:
        self.pipeline.step()
        news = []
        for name, (request, handle) in list(self._flights.items()):
            count = 0
            while handle.can_read():
                count += sum(len(output.generated_ids) for output in handle.read().values())
            if count:
                news.append((request.index, count))
            if handle.get_status() != self._genai.GenerationStatus.RUNNING:
                del self._flights[name]
        return news

    def unfinished(self) -> bool:
        return bool(self._flights)


if __name__ == "__main__":
    serve(OpenVinoGenAi)
