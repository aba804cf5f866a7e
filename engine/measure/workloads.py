"""Workloads: what is asked of the engine in a measured run, by name, from a file or from a mapping.

A new named workload is one new file in ``engine/measure/data/workloads/``; a file of the same form anywhere else
works too. Turning a definition into requests is :func:`engine.measure.prompts.expand`.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from engine.errors import WorkloadError
from engine.measure.metrics import Slo

DATA = Path(__file__).parent / "data"
MAX_REQUESTS = 100_000
MAX_TOKENS = 1_000_000


def _choice(field: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        remedy = f"Choose one of: {', '.join(choices)}."
        raise WorkloadError(f"{value!r} is not available.", field=field, remedy=remedy)


def _whole(field: str, value: object, minimum: int, maximum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
        remedy = f"Give a whole number from {minimum} to {maximum}."
        raise WorkloadError(f"{value!r} is out of bounds.", field=field, remedy=remedy)


def _number(field: str, value: object, minimum: float, maximum: float) -> None:
    # NaN fails both comparisons
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not minimum <= value <= maximum:
        remedy = f"Give a number from {minimum:g} to {maximum:g}."
        raise WorkloadError(f"{value!r} is out of bounds.", field=field, remedy=remedy)


@dataclasses.dataclass(frozen=True, slots=True)
class Lengths:
    """Distribution of a length in tokens; both bounds are included.

    Attributes:
        kind: "fixed" (minimum = maximum), "uniform", or "log-uniform" (each octave as likely as the next: many short
            and a few long ones, as real traffic has).
        minimum, maximum: tokens, ≥ 1.
    """

    kind: Literal["fixed", "uniform", "log-uniform"]
    minimum: int
    maximum: int

    KINDS: ClassVar = ("fixed", "uniform", "log-uniform")

    def __post_init__(self) -> None:
        _choice("kind", self.kind, self.KINDS)
        _whole("minimum", self.minimum, 1, MAX_TOKENS)
        _whole("maximum", self.maximum, 1, MAX_TOKENS)
        if self.maximum < self.minimum:
            message = f"maximum {self.maximum} is below minimum {self.minimum}."
            raise WorkloadError(message, field="maximum", remedy="Give a maximum of at least the minimum.")
        if self.kind == "fixed" and self.minimum != self.maximum:
            message = f"a fixed length has one value, not {self.minimum} to {self.maximum}."
            raise WorkloadError(message, field="kind", remedy="Use uniform or log-uniform, or equal bounds.")

    @classmethod
    def parse(cls, value: Any) -> Lengths:
        """From ``128`` (fixed) or ``{"kind": …, "minimum": …, "maximum": …}``."""
        if isinstance(value, Lengths):
            return value
        if isinstance(value, Mapping):
            return cls(**_known_fields(cls, value))
        return cls("fixed", value, value)

    def draw(self, uniform: float) -> int:
        """The length at quantile ``uniform`` in [0, 1)."""
        if self.kind == "log-uniform":
            low, high = math.log(self.minimum), math.log(self.maximum + 1)
            return min(self.maximum, max(self.minimum, math.floor(math.exp(low + uniform * (high - low)))))
        return min(self.maximum, self.minimum + math.floor(uniform * (self.maximum - self.minimum + 1)))


@dataclasses.dataclass(frozen=True, slots=True)
class Arrival:
    """When requests arrive.

    Attributes:
        kind: "all-at-once"; "poisson" (independent arrivals at a mean rate, whatever the engine does: an open loop);
            "closed-loop" (so many clients, each sends its next request when its last one is done).
        rate_requests_s: mean rate of a Poisson arrival, else None.
        concurrency: clients of a closed loop, else None.
    """

    kind: Literal["all-at-once", "poisson", "closed-loop"]
    rate_requests_s: float | None = None
    concurrency: int | None = None

    KINDS: ClassVar = ("all-at-once", "poisson", "closed-loop")

    def __post_init__(self) -> None:
        _choice("kind", self.kind, self.KINDS)
        if self.kind == "poisson":
            _number("rate_requests_s", self.rate_requests_s, 1e-6, 1e6)
        elif self.rate_requests_s is not None:
            raise WorkloadError("only a poisson arrival has a rate.", field="rate_requests_s", remedy="Leave it out.")
        if self.kind == "closed-loop":
            _whole("concurrency", self.concurrency, 1, MAX_REQUESTS)
        elif self.concurrency is not None:
            raise WorkloadError("only a closed loop has clients.", field="concurrency", remedy="Leave it out.")

    @classmethod
    def parse(cls, value: Any) -> Arrival:
        """From ``"all-at-once"`` or ``{"kind": "poisson", "rate_requests_s": 2}``."""
        if isinstance(value, Arrival):
            return value
        return cls(**_known_fields(cls, value)) if isinstance(value, Mapping) else cls(value)


@dataclasses.dataclass(frozen=True, slots=True)
class Workload:
    """The definition of a workload. With a tokenizer and a seed it expands to the same requests every time.

    Attributes:
        name: shown and recorded; description: one line for an operator.
        num_requests: how many.
        arrival: when they come.
        prompt_source: "corpus" (slices of the bundled prose and code), "extract" (a passage to be copied, which favours
            n-gram speculation), or "random" (token ids drawn uniformly, as some published benchmarks do).
        prompt_tokens: length of each prompt without the shared prefix.
        output_tokens: ``max_tokens`` of each request.
        shared_prefix_tokens: tokens of a system prompt that all requests begin with, in addition.
        ignore_eos: go on after end of sequence, so that every run has the same number of output tokens.
        temperature, top_k, top_p, min_p, repetition_penalty: as in :class:`engine.sampling.params.SamplingParams`; each
            request gets a sampling seed from the workload's seed.
        warmup_requests: requests sent before the clock starts and left out of every figure.
        slo: objectives that goodput counts by.
    """

    name: str
    description: str
    num_requests: int
    prompt_tokens: Lengths
    output_tokens: Lengths
    arrival: Arrival = Arrival("all-at-once")
    prompt_source: Literal["corpus", "extract", "random"] = "corpus"
    shared_prefix_tokens: int = 0
    ignore_eos: bool = True
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    warmup_requests: int = 2
    slo: Slo | None = None

    SOURCES: ClassVar = ("corpus", "extract", "random")

    def __post_init__(self) -> None:
        for field in ("name", "description"):
            if not isinstance(getattr(self, field), str) or not self.name:
                raise WorkloadError(f"{getattr(self, field)!r} is not a text.", field=field, remedy="Give a text.")
        _whole("num_requests", self.num_requests, 1, MAX_REQUESTS)
        _choice("prompt_source", self.prompt_source, self.SOURCES)
        _whole("shared_prefix_tokens", self.shared_prefix_tokens, 0, MAX_TOKENS)
        _whole("warmup_requests", self.warmup_requests, 0, 64)
        if not isinstance(self.ignore_eos, bool):
            raise WorkloadError(f"{self.ignore_eos!r} is neither.", field="ignore_eos", remedy="Give true or false.")
        if not (self.slo is None or isinstance(self.slo, Slo)):
            remedy = 'Give an object such as {"ttft_ms": 500}.'
            raise WorkloadError(f"{self.slo!r} is no set of objectives.", field="slo", remedy=remedy)
        _number("temperature", self.temperature, 0.0, 100.0)
        _whole("top_k", self.top_k, -1, MAX_TOKENS)
        _number("top_p", self.top_p, 1e-9, 1.0)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("repetition_penalty", self.repetition_penalty, 1e-3, 100.0)

    @property
    def longest_request(self) -> int:
        """Most tokens, prompt and output together, that one request can need."""
        return self.shared_prefix_tokens + self.prompt_tokens.maximum + self.output_tokens.maximum

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Workload:
        """A workload from JSON values; the inverse of :meth:`to_dict`.

        ``{"base": "burst-8", "num_requests": 4}`` takes everything that is not said from a named workload.

        Raises:
            WorkloadError: naming the field and the remedy.
        """
        given = dict(values)
        base = given.pop("base", None)
        start = {} if base is None else get_workload(base)._fields()
        if base is not None and "name" not in given:
            given["name"] = f"{start['name']} (changed)"
        merged = {**start, **_known_fields(cls, given)}
        merged.setdefault("name", "custom")
        merged.setdefault("description", "")
        for field in ("num_requests", "prompt_tokens", "output_tokens"):
            if field not in merged:
                raise WorkloadError("is missing.", field=field, remedy="Give it, or name a workload as base.")
        for field, parse in (("prompt_tokens", Lengths), ("output_tokens", Lengths), ("arrival", Arrival)):
            if field in merged:
                merged[field] = _nested(field, parse, merged[field])
        if isinstance(merged.get("slo"), Mapping):
            merged["slo"] = Slo.from_mapping(merged["slo"])
        return cls(**merged)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, complete: :meth:`from_mapping` gives the same workload again."""
        return dataclasses.asdict(self)

    def _fields(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def get_workload(workload: str | Mapping[str, Any] | Workload) -> Workload:
    """The workload of that name, in that ``.json`` file, or of that definition.

    Raises:
        WorkloadError: unknown name, unreadable file, or a field that cannot be used; with the remedy.
    """
    if isinstance(workload, Workload):
        return workload
    if isinstance(workload, Mapping):
        return Workload.from_mapping(workload)
    if workload in WORKLOADS:
        return WORKLOADS[workload]
    if isinstance(workload, str) and workload.endswith(".json"):
        return read_workload(Path(workload))
    close = difflib.get_close_matches(str(workload), WORKLOADS, n=2)
    remedy = f"Did you mean {' or '.join(close)}?" if close else f"Known workloads: {', '.join(WORKLOADS)}."
    raise WorkloadError(f"there is no workload named {workload!r}.", field="workload", remedy=remedy)


def read_workload(path: Path) -> Workload:
    """The workload that a JSON file defines.

    Raises:
        WorkloadError: if the file cannot be read or does not define one.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        remedy = "Give a readable JSON file, or the name of a workload."
        raise WorkloadError(f"{path} cannot be read: {error}.", field="workload", remedy=remedy) from None
    if not isinstance(values, dict):
        raise WorkloadError(f"{path} holds no JSON object.", field="workload", remedy="Write one object of fields.")
    return Workload.from_mapping(values)


def _nested(field: str, kind: type[Lengths] | type[Arrival], value: Any) -> Lengths | Arrival:
    """Parse a part and name its place in the whole when it is wrong."""
    try:
        return kind.parse(value)
    except WorkloadError as error:
        place = f"{field}.{error.field}" if isinstance(value, Mapping) else field
        raise WorkloadError(error.message, field=place, remedy=error.remedy) from None


def _known_fields(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name in values:
        if name not in fields:
            close = difflib.get_close_matches(str(name), fields, n=2)
            remedy = f"Did you mean {' or '.join(close)}?" if close else f"Known fields: {', '.join(fields)}."
            raise WorkloadError("there is no such field.", field=str(name), remedy=remedy)
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in values and cls is not Workload:
            raise WorkloadError("is missing.", field=name, remedy=f"Give {', '.join(fields)}.")
    return dict(values)


def _read_bundled() -> dict[str, Workload]:
    bundled = [read_workload(path) for path in (DATA / "workloads").glob("*.json")]
    # from one stream to many, so that lists read from light to heavy
    bundled.sort(key=lambda workload: (workload.num_requests * workload.longest_request, workload.name))
    return {workload.name: workload for workload in bundled}


WORKLOADS: dict[str, Workload] = {}
WORKLOADS.update(_read_bundled())
