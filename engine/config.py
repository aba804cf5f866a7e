"""Every knob of the engine, once: type, bounds, default, help, tier.

The Live page draws its controls from :func:`knobs`, the command line parses ``--set name=value`` with
:meth:`EngineConfig.with_changes`, the HTTP API publishes :func:`schema`. A new knob is one new field here plus
the place that reads it (and it must be read where it acts, at each step, if its tier is ``live``).

Tiers (see DESIGN: "Rules of the house"):

* ``live``    takes effect at the next step.
* ``swap``    the engine pauses between two steps, swaps weights or cache format, and resumes.
* ``reload``  fixed while a model is loaded: changing it loads the model again.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import types
import typing
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Any, Literal, Union, get_args, get_origin

from engine.errors import ConfigError, shown

DEFAULT_MODEL = "smollm2-135m"
"""The embedded model: fetched as a package, small enough for any machine."""


class Tier(StrEnum):
    """When a change of a knob takes effect."""

    LIVE = "live"
    SWAP = "swap"
    RELOAD = "reload"


@dataclasses.dataclass(frozen=True, slots=True)
class Knob:
    """What a control needs to know to draw one knob.

    Attributes:
        name: field name in :class:`EngineConfig`, the name used by ``--set`` and the API.
        label: short human label.
        help: one or two sentences for an operator.
        group: heading under which controls are gathered.
        tier: when a change takes effect.
        lossless: True if the generated tokens do not depend on it (up to rounding).
        kind: ``"choice" | "int" | "float" | "bool" | "str"``.
        choices: allowed values of a choice, else ``()``.
        minimum, maximum: inclusive bounds of a number, None where unbounded.
        unit: unit of a number, ``""`` if dimensionless.
        optional: True if ``None`` ("auto") is allowed.
        default: value of a fresh configuration.
        depends_on: ``(knob, value)`` — the control only matters while that knob has that value.
    """

    name: str
    label: str
    help: str
    group: str
    tier: Tier
    lossless: bool
    kind: str
    choices: tuple[str, ...]
    minimum: float | None
    maximum: float | None
    unit: str
    optional: bool
    default: Any
    depends_on: tuple[str, str] | None

    def to_dict(self) -> dict[str, Any]:
        """JSON form, as published by ``GET /admin/config``."""
        return dataclasses.asdict(self)


def _knob(
    default: Any,
    *,
    label: str,
    help: str,
    group: str,
    tier: Tier,
    lossless: bool = True,
    minimum: float | None = None,
    maximum: float | None = None,
    unit: str = "",
    depends_on: tuple[str, str] | None = None,
) -> Any:
    metadata = {
        "label": label,
        "help": help,
        "group": group,
        "tier": tier,
        "lossless": lossless,
        "minimum": minimum,
        "maximum": maximum,
        "unit": unit,
        "depends_on": depends_on,
    }
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, slots=True)
class EngineConfig:
    """One immutable setting of every knob; ``with_changes`` gives the next one or raises, never half of it."""

    # -- batching ------------------------------------------------------------------------------------
    batching: Literal["continuous", "static"] = _knob(
        "continuous",
        label="Batching",
        group="Batching",
        tier=Tier.LIVE,
        help="continuous: requests join and leave the batch at every step. static: a batch is formed, runs until "
        "its longest request is done, and only then the next one starts (the honest baseline).",
    )
    max_running: int = _knob(
        64,
        label="Max running requests",
        group="Batching",
        tier=Tier.LIVE,
        minimum=1,
        maximum=4096,
        unit="requests",
        help="How many requests may be in the batch at once. At most the capacity envelope `max_num_seqs`.",
    )
    max_waiting: int = _knob(
        1024,
        label="Max waiting requests",
        group="Batching",
        tier=Tier.LIVE,
        minimum=0,
        maximum=1_000_000,
        unit="requests",
        help="How many requests may wait besides the `max_running` that run. One more is refused with the advice to "
        "try again a little later, instead of waiting in a queue that only grows.",
    )
    token_budget: int = _knob(
        512,
        label="Token budget per step",
        group="Batching",
        tier=Tier.LIVE,
        minimum=1,
        maximum=65536,
        unit="tokens",
        help="How many tokens one step may process, prompt and output together. Lower: steadier inter-token "
        "latency. Higher: faster prefill.",
    )
    chunked_prefill: bool = _knob(
        True,
        label="Chunked prefill",
        group="Batching",
        tier=Tier.LIVE,
        help="on: a long prompt is processed in pieces that fit the token budget, next to running decodes. "
        "off: a prompt is processed in one step and may then exceed the token budget, up to the envelope "
        "`max_num_batched_tokens`, which memory is reserved for.",
    )
    preemption: bool = _knob(
        True,
        label="Preemption",
        group="Batching",
        tier=Tier.LIVE,
        help="on: when KV blocks run out the youngest request is put back and recomputed later. "
        "off: a request is admitted only when the blocks for its longest possible output are free (requests admitted "
        "before it was switched off may still be put back).",
    )
    # -- cache -----------------------------------------------------------------------------------------
    prefix_cache: bool = _knob(
        True,
        label="Prefix cache",
        group="Cache",
        tier=Tier.LIVE,
        help="Keep the KV blocks of finished requests and reuse them for prompts that start the same way.",
    )
    kv_dtype: Literal["model", "fp8", "int8", "int4"] = _knob(
        "model",
        label="KV cache precision",
        group="Cache",
        tier=Tier.SWAP,
        lossless=False,
        help="Number format of stored keys and values. model: the dtype the model computes in. fp8 (e4m3), int8: one "
        "byte a value and a scale for each token and head. int4: half a byte, with scale and minimum. The memory stays "
        "what it is and holds more tokens; requests in flight are computed again, and known prefixes are forgotten.",
    )
    # -- speculation -----------------------------------------------------------------------------------
    speculation: Literal["off", "ngram"] = _knob(
        "off",
        label="Speculation",
        group="Speculation",
        tier=Tier.LIVE,
        help="ngram: propose the tokens that followed the last few tokens earlier in the same text (prompt "
        "lookup), verify them in one pass. Output is unchanged; pays on repetitive text at small batches.",
    )
    draft_length: int = _knob(
        4,
        label="Draft length",
        group="Speculation",
        tier=Tier.LIVE,
        minimum=1,
        maximum=16,
        unit="tokens",
        depends_on=("speculation", "ngram"),
        help="How many tokens are proposed per request and step; with adaptive draft control the most.",
    )
    draft_control: Literal["fixed", "adaptive"] = _knob(
        "fixed",
        label="Draft control",
        group="Speculation",
        tier=Tier.LIVE,
        depends_on=("speculation", "ngram"),
        help="fixed: every draft has the draft length. adaptive: drafts follow how many tokens were accepted lately, "
        "and stop where the measured time of steps shows that they do not pay at the current batch size.",
    )
    ngram_max: int = _knob(
        4,
        label="Longest n-gram to match",
        group="Speculation",
        tier=Tier.LIVE,
        minimum=1,
        maximum=16,
        unit="tokens",
        depends_on=("speculation", "ngram"),
        help="The proposer looks for the longest suffix of the text, up to this many tokens, that occurred before.",
    )
    ngram_min: int = _knob(
        2,
        label="Shortest n-gram to match",
        group="Speculation",
        tier=Tier.LIVE,
        minimum=1,
        maximum=16,
        unit="tokens",
        depends_on=("speculation", "ngram"),
        help="Below this match length nothing is proposed.",
    )
    # -- execution -------------------------------------------------------------------------------------
    attention: Literal["auto", "native", "sdpa", "triton", "reference"] = _knob(
        "auto",
        label="Attention backend",
        group="Execution",
        tier=Tier.LIVE,
        help="auto: the quickest that runs here. native: our C++ kernel for the CPU reads the paged cache in place "
        "(needs a C++ compiler, once). sdpa: torch's fused attention over gathered blocks. reference: plain softmax in "
        "float32, slow, to check the others. triton: our paged kernel (needs a GPU; on the CPU it runs in Triton's "
        "interpreter).",
    )
    execution: Literal["auto", "eager", "native", "fused", "compiled", "graphs"] = _knob(
        "auto",
        label="Execution",
        group="Execution",
        tier=Tier.LIVE,
        help="eager: every operation is launched from Python. native: all layers are one call of our C++ kernels for "
        "the CPU (needs native attention and linear layers). fused: layers through our fused Triton kernels (needs a "
        "GPU and attention=triton). compiled: each layer is one compiled program (needs a C++ compiler). graphs: "
        "decode batches replay CUDA graphs of the fused layers (same needs as fused). Compiled and graphs are "
        "prepared while eager or fused goes on serving. auto: native on a CPU, fused on a GPU, else eager.",
    )
    linear: Literal["auto", "native", "triton", "torch"] = _knob(
        "auto",
        label="Linear layers",
        group="Execution",
        tier=Tier.SWAP,
        help="Kernels of the linear layers. native: our C++ kernels for the CPU (weights in panels, float32 sums; INT8 "
        "and INT4 weights multiply activations of 16 bits; need a C++ compiler, once). triton: our kernels for "
        "quantized weights on a GPU. torch: torch's own operators. auto: the quickest that runs here.",
    )
    sampling: Literal["auto", "torch", "triton"] = _knob(
        "auto",
        label="Sampler",
        group="Execution",
        tier=Tier.LIVE,
        help="What samples tokens where a request sets a temperature. torch: torch's own operators, sorting where "
        "top-k or top-p needs it. triton: our kernels, which search instead of sorting (need a GPU). The tokens are "
        "the same. auto: triton on a GPU.",
    )
    # -- weights ---------------------------------------------------------------------------------------
    weights: Literal["model", "int8", "int4", "w4a8", "w8a8", "fp8"] = _knob(
        "model",
        label="Weight precision",
        group="Weights",
        tier=Tier.SWAP,
        lossless=False,
        help="model: as loaded. int8: one scale per output channel. int4: round-to-nearest in groups with scale "
        "and zero point. w4a8: int4 in groups of 32, and activations of 8 bits in the same groups, as in "
        "llama.cpp; the quickest on a CPU, slow on a GPU. w8a8, fp8: activations too have 8 bits, INT8 or FP8 (e4m3), "
        "with a scale for each token; for the matrix units of a GPU, slow on a CPU. Switching back to model restores "
        "the exact weights from the checkpoint.",
    )
    group_size: Literal["32", "64", "128"] = _knob(
        "32",
        label="INT4 group size",
        group="Weights",
        tier=Tier.SWAP,
        lossless=False,
        unit="weights",
        depends_on=("weights", "int4"),
        help="Weights that share one scale and zero point. Smaller: more exact, more bytes.",
    )
    head_weights: Literal["model", "int8"] = _knob(
        "model",
        label="Head precision",
        group="Weights",
        tier=Tier.SWAP,
        lossless=False,
        help="Number format of the output projection, and of the token embedding where the model ties the two. "
        "int8: one scale per token; a small model reads its head as long as all its layers.",
    )
    # -- capacity envelope -----------------------------------------------------------------------------
    model: str = _knob(
        DEFAULT_MODEL,
        label="Model",
        group="Envelope",
        tier=Tier.RELOAD,
        lossless=False,
        help=f"{DEFAULT_MODEL} (the embedded default), a folder of safetensors, a .gguf file, or a hub id.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _knob(
        "auto",
        label="Compute dtype",
        group="Envelope",
        tier=Tier.RELOAD,
        lossless=False,
        help="auto: bfloat16 where the device has fast bfloat16, else float32.",
    )
    device: str = _knob(
        "auto",
        label="Device",
        group="Envelope",
        tier=Tier.RELOAD,
        help="auto: the first CUDA device if there is one, else cpu. Or a torch device such as cuda:1.",
    )
    block_size: int = _knob(
        16,
        label="KV block size",
        group="Envelope",
        tier=Tier.RELOAD,
        minimum=1,
        maximum=256,
        unit="tokens",
        help="Tokens per block of the paged KV cache.",
    )
    memory_limit_gib: float | None = _knob(
        None,
        label="Memory limit",
        group="Envelope",
        tier=Tier.RELOAD,
        minimum=0.001,
        maximum=100000.0,
        unit="GiB",
        help="Memory for weights, activations and KV cache together. auto: 90 % of a GPU; on a CPU the larger of "
        "4 GiB and twice the weights, but never more than half of what is free.",
    )
    max_num_seqs: int = _knob(
        64,
        label="Max sequences (envelope)",
        group="Envelope",
        tier=Tier.RELOAD,
        minimum=1,
        maximum=4096,
        unit="requests",
        help="The largest batch that memory is reserved for; `max_running` may be set anywhere up to it.",
    )
    max_num_batched_tokens: int = _knob(
        2048,
        label="Max tokens per step (envelope)",
        group="Envelope",
        tier=Tier.RELOAD,
        minimum=1,
        maximum=65536,
        unit="tokens",
        help="The largest step that activation memory is reserved for; `token_budget` may be set anywhere up to it.",
    )
    max_model_len: int | None = _knob(
        None,
        label="Max context",
        group="Envelope",
        tier=Tier.RELOAD,
        minimum=2,
        maximum=100_000_000,
        unit="tokens",
        help="Longest prompt plus output of one request. auto: the model's own context length.",
    )
    threads: int | None = _knob(
        None,
        label="CPU threads",
        group="Envelope",
        tier=Tier.RELOAD,
        minimum=1,
        maximum=1024,
        unit="threads",
        help="Threads torch computes with. auto: all cores of the machine.",
    )

    def __post_init__(self) -> None:
        for spec in knobs():  # whoever made it, every value is of its kind and within its bounds
            object.__setattr__(self, spec.name, _parse_value(spec, getattr(self, spec.name)))
        if self.ngram_min > self.ngram_max:
            raise ConfigError(
                f"{self.ngram_min} is larger than ngram_max {self.ngram_max}.",
                field="ngram_min",
                remedy="Lower ngram_min or raise ngram_max.",
            )
        if self.max_running > self.max_num_seqs:
            raise ConfigError(
                f"{self.max_running} is above the loaded envelope of {self.max_num_seqs} sequences.",
                field="max_running",
                remedy="Lower max_running, or load the model with a larger max_num_seqs.",
            )

        if self.token_budget > self.max_num_batched_tokens:
            raise ConfigError(
                f"{self.token_budget} is above the loaded envelope of {self.max_num_batched_tokens} tokens.",
                field="token_budget",
                remedy="Lower token_budget, or load the model with a larger max_num_batched_tokens.",
            )

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> EngineConfig:
        """A configuration from knob names and values (strings as on the command line are parsed).

        Where only one of a policy (`max_running`, `token_budget`) and its envelope (`max_num_seqs`,
        `max_num_batched_tokens`) is given, the other one follows.

        Raises:
            ConfigError: naming the knob and the remedy.
        """
        parsed = _parse_changes(values)
        for policy, envelope in (("max_running", "max_num_seqs"), ("token_budget", "max_num_batched_tokens")):
            if policy in parsed and envelope not in parsed:
                parsed[envelope] = max(parsed[policy], knob(envelope).default)
            elif envelope in parsed and policy not in parsed:
                parsed[policy] = min(parsed[envelope], knob(policy).default)
        return cls(**parsed)

    def with_changes(self, changes: Mapping[str, Any]) -> EngineConfig:
        """This configuration with ``changes`` applied: all of them or, on any error, none.

        Raises:
            ConfigError: naming the knob and the remedy.
        """
        return dataclasses.replace(self, **_parse_changes(changes))

    def difference(self, other: EngineConfig) -> dict[str, tuple[Any, Any]]:
        """Knobs whose values differ: ``{name: (self's, other's)}``."""
        mine, theirs = self.to_dict(), other.to_dict()
        return {name: (mine[name], theirs[name]) for name in mine if mine[name] != theirs[name]}

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready mapping of knob name to value."""
        return dataclasses.asdict(self)

    def hash(self) -> str:
        """First 16 hex digits of the SHA-256 over the canonical JSON of all knobs."""
        canonical = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]


@functools.cache
def knobs() -> tuple[Knob, ...]:
    """All knobs in the order of their declaration."""
    hints = typing.get_type_hints(EngineConfig)
    return tuple(_describe(field, hints[field.name]) for field in dataclasses.fields(EngineConfig))


#: Values that extensions have added to knobs that are choices, by the knob's name.
_ADDED_CHOICES: dict[str, tuple[str, ...]] = {}


def add_choice(name: str, value: str) -> Callable[[], None]:
    """Let a knob that is a choice take one more value: what an extension calls when it registers what the value names.

    Page, command line, API and error messages offer the value from then on.

    Args:
        name: of the knob, e.g. "weights"; value: the new choice, e.g. "toy".

    Returns:
        A function that takes the value away again.

    Raises:
        ConfigError: if there is no such knob, it is no choice, or it has the value already.
    """
    spec = knob(name)
    if spec.kind != "choice" or value in spec.choices:
        why = "is not a choice" if spec.kind != "choice" else f"already has {shown(value)}"
        raise ConfigError(f"the knob {why}.", field=name, remedy="Extend a choice by a value of another name.")
    _set_added(name, (*_ADDED_CHOICES.get(name, ()), value))

    def remove() -> None:
        _set_added(name, tuple(choice for choice in _ADDED_CHOICES.get(name, ()) if choice != value))

    return remove


def _set_added(name: str, values: tuple[str, ...]) -> None:
    _ADDED_CHOICES[name] = values
    knobs.cache_clear()


def knob(name: str) -> Knob:
    """The knob of that name.

    Raises:
        ConfigError: if there is none; the message lists near misses.
    """
    for candidate in knobs():
        if candidate.name == name:
            return candidate
    raise _unknown_knob(name)


def schema() -> list[dict[str, Any]]:
    """JSON description of all knobs, in order, as published by the API."""
    return [candidate.to_dict() for candidate in knobs()]


def parse_assignments(assignments: typing.Iterable[str]) -> dict[str, str]:
    """``["batching=static", …]`` as given to ``--set`` → ``{"batching": "static", …}`` (values unparsed).

    Raises:
        ConfigError: if an item has no ``=``.
    """
    values: dict[str, str] = {}
    for item in assignments:
        name, separator, value = item.partition("=")
        if not separator:
            raise ConfigError(
                f"{item!r} is not of the form knob=value.",
                field="--set",
                remedy="Write e.g. batching=static.",
            )
        values[name.strip()] = value.strip()
    return values


def _describe(field: dataclasses.Field[Any], hint: Any) -> Knob:
    kind, choices, optional = _kind_of(hint)
    return Knob(
        name=field.name,
        kind=kind,
        choices=choices + _ADDED_CHOICES.get(field.name, ()),
        optional=optional,
        default=field.default,
        **field.metadata,
    )


def _kind_of(hint: Any) -> tuple[str, tuple[str, ...], bool]:
    """(kind, choices, optional) of a field's annotation."""
    optional = False
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(member for member in get_args(hint) if member is not type(None))
        optional = True
    if get_origin(hint) is Literal:
        return "choice", tuple(get_args(hint)), optional
    return {bool: "bool", int: "int", float: "float", str: "str"}[hint], (), optional


def _unknown_knob(name: str) -> ConfigError:
    import difflib

    names = [candidate.name for candidate in knobs()]
    close = difflib.get_close_matches(name, names, n=3)
    remedy = f"Did you mean {' or '.join(close)}?" if close else f"Known knobs: {', '.join(names)}."
    return ConfigError(f"there is no knob named {name!r}.", field=name, remedy=remedy)


def _parse_changes(changes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _parse_value(knob(name), value) for name, value in changes.items()}


LONGEST_NAME = 4096
_TRUE = {"on", "true", "1", "yes"}
_FALSE = {"off", "false", "0", "no"}


def _parse_value(spec: Knob, value: Any) -> Any:
    """``value`` in the knob's own type, from JSON or from a command-line string."""
    if value is None or (spec.optional and isinstance(value, str) and value.lower() in ("auto", "none")):
        if spec.optional:
            return None
        raise ConfigError("needs a value.", field=spec.name, remedy=_allowed(spec))
    if spec.kind == "bool":
        return _parse_bool(spec, value)
    if spec.kind == "choice":
        choice = value if isinstance(value, str) else shown(value)  # 32 from JSON is "32"
        if choice in spec.choices:
            return choice
        raise ConfigError(f"{shown(value)} is not available.", field=spec.name, remedy=_allowed(spec))
    if spec.kind == "str":
        if isinstance(value, str) and 0 < len(value) <= LONGEST_NAME and _is_name(value):
            return value
        remedy = f"Give a text of 1 to {LONGEST_NAME:,} characters."
        raise ConfigError(f"{shown(value)} is not a name.", field=spec.name, remedy=remedy)
    return _parse_number(spec, value)


def _is_name(text: str) -> bool:
    """False for what no file system and no encoder takes: NUL, half a surrogate pair."""
    return "\0" not in text and not any("\ud800" <= character <= "\udfff" for character in text)


def _parse_bool(spec: Knob, value: Any) -> bool:
    text = str(value).lower() if isinstance(value, bool | str) or value in (0, 1) else ""
    if text in _TRUE:
        return True
    if text in _FALSE:
        return False
    raise ConfigError(f"{shown(value)} is neither on nor off.", field=spec.name, remedy=_allowed(spec))


def _parse_number(spec: Knob, value: Any) -> int | float:
    convert = int if spec.kind == "int" else float
    try:
        if isinstance(value, bool):
            raise ValueError
        number = convert(value)
        if number != float(value):  # 1.5 for an int; NaN differs from itself
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        message = f"{shown(value)} is not a valid {spec.kind}."
        raise ConfigError(message, field=spec.name, remedy=_allowed(spec)) from None
    below = spec.minimum is not None and number < spec.minimum
    above = spec.maximum is not None and number > spec.maximum
    if below or above:
        raise ConfigError(f"{shown(number)} is out of bounds.", field=spec.name, remedy=_allowed(spec))
    return number


def _allowed(spec: Knob) -> str:
    """The remedy sentence: what this knob accepts."""
    unit = f" {spec.unit}" if spec.unit else ""
    auto = ", or auto" if spec.optional else ""
    if spec.kind == "choice":
        return f"Choose one of: {', '.join(spec.choices)}."
    if spec.kind == "bool":
        return "Choose on or off."
    if spec.minimum is not None and spec.maximum is not None:
        number = "a whole number" if spec.kind == "int" else "a number"
        return f"Give {number} from {spec.minimum:g} to {spec.maximum:g}{unit}{auto}."
    return f"Give a {spec.kind}{auto}."
