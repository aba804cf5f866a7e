"""How the next token is chosen: the parameters of a request, and the sampler of a batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch

from engine.device import to_device
from engine.errors import ConfigError, RequestError
from engine.outputs import TokenLogprob
from kernels.dispatch import choose


@dataclasses.dataclass(frozen=True, slots=True)
class SamplingParams:
    """What a client may ask of the sampler; the names are those of the OpenAI API and of vLLM.

    Attributes:
        max_tokens: most output tokens, ≥ 1.
        min_tokens: end-of-sequence and stop tokens are forbidden before this many output tokens.
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_k: keep the k most likely tokens; 0 or -1 keeps all.
        top_p: keep the smallest set of tokens whose probability reaches p, in (0, 1].
        min_p: drop tokens whose probability is below min_p × the largest, in [0, 1].
        repetition_penalty: > 0; logits of tokens seen in prompt or output are divided (if positive) or multiplied
            (if negative) by it (Keskar et al. 2019, CTRL). 1 is off.
        seed: makes this request's draws repeatable whatever else is in the batch. None draws a fresh one.
        stop: strings that end the output; they are not part of the returned text.
        stop_token_ids: token ids that end the output, besides the model's end-of-sequence tokens.
        ignore_eos: go on after the model's end-of-sequence token (benchmarks need fixed lengths).
        logprobs: how many alternatives to report log-probabilities for at each position; None reports none, 0 reports
            the chosen token only. They are taken from the raw model distribution (temperature 1, no penalty).
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        _require(self.max_tokens >= 1, "max_tokens", self.max_tokens, "Give a whole number of at least 1.")
        _require(
            0 <= self.min_tokens <= self.max_tokens,
            "min_tokens",
            self.min_tokens,
            "Give a number from 0 to max_tokens.",
        )
        _require(
            0.0 <= self.temperature <= 100.0,
            "temperature",
            self.temperature,
            "Give a number from 0 (greedy) to 100.",
        )
        _require(self.top_k >= -1, "top_k", self.top_k, "Give a whole number of at least 1, or 0 for all tokens.")
        _require(0.0 < self.top_p <= 1.0, "top_p", self.top_p, "Give a number above 0 and at most 1.")
        _require(0.0 <= self.min_p <= 1.0, "min_p", self.min_p, "Give a number from 0 to 1.")
        penalty = self.repetition_penalty
        _require(0.0 < penalty <= 100.0, "repetition_penalty", penalty, "Give a number above 0, 1 for none.")
        _require(all(self.stop), "stop", self.stop, "Stop strings must not be empty.")
        _require(
            self.logprobs is None or 0 <= self.logprobs <= 20,
            "logprobs",
            self.logprobs,
            "Give a whole number from 0 to 20.",
        )

    @property
    def greedy(self) -> bool:
        """True if the most likely token is always taken."""
        return self.temperature == 0.0


def _require(holds: bool, field: str, value: object, remedy: str) -> None:
    if not holds:  # `holds` is False for NaN too: every comparison with NaN is
        raise RequestError(f"{value!r} is out of range.", field=field, remedy=remedy)


@dataclasses.dataclass(frozen=True, slots=True)
class SamplingRow:
    """One position at which a token is to be chosen.

    Attributes:
        params: of the request.
        seed: of the request, 64 bit.
        position: number of the output token to be chosen, from 0; with the seed it keys the draw, so that the choice
            depends neither on the rest of the batch nor on preemption or speculation.
        history: prompt, output and the drafts before this position; read only if there is a repetition penalty.
        forbidden: token ids that must not be chosen here (end of sequence before ``min_tokens``).
    """

    params: SamplingParams
    seed: int
    position: int
    history: Sequence[int]
    forbidden: tuple[int, ...]


Sampler = Callable[[torch.Tensor, Sequence[SamplingRow]], tuple[list[int], list[TokenLogprob | None]]]
"""(logits [R, vocab], R rows) → the chosen token ids, and each row's log-probabilities where they were asked for."""


def get_sampler(name: str, device: torch.device) -> tuple[Sampler, str]:
    """The sampler of that name, and the path that it really takes, for the record.

    Args:
        name: value of the knob ``sampling``: auto, torch or triton.
        device: where the logits are.

    Raises:
        ConfigError: if it cannot run here; nothing else is put in its place.
    """
    choice = choose("sample", name, device=device, dtype=torch.float32)
    if choice.path is None:
        raise ConfigError(f"{name!r} cannot run here: {choice.reason}", field="sampling", remedy=choice.remedy or None)
    if choice.path.startswith("triton"):
        from engine.sampling_device import sample_on_device  # Triton should load only where it is asked for

        return sample_on_device, choice.path
    return sample, choice.path


def warm_up_sampler(logits: torch.Tensor, path: str) -> None:
    """Have the sampler's kernels compiled, where it has any, for logits [1, vocab] like these.

    Args:
        path: as :func:`get_sampler` gave it.
    """
    if path.startswith("triton"):
        from engine.sampling_device import warm_up

        warm_up(logits)


# Up to this k the k largest logits are selected instead of sorting the whole vocabulary.
_TOPK_WITHOUT_SORT = 256


def sample(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> tuple[list[int], list[TokenLogprob | None]]:
    """Choose one token a row.

    Penalty, then temperature, then top-k, top-p on what top-k left, then min-p: the order of transformers.

    Args:
        logits: [R, vocab], any float dtype; not modified.
        rows: R rows.

    Returns:
        The R chosen token ids, and for each row its log-probabilities or None where none were asked for.
    """
    adjusted = _penalize(logits, rows)
    token_ids = adjusted.argmax(dim=-1)
    drawn = [index for index, row in enumerate(rows) if not row.params.greedy]
    if drawn:
        token_ids[drawn] = _draw(adjusted[drawn].float(), [rows[index] for index in drawn])
    chosen: list[int] = token_ids.tolist()
    return chosen, logprobs_of(logits, rows, chosen)


def _penalize(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    """Apply repetition penalties and forbidden tokens; copies only if there is something to apply."""
    touched = [i for i, row in enumerate(rows) if row.forbidden or row.params.repetition_penalty != 1.0]
    if not touched:
        return logits
    adjusted = logits.float().clone()
    for index in touched:
        row = rows[index]
        penalty = row.params.repetition_penalty
        if penalty != 1.0:
            seen = torch.tensor(sorted(set(row.history)), device=logits.device)
            values = adjusted[index, seen]
            adjusted[index, seen] = torch.where(values > 0, values / penalty, values * penalty)
        if row.forbidden:
            adjusted[index, list(row.forbidden)] = -torch.inf
    return adjusted


def _draw(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    """Draw from [S, vocab] float32 logits of rows that are not greedy; int64 [S].

    Rows are grouped by the way their candidates are found, which depends on their own parameters alone: a row's
    draw must not change with its neighbours.
    """
    temperatures = torch.tensor([row.params.temperature for row in rows], device=logits.device)
    scaled = logits / temperatures[:, None]
    groups: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(_candidate_search(row.params), []).append(index)
    tokens = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
    for search, members in groups.items():
        tokens[members] = _draw_group(scaled[members], [rows[i] for i in members], search)
    return tokens


def _candidate_search(params: SamplingParams) -> str:
    if 0 < params.top_k <= _TOPK_WITHOUT_SORT:
        return "topk"
    return "sort" if params.top_k > 0 or params.top_p < 1.0 else "all"


def _draw_group(logits: torch.Tensor, rows: Sequence[SamplingRow], search: str) -> torch.Tensor:
    """Inverse-CDF draw from [S, vocab] tempered logits; int64 [S]."""
    token_ids: torch.Tensor | None = None
    if search == "topk":
        most = min(max(row.params.top_k for row in rows), logits.shape[-1])
        logits, token_ids = logits.topk(most, dim=-1)
    elif search == "sort":
        logits, token_ids = logits.sort(dim=-1, descending=True)
    if token_ids is not None:  # candidates are in descending order: top-k is a cut by rank
        ks = torch.tensor([row.params.top_k if row.params.top_k > 0 else logits.shape[-1] for row in rows])
        rank = torch.arange(logits.shape[-1], device=logits.device)
        logits = logits.masked_fill(rank >= ks.to(logits.device)[:, None], -torch.inf)
    probabilities = logits.double().softmax(dim=-1)
    if token_ids is not None:
        # 1.0 means all: rounding lets the running sum reach 1 before the last candidate
        top_p = _column([row.params.top_p if row.params.top_p < 1.0 else 2.0 for row in rows], logits)
        before = probabilities.cumsum(dim=-1) - probabilities
        probabilities = probabilities.masked_fill(before >= top_p, 0.0)
    min_p = _column([row.params.min_p for row in rows], logits)
    largest = probabilities.amax(dim=-1, keepdim=True)
    probabilities = probabilities.masked_fill(probabilities < min_p * largest, 0.0)
    cumulative = probabilities.cumsum(dim=-1)
    draws = _column([_uniform(row.seed, row.position) for row in rows], logits) * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, draws, right=True).clamp_(max=logits.shape[-1] - 1)
    return (index if token_ids is None else token_ids.gather(-1, index)).squeeze(-1)


def _column(values: list[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, device=like.device)[:, None]


def _uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on the seed and the position alone (Philox, a counter-based generator)."""
    generator = np.random.Generator(np.random.Philox(key=seed, counter=position))
    return float(generator.random())


def logprobs_of(logits: torch.Tensor, rows: Sequence[SamplingRow], chosen: Sequence[int]) -> list[TokenLogprob | None]:
    """Log-probabilities under the raw model distribution for the rows that asked."""
    result: list[TokenLogprob | None] = [None] * len(rows)
    asked = [(index, row.params.logprobs) for index, row in enumerate(rows) if row.params.logprobs is not None]
    if not asked:
        return result
    # An index out of range would end the whole process on a GPU.
    columns = ([index for index, _ in asked], [max(chosen[index], 0) for index, _ in asked])
    places, tokens = to_device([np.array(column, np.int64) for column in columns], logits.device)
    raw = logits.index_select(0, places).float().log_softmax(dim=-1)
    most = max(count or 0 for _, count in asked)
    top = raw.topk(most, dim=-1)
    # Token ids and float32 are exact in float64: one copy to the host for all of it.
    parts = (raw.gather(1, tokens[:, None]), top.values, top.indices)
    for (index, count), line in zip(asked, torch.cat([part.double() for part in parts], dim=1).tolist(), strict=True):
        value, values, ids = line[0], line[1 : most + 1], line[most + 1 :]
        pairs = {int(token): of_it for token, of_it in zip(ids[:count], values[:count], strict=True)}
        result[index] = TokenLogprob(chosen[index], value, pairs)
    return result
