"""From a workload to its requests: the same definition, tokenizer and seed give the same requests, everywhere.

Draws come from ``random.Random(...).random()`` alone, whose sequence Python keeps the same from version to version.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import random
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from engine.errors import WorkloadError
from engine.measure.workloads import DATA, Lengths, Workload
from engine.sampling.params import SamplingParams


class PromptTokenizer(Protocol):
    """What is needed of a tokenizer; transformers' ``PreTrainedTokenizerBase`` has it."""

    all_special_ids: list[int]

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of ``text``."""

    def __len__(self) -> int:
        """Size of the vocabulary, special tokens included."""


@dataclasses.dataclass(frozen=True, slots=True)
class WorkloadRequest:
    """One request of an expanded workload.

    Attributes:
        index: number in the workload, from 0.
        arrival_s: when it arrives, seconds from the start; 0 in a closed loop, where the driver decides.
        prompt_token_ids: the prompt.
        params: ``max_tokens`` is its output length.
    """

    index: int
    arrival_s: float
    prompt_token_ids: list[int]
    params: SamplingParams


def expand(workload: Workload, tokenizer: PromptTokenizer, seed: int) -> list[WorkloadRequest]:
    """The requests of a workload, in order of arrival.

    Prompt lengths are exact, beginning-of-sequence token included where the tokenizer adds one.

    Raises:
        WorkloadError: if a prompt is too short for what its source must put into it.
    """
    write = _SOURCES[workload.prompt_source](tokenizer, _stream(seed, "prompts"))
    lengths, arrivals = _stream(seed, "lengths"), _arrivals(workload, seed)
    prefix = _shared_prefix(workload, tokenizer)
    requests = []
    for index in range(workload.num_requests):
        prompt_length = workload.prompt_tokens.draw(lengths.random())
        output_length = workload.output_tokens.draw(lengths.random())
        prompt = prefix + write(prompt_length, index) if prefix else _open(write, tokenizer, prompt_length, index)
        requests.append(WorkloadRequest(index, arrivals[index], prompt, _params(workload, output_length, seed, index)))
    return requests


def expand_warmup(workload: Workload, tokenizer: PromptTokenizer, seed: int) -> list[WorkloadRequest]:
    """The requests sent before the clock starts: other prompts of the same lengths, at most 16 output tokens."""
    if workload.warmup_requests == 0:
        return []
    output = workload.output_tokens
    short = Lengths("uniform", min(output.minimum, 16), min(output.maximum, 16))
    arrival = type(workload.arrival)("all-at-once")
    warmup = dataclasses.replace(
        workload, num_requests=workload.warmup_requests, arrival=arrival, output_tokens=short, ignore_eos=True
    )
    return expand(warmup, tokenizer, seed ^ 0x5EED)


def workload_hash(requests: Sequence[WorkloadRequest]) -> str:
    """SHA-256 (hex) over everything that is sent: arrival times, prompt token ids and sampling parameters."""
    digest = hashlib.sha256()
    for request in requests:
        content = [request.arrival_s, request.prompt_token_ids, dataclasses.asdict(request.params)]
        digest.update(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())
        digest.update(b"\n")
    return digest.hexdigest()


@functools.cache
def corpus_documents() -> tuple[str, ...]:
    """The bundled texts: code, dialogue, instructions, prose and popular science, written for this purpose."""
    return tuple(path.read_text(encoding="utf-8") for path in sorted((DATA / "corpus").glob("*.txt")))


def corpus_text() -> str:
    """All bundled texts, one after another."""
    return "\n\n".join(corpus_documents())


def corpus_tokens(tokenizer: PromptTokenizer) -> list[int]:
    """The bundled text as token ids, without special tokens."""
    return list(tokenizer.encode(corpus_text(), add_special_tokens=False))


def opening_tokens(tokenizer: PromptTokenizer) -> list[int]:
    """What the tokenizer puts before a text (a beginning-of-sequence token, or nothing)."""
    bare = list(tokenizer.encode("a", add_special_tokens=False))
    full = list(tokenizer.encode("a", add_special_tokens=True))
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start]
    return []


def _stream(seed: int, purpose: str) -> random.Random:
    # one stream a purpose: changing how prompts are drawn must not change the lengths
    return random.Random(f"headroom/{purpose}/{seed}")


def _below(stream: random.Random, bound: int) -> int:
    return math.floor(stream.random() * bound)


def _arrivals(workload: Workload, seed: int) -> list[float]:
    if workload.arrival.kind != "poisson":
        return [0.0] * workload.num_requests
    rate = workload.arrival.rate_requests_s
    assert rate is not None
    stream, now, arrivals = _stream(seed, "arrivals"), 0.0, []
    for _ in range(workload.num_requests):
        arrivals.append(now)  # the first request starts the clock
        now += -math.log(1.0 - stream.random()) / rate
    return arrivals


def _params(workload: Workload, max_tokens: int, seed: int, index: int) -> SamplingParams:
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=float(workload.temperature),
        top_k=workload.top_k,
        top_p=float(workload.top_p),
        min_p=float(workload.min_p),
        repetition_penalty=float(workload.repetition_penalty),
        seed=_below(_stream(seed, f"sampling/{index}"), 2**53),
        ignore_eos=workload.ignore_eos,
    )


def _shared_prefix(workload: Workload, tokenizer: PromptTokenizer) -> list[int]:
    if workload.shared_prefix_tokens == 0:
        return []
    text = (DATA / "system_prompt.txt").read_text(encoding="utf-8")
    tokens = opening_tokens(tokenizer) + list(tokenizer.encode(text, add_special_tokens=False))
    return _repeat_to(tokens, workload.shared_prefix_tokens)


def _repeat_to(tokens: list[int], length: int) -> list[int]:
    repeated = tokens * (length // len(tokens) + 1)
    return repeated[:length]


def _open(write: Callable[[int, int], list[int]], tokenizer: PromptTokenizer, length: int, index: int) -> list[int]:
    opening = opening_tokens(tokenizer)[: length - 1]
    return opening + write(length - len(opening), index)


class _CorpusSource:
    """Slices of the bundled text. No two prompts begin at the same place until all places are used, so that the
    prefix cache finds nothing that the workload did not put there."""

    def __init__(self, tokenizer: PromptTokenizer, stream: random.Random) -> None:
        self.tokens = corpus_tokens(tokenizer)
        self.stream = stream
        self.used: set[int] = set()

    def slice(self, length: int) -> list[int]:
        """``length`` tokens from a fresh place, going on at the beginning where the text ends."""
        if len(self.used) >= len(self.tokens):
            self.used.clear()
        start = _below(self.stream, len(self.tokens))
        while start in self.used:
            start = (start + 1) % len(self.tokens)
        self.used.add(start)
        return _repeat_to(self.tokens[start:] + self.tokens[:start], length)

    def __call__(self, length: int, index: int) -> list[int]:
        return self.slice(length)


class _ExtractSource:
    """A passage, the request to copy it, and the first words of the copy: the continuation is in the prompt."""

    LEAD = 8

    def __init__(self, tokenizer: PromptTokenizer, stream: random.Random) -> None:
        self.corpus = _CorpusSource(tokenizer, stream)
        self.before = list(tokenizer.encode("Passage:\n\n", add_special_tokens=False))
        self.between = list(tokenizer.encode("\n\nThe same passage, word by word:\n\n", add_special_tokens=False))

    def __call__(self, length: int, index: int) -> list[int]:
        passage_length = length - len(self.before) - len(self.between) - self.LEAD
        if passage_length < self.LEAD:
            shortest = length - passage_length + self.LEAD
            raise WorkloadError(
                f"a prompt of {length} tokens is too short for a passage and the request to copy it.",
                field="prompt_tokens",
                remedy=f"Give at least {shortest} tokens with prompt_source extract.",
            )
        passage = self.corpus.slice(passage_length)
        return self.before + passage + self.between + passage[: self.LEAD]


class _RandomSource:
    """Ids drawn uniformly from the vocabulary without its special tokens."""

    def __init__(self, tokenizer: PromptTokenizer, stream: random.Random) -> None:
        special = set(tokenizer.all_special_ids)
        self.ids = [token for token in range(len(tokenizer)) if token not in special]
        self.stream = stream

    def __call__(self, length: int, index: int) -> list[int]:
        return [self.ids[_below(self.stream, len(self.ids))] for _ in range(length)]


_SOURCES: dict[str, Any] = {"corpus": _CorpusSource, "extract": _ExtractSource, "random": _RandomSource}
