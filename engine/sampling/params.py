"""What a request may ask of the sampler, with the bounds of every number, and what a sampler is asked of each row."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from engine.errors import RequestError, shown


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
"""Bounds of every number that a request brings, by field; ``priority`` goes alongside the parameters."""

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
