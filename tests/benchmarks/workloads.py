"""The benchmark's workloads: the same token ids, output lengths and arrival times for every engine.

Definitions are those of ``engine.measure.workloads``; all are greedy, and every request runs to its output length
whatever the model would like to end with.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from engine.measure.prompts import PromptTokenizer, WorkloadRequest, expand
from engine.measure.workloads import Arrival, Lengths, Workload
from tests.benchmarks.peers.protocol import Request, Work
from tests.benchmarks.settings import label

WARMUP_OUTPUT_TOKENS = 4
WARMUP_REQUESTS = 32
QUICK_OUTPUT_SHARE = 8
QUICK_REQUESTS = 16
"""``--quick`` sends at most so many requests and generates an eighth of their output."""


@dataclasses.dataclass(frozen=True, slots=True)
class Benchmark:
    """One workload of the benchmark.

    Attributes:
        key: what ``--only`` takes.
        title: for the tables.
        workload: its definition.
        one_by_one: a request is sent when the one before it is done.
        variants: knobs of our own engine that are measured beside the default; their label names the variant.
    """

    key: str
    title: str
    workload: Workload
    one_by_one: bool = False
    variants: tuple[dict[str, Any], ...] = ()


def _burst(name: str, num_requests: int, prompt_tokens: Any, output_tokens: Any, **fields: Any) -> Workload:
    return Workload(
        name=name,
        description=name,
        num_requests=num_requests,
        prompt_tokens=Lengths.parse(prompt_tokens),
        output_tokens=Lengths.parse(output_tokens),
        **fields,
    )


def _spread(kind: Any, minimum: int, maximum: int) -> Lengths:
    return Lengths(kind, minimum, maximum)


# Above what any engine here completes, so that the rate of arrivals never bounds a throughput.
POISSON_RATE = 8.0

BENCHMARKS: tuple[Benchmark, ...] = (
    Benchmark("a", "(a) one stream, 128 in, 128 out", _burst("one-stream", 1, 128, 128)),
    Benchmark("b8", "(b) 8 at once, 128 in, 128 out", _burst("burst-8", 8, 128, 128)),
    Benchmark("b32", "(b) 32 at once, 128 in, 128 out", _burst("burst-32", 32, 128, 128)),
    Benchmark(
        "c",
        f"(c) 64 of mixed lengths, Poisson, {POISSON_RATE:g} a second",
        _burst(
            "mixed-poisson",
            64,
            _spread("log-uniform", 16, 512),
            _spread("log-uniform", 8, 256),
            arrival=Arrival("poisson", rate_requests_s=POISSON_RATE),
        ),
        variants=({"batching": "static"},),
    ),
    Benchmark(
        "d",
        "(d) 32 chats behind a system prompt of 512 tokens that an earlier chat brought",
        _burst("shared-prefix", 32, _spread("uniform", 16, 64), 32, shared_prefix_tokens=512),
        variants=({"prefix_cache": False},),
    ),
    Benchmark(
        "e",
        "(e) 64 at once, 50–512 in, 50–512 out",
        _burst("nano", 64, _spread("uniform", 50, 512), _spread("uniform", 50, 512), prompt_source="random"),
    ),
    Benchmark("p512", "prefill of 512 tokens", _burst("prefill-512", 4, 512, 1), one_by_one=True),
    Benchmark("p2048", "prefill of 2048 tokens", _burst("prefill-2048", 2, 2048, 1), one_by_one=True),
)


def benchmark(key: str) -> Benchmark:
    """The workload of that key.

    Raises:
        KeyError: if there is none.
    """
    return next(item for item in BENCHMARKS if item.key == key)


def works(item: Benchmark, tokenizer: PromptTokenizer, seed: int, *, ours: bool, quick: bool) -> list[Work]:
    """What is sent to a peer: the workload, and for our own engine its variants.

    Args:
        seed: of prompts, lengths and arrivals.
        quick: at most 16 requests, an eighth of their output.
    """
    count = min(QUICK_REQUESTS, item.workload.num_requests) if quick else item.workload.num_requests
    workload = dataclasses.replace(item.workload, num_requests=count)
    requests = _requests(expand(workload, tokenizer, seed), quick)
    warmup = _warmup(workload, tokenizer, seed)
    plain = Work(item.key, item.one_by_one, requests, warmup)
    variants = item.variants if ours else ()
    return [plain, *(dataclasses.replace(plain, variant=label(knobs), changes=knobs) for knobs in variants)]


def _requests(requests: Sequence[WorkloadRequest], quick: bool) -> list[Request]:
    share = QUICK_OUTPUT_SHARE if quick else 1
    return [
        Request(item.index, item.arrival_s, item.prompt_token_ids, max(1, item.params.max_tokens // share))
        for item in requests
    ]


def _warmup(workload: Workload, tokenizer: PromptTokenizer, seed: int) -> list[Request]:
    """Other prompts of the same lengths, all at once, a few tokens each: as many rows as the workload will have."""
    output = Lengths("fixed", WARMUP_OUTPUT_TOKENS, WARMUP_OUTPUT_TOKENS)
    count = min(WARMUP_REQUESTS, workload.num_requests)
    short = dataclasses.replace(workload, num_requests=count, output_tokens=output, arrival=Arrival("all-at-once"))
    return _requests(expand(short, tokenizer, seed ^ 0x5EED), quick=False)
