"""Steps that nobody asked for, so that no request waits for a compiler: Triton compiles a kernel at its first launch.

Which kernels a step launches, and with which constants, follows from how many sequences and tokens it has. A few sizes
meet all of them: decodes of 1, 2, 4, … sequences, one long context (its chunks are shared among programs), and prompts
of 2, 4, 8, … tokens up to where larger ones launch nothing else. All of them read and write the *scratch block*, the
one that pads graphs (:mod:`engine.execution.captured_graph`). The head and the sampler follow; every mode has the same.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from typing import Any

import torch

from engine.attention.base import AttentionBackend
from engine.cache.kv_cache import KVCache
from engine.execution.base import Execution, Progress, Step
from engine.execution.environment import ExecutionEnvironment
from engine.execution.step_tensors import build_step_tensors

LARGEST_PROMPT = 1024
"""Tokens from which on every kernel is in its last configuration."""


@dataclasses.dataclass(frozen=True, slots=True)
class WarmUp:
    """The size of a step.

    Attributes:
        sequences: how many.
        tokens_each: computed of each.
        context: tokens of each, those included.
    """

    sequences: int
    tokens_each: int
    context: int

    def label(self) -> str:
        """For progress: ``"a prompt of 64 tokens"``."""
        if self.tokens_each > 1:
            return f"a prompt of {self.tokens_each:,} tokens"
        contexts = f" of {self.context:,} tokens" if self.context > 1 else ""
        return f"{self.sequences} decoding{contexts}"


def warm_ups(max_tokens: int, max_num_seqs: int, max_model_len: int) -> list[WarmUp]:
    """The steps for an engine: prompts, the largest first, then decodes.

    Args:
        max_tokens: of its largest step.
        max_num_seqs: sequences of its largest decode batch.
        max_model_len: tokens of its longest context.
    """
    prompts = [WarmUp(1, tokens, tokens) for tokens in _powers(2, min(max_tokens, max_model_len, LARGEST_PROMPT))]
    decodes = [WarmUp(count, 1, 1) for count in _powers(1, min(max_tokens, max_num_seqs))]
    return [*reversed(prompts), *decodes, WarmUp(1, 1, max_model_len)]


class KernelWarmUp:
    """The steps of one engine, computed one by one between those of its requests.

    Args:
        environment: of the mode.
        attention: the backend.
        run: what computes them.

    Attributes:
        pending: the steps still to come.
    """

    def __init__(self, environment: ExecutionEnvironment, attention: AttentionBackend, run: Execution) -> None:
        self.pending = warm_ups(environment.max_tokens, environment.max_num_seqs, environment.max_model_len)
        self._environment, self._attention, self._run = environment, attention, run
        self._num_done = 0
        self._began = time.perf_counter()

    def run_next(self) -> None:
        """Compute a step for nobody, if one is left."""
        if not self.pending:
            return
        size = self.pending.pop(0)
        try:
            self._compute(size)
        except Exception as error:  # requests go on, and what fails for them is told there
            self.pending.clear()
            text = f"{type(error).__name__}: {error}"
            self._add_event(f"warm-up stopped at {size.label()}: {text}", {"error": text})
            return
        self._num_done += 1
        if not self.pending:
            seconds = time.perf_counter() - self._began
            summary = f"kernels ready: {self._num_done} sizes of a step in {seconds:.1f} s"
            self._add_event(summary, {"seconds": round(seconds, 2)})

    def _compute(self, size: WarmUp) -> None:
        environment = self._environment
        with torch.inference_mode():
            step = warm_up_step(size, environment.cache, self._attention, environment.device)
            environment.enter(step)
            hidden = self._run.forward(step)
            # The head over as many rows as tokens are chosen in a step of that size: of a prompt one.
            logits = environment.decoder.logits(hidden if step.pure_decode else hidden[-1:])
            if logits.shape[0] == 1:
                environment.warm_up_sampler(logits)

    def progress(self) -> Progress:
        """How far it is."""
        current = self.pending[0].label() if self.pending else ""
        return Progress(self._num_done, self._num_done + len(self.pending), current)

    def _add_event(self, summary: str, detail: dict[str, Any]) -> None:
        self._environment.add_event("execution", summary, detail)


def warm_up_step(size: WarmUp, cache: KVCache, attention: AttentionBackend, device: torch.device) -> Step:
    """A step of that size over the last block of the cache; on the CPU valid until the next."""
    scratch, block = cache.num_blocks - 1, cache.block_size
    count, total = size.sequences, size.sequences * size.tokens_each
    tensors = build_step_tensors(
        token_ids=[0] * total,
        starts=[size.context - size.tokens_each] * count,
        query_lens=[size.tokens_each] * count,
        tables=[[scratch] * -(-size.context // block) for _ in range(count)],
        sampled=[],
        block_size=block,
        device=device,
    )
    return Step(tensors.token_ids, tensors.positions, tensors.batch, attention)


def _powers(first: int, last: int) -> list[int]:
    """first, 2 · first, 4 · first, … below ``last``, and ``last``; empty if that is below ``first``."""
    doubled = itertools.takewhile(lambda value: value < last, (first << shift for shift in itertools.count()))
    return [*doubled, last] if last >= first else []
