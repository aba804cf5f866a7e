"""How the next token is chosen: the parameters of a request, and the sampler of a batch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from engine.device import to_device
from engine.errors import ConfigError, RequestError, shown
from engine.outputs import TokenLogprob
from kernels.dispatch import choose


@dataclasses.dataclass(frozen=True, slots=True)
class Bounds:
    """What a numeric field of a request may be; API schemas are drawn from it.

    Attributes:
        kind: ``int`` or ``float``.
        minimum, maximum: inclusive, unless
        above: the minimum itself is excluded.
        remedy: the sentence that says so.
    """

    kind: type[int] | type[float]
    minimum: float
    maximum: float
    remedy: str
    above: bool = False

    def check(self, field: str, value: object) -> int | float:
        """The value as a plain number of this kind.

        Raises:
            RequestError: if it is no such number (booleans are none, nor are NaN and infinity), or out of bounds.
        """
        number = self._number(value)
        if number is None:
            kind = "a whole number" if self.kind is int else "a number"
            raise RequestError(f"{shown(value)} is not {kind}.", field=field, remedy=self.remedy)
        inside = self.minimum < number if self.above else self.minimum <= number
        if not (inside and number <= self.maximum):  # of NaN every comparison is False
            raise RequestError(f"{shown(value)} is out of range.", field=field, remedy=self.remedy)
        return number

    def _number(self, value: object) -> int | float | None:
        if isinstance(value, bool | np.bool_):
            return None
        if self.kind is int:
            return int(value) if isinstance(value, int | np.integer) else None
        if not isinstance(value, int | float | np.integer | np.floating):
            return None
        try:
            return float(value) + 0.0  # a negative zero is a zero
        except OverflowError:  # a whole number beyond all floats
            return math.inf if value > 0 else -math.inf


LEAST_TEMPERATURE = 1e-5
"""A temperature below it is greedy: dividing by it tells the largest logit from all others, or overflows."""

LIMITS: dict[str, Bounds] = {
    "max_tokens": Bounds(int, 1, 2**31 - 1, "Give a whole number of at least 1."),
    "min_tokens": Bounds(int, 0, 2**31 - 1, "Give a whole number from 0 to max_tokens."),
    "temperature": Bounds(float, 0.0, 100.0, "Give a number from 0 (greedy) to 100."),
    "top_k": Bounds(int, -1, 2**63 - 1, "Give a whole number from 1 to 2^63 - 1, or 0 or -1 for all tokens."),
    "top_p": Bounds(float, 0.0, 1.0, "Give a number above 0 and at most 1.", above=True),
    "min_p": Bounds(float, 0.0, 1.0, "Give a number from 0 to 1."),
    "repetition_penalty": Bounds(float, 1e-6, 100.0, "Give a number from 0.000001 to 100, 1 for none."),
    "seed": Bounds(int, -(2**63), 2**64 - 1, "Give a whole number of 64 bits."),
    "logprobs": Bounds(int, 0, 20, "Give a whole number from 0 to 20."),
    "priority": Bounds(int, -(2**31), 2**31 - 1, "Give a whole number of 32 bits; lower runs first."),
}
"""Bounds of every number that a request brings, by field; ``priority`` goes beside the parameters."""

MOST_STOPS = 64
MOST_STOP_CHARACTERS = 262_144  # of one stop string
MOST_STOP_TOKENS = 1024


@dataclasses.dataclass(frozen=True, slots=True)
class SamplingParams:
    """What a client may ask of the sampler; the names are those of the OpenAI API and of vLLM.

    Attributes:
        max_tokens: most output tokens, ≥ 1.
        min_tokens: end-of-sequence and stop tokens are forbidden before this many output tokens, and stop strings are
            not looked for: one that the text of an earlier token completes does not count, one that only begins there
            does.
        temperature: 0, or anything below :data:`LEAST_TEMPERATURE`, is greedy; otherwise logits are divided by it.
        top_k: keep the k most likely tokens, of equals the lowest ids; 0 or -1 keeps all.
        top_p: keep the smallest set of tokens whose probability reaches p, in (0, 1]; of equals the lowest ids.
        min_p: drop tokens whose probability is below min_p × the largest, in [0, 1].
        repetition_penalty: > 0; logits of tokens seen in prompt or output are divided (if positive) or multiplied
            (if negative) by it (Keskar et al. 2019, CTRL). 1 is off.
        seed: makes this request's draws repeatable whatever else is in the batch. None draws a fresh one.
        stop: strings that end the output; they are not part of the returned text.
        stop_token_ids: token ids that end the output, besides the model's end-of-sequence tokens.
        ignore_eos: go on after the model's end-of-sequence token (benchmarks need fixed lengths).
        logprobs: how many alternatives to report log-probabilities for at each position; None reports none, 0 reports
            the chosen token only. They are taken from the raw model distribution (temperature 1, no penalty).

    Raises:
        RequestError: naming the field that is out of :data:`LIMITS`.
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
        for field in _NUMBERS:
            value = getattr(self, field)
            if value is not None or field not in _OPTIONAL:
                object.__setattr__(self, field, LIMITS[field].check(field, value))
        _require(self.min_tokens <= self.max_tokens, "min_tokens", self.min_tokens, LIMITS["min_tokens"].remedy)
        _require(isinstance(self.ignore_eos, bool), "ignore_eos", self.ignore_eos, "Give true or false.")
        object.__setattr__(self, "stop", _checked_stops(self.stop))
        object.__setattr__(self, "stop_token_ids", _checked_stop_tokens(self.stop_token_ids))

    @property
    def greedy(self) -> bool:
        """True if the most likely token is always taken."""
        return self.temperature < LEAST_TEMPERATURE


_NUMBERS = tuple(field.name for field in dataclasses.fields(SamplingParams) if field.name in LIMITS)
_OPTIONAL = ("seed", "logprobs")


def _checked_stops(stop: object) -> tuple[str, ...]:
    def fits(text: object) -> bool:
        return isinstance(text, str) and 0 < len(text) <= MOST_STOP_CHARACTERS

    remedy = f"Give at most {MOST_STOPS} texts of 1 to {MOST_STOP_CHARACTERS:,} characters."
    return _checked_list(stop, "stop", MOST_STOPS, fits, remedy)


def _checked_stop_tokens(token_ids: object) -> tuple[int, ...]:
    remedy = f"Give at most {MOST_STOP_TOKENS:,} token ids."
    return _checked_list(token_ids, "stop_token_ids", MOST_STOP_TOKENS, lambda token: type(token) is int, remedy)


def _checked_list(
    values: object, field: str, most: int, fits: Callable[[object], bool], remedy: str
) -> tuple[Any, ...]:
    """A list of at most ``most`` entries that fit, as a tuple."""
    if not isinstance(values, tuple | list):
        raise RequestError(f"{shown(values)} is out of range.", field=field, remedy=remedy)
    if len(values) > most:
        raise RequestError(f"{len(values):,} entries are too many.", field=field, remedy=remedy)
    for value in values:
        _require(fits(value), field, value, remedy)
    return tuple(values)


def _require(holds: bool, field: str, value: object, remedy: str) -> None:
    if not holds:
        raise RequestError(f"{shown(value)} is out of range.", field=field, remedy=remedy)


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


NO_TOKEN = -1
"""Stands for the token of a row that has none to choose: NaN or infinity among its logits, or every one excluded."""

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
        from engine.sampling.triton_sampler import sample_on_device  # Triton should load only where it is asked for

        return sample_on_device, choice.path
    return sample, choice.path


def warm_up_sampler(logits: torch.Tensor, path: str) -> None:
    """Have the sampler's kernels compiled, where it has any, for logits [1, vocab] like these.

    Args:
        path: as :func:`get_sampler` gave it.
    """
    if path.startswith("triton"):
        from engine.sampling.triton_sampler import warm_up

        warm_up(logits)


# Up to this k the k largest logits are selected instead of sorting the whole vocabulary.
_TOPK_WITHOUT_SORT = 256


def sample(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> tuple[list[int], list[TokenLogprob | None]]:
    """Choose one token a row.

    Penalty, then temperature, then top-k, top-p on what top-k left, then min-p: the order of transformers. What is kept
    is decided by rank, of equals the lowest ids first; the draw walks through it in the order of the vocabulary, so
    that two neighbours in rank that rounding lets change places are drawn all the same.

    Args:
        logits: [R, vocab], any float dtype; not modified.
        rows: R rows.

    Returns:
        The R chosen token ids, :data:`NO_TOKEN` where the logits leave none, and for each row its log-probabilities or
        None where none were asked for.
    """
    adjusted = _penalize(logits, rows)
    largest, token_ids = adjusted.max(dim=-1)  # NaN if there is one in the row
    drawn = [index for index, row in enumerate(rows) if not row.params.greedy]
    if drawn:
        token_ids[drawn] = _draw(adjusted[drawn].float(), [rows[index] for index in drawn])
    # On a device in what comes back anyway: nobody waits for the answer to a question of its own. Where nobody waits
    # the sum answers for nearly every batch.
    if logits.device.type != "cpu" or not math.isfinite(largest.sum()):
        token_ids.masked_fill_(~largest.isfinite(), NO_TOKEN)
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
        groups.setdefault(_candidate_search(row.params, logits.device), []).append(index)
    tokens = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
    for search, members in groups.items():
        tokens[members] = _draw_group(scaled[members], [rows[i] for i in members], search)
    return tokens


def _candidate_search(params: SamplingParams, device: torch.device) -> str:
    if 0 < params.top_k <= _TOPK_WITHOUT_SORT and device.type == "cpu":  # elsewhere looking for equals would wait
        return "topk"
    return "sort" if params.top_k > 0 or params.top_p < 1.0 else "all"


def _draw_group(logits: torch.Tensor, rows: Sequence[SamplingRow], search: str) -> torch.Tensor:
    """Inverse-CDF draw from [S, vocab] tempered logits; int64 [S]."""
    token_ids: torch.Tensor | None = None
    vocab = logits.shape[-1]
    ks = [min(row.params.top_k, vocab) if row.params.top_k > 0 else vocab for row in rows]
    if search == "topk":
        token_ids = _largest(logits, ks)
        logits = logits.gather(-1, token_ids)
    probabilities = logits.double().softmax(dim=-1) if search == "all" else _cut_by_rank(logits, rows, ks)
    min_p = _column([row.params.min_p for row in rows], logits)
    largest = probabilities.amax(dim=-1, keepdim=True)
    probabilities = probabilities.masked_fill(probabilities < min_p * largest, 0.0)
    cumulative = probabilities.cumsum(dim=-1)
    total = cumulative[:, -1:]
    draws = _column([_uniform(row.seed, row.position) for row in rows], logits) * total
    draws = torch.minimum(draws, total.nextafter(torch.zeros_like(total)))  # where the product rounds up to all
    index = torch.searchsorted(cumulative, draws, right=True).clamp_(max=logits.shape[-1] - 1)
    return (index if token_ids is None else token_ids.gather(-1, index)).squeeze(-1)


def _cut_by_rank(logits: torch.Tensor, rows: Sequence[SamplingRow], ks: list[int]) -> torch.Tensor:
    """float64 [S, V'] probabilities of what top-k and top-p keep, zero elsewhere, in the order of the logits given."""
    values, order = logits.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(values.shape[-1], device=logits.device)
    beyond = rank >= torch.tensor(ks, device=logits.device)[:, None]
    probabilities = values.masked_fill(beyond, -torch.inf).double().softmax(dim=-1)
    # 1.0 means all: rounding lets the running sum reach 1 before the last candidate
    top_p = _column([row.params.top_p if row.params.top_p < 1.0 else 2.0 for row in rows], logits)
    before = probabilities.cumsum(dim=-1) - probabilities
    probabilities = probabilities.masked_fill(before >= top_p, 0.0)
    return torch.zeros_like(probabilities).scatter_(-1, order, probabilities)


def _largest(logits: torch.Tensor, ks: list[int]) -> torch.Tensor:
    """int64 [S, max(ks)]: ids, ascending, among which are those of each row's k largest, of equals the lowest ids."""
    values, token_ids = logits.topk(max(ks), dim=-1)
    counts = torch.tensor(ks)
    least = values.gather(-1, counts[:, None] - 1)
    tied = (logits >= least).sum(dim=-1) > counts  # topk takes any of the equals
    for row in tied.nonzero()[:, 0].tolist():
        above = int((values[row] > least[row]).sum())
        equals = (logits[row] == least[row]).nonzero()[: token_ids.shape[1] - above, 0]
        token_ids[row, above : above + len(equals)] = equals
    return token_ids.sort(dim=-1).values


def _column(values: list[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, device=like.device)[:, None]


def _uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on the seed and the position alone (Philox, a counter-based generator)."""
    generator = np.random.Generator(np.random.Philox(key=seed, counter=position))
    return float(generator.random())


LEAST_LOGPROB = -9999.0
"""Stands for the log-probability of what is impossible: JSON has no infinity."""


def logprobs_of(logits: torch.Tensor, rows: Sequence[SamplingRow], chosen: Sequence[int]) -> list[TokenLogprob | None]:
    """Log-probabilities under the raw model distribution for the rows that asked."""
    result: list[TokenLogprob | None] = [None] * len(rows)
    asked = [(index, row.params.logprobs) for index, row in enumerate(rows) if row.params.logprobs is not None]
    if not asked:
        return result
    # An index out of range would end the whole process on a GPU.
    columns = ([index for index, _ in asked], [max(chosen[index], 0) for index, _ in asked])
    places, tokens = to_device([np.array(column, np.int64) for column in columns], logits.device)
    raw = logits.index_select(0, places).float().log_softmax(dim=-1).clamp_min(LEAST_LOGPROB)
    most = max(count or 0 for _, count in asked)
    top = raw.topk(most, dim=-1)
    # Token ids and float32 are exact in float64: one copy to the host for all of it.
    parts = (raw.gather(1, tokens[:, None]), top.values, top.indices)
    for (index, count), line in zip(asked, torch.cat([part.double() for part in parts], dim=1).tolist(), strict=True):
        value, values, ids = line[0], line[1 : most + 1], line[most + 1 :]
        pairs = {int(token): of_it for token, of_it in zip(ids[:count], values[:count], strict=True)}
        result[index] = TokenLogprob(chosen[index], value, pairs)
    return result
