"""What a lossy setting costs in quality: perplexity, and the distance to the unquantized model.

The text is cut into windows; each window is computed from scratch, and a position is scored once, with at least
``window − stride`` tokens before it (except in the first window):

    window 1  |############|                     # scored
    window 2      |........####|                 . context only
    window 3          |........####|
                      stride ->|   |

    perplexity   exp(mean NLL), standard error by the delta method: ppl · s_NLL / √n
    KL           D(P ‖ Q) = Σ p·ln(p/q) in nats at each scored position, P the reference, Q what is measured
    same top     share of positions at which P and Q have the same most likely token

Standard errors take positions as independent; neighbouring ones are not quite, so they are a little optimistic.
KL and same top compare the two models at the same positions, so they show differences far smaller than the standard
error of the perplexity. A model against itself gives the noise floor: exactly 0.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from engine.config import Tier, knob, knobs
from engine.errors import HeadroomError, WorkloadError
from engine.measure.prompts import corpus_documents, opening_tokens

if TYPE_CHECKING:
    from engine.worker.loop import EngineLoop

REFERENCE_BYTES = 256 * 2**20
"""Most bytes of reference logits that are kept at once; a longer text is done in parts."""


@dataclasses.dataclass(frozen=True, slots=True)
class Window:
    """Tokens ``start:end`` are computed; the predictions of tokens ``first_scored:end`` count."""

    start: int
    end: int
    first_scored: int


@dataclasses.dataclass(frozen=True, slots=True)
class QualityStats:
    """Quality of one setting on one text.

    Attributes:
        changes: the knobs that were set.
        path: what really ran (weights, dtype …).
        tokens: scored positions.
        perplexity, perplexity_se: with its standard error.
        kl_mean, kl_mean_se, kl_median, kl_p99, kl_max: nats, against the reference.
        same_top_percent, same_top_percent_se: against the reference.
        reference: what the reference's weights are stored as, see :func:`describe_reference`.
    """

    changes: dict[str, Any]
    path: dict[str, str]
    tokens: int
    perplexity: float
    perplexity_se: float
    kl_mean: float
    kl_mean_se: float
    kl_median: float
    kl_p99: float
    kl_max: float
    same_top_percent: float
    same_top_percent_se: float
    reference: str = ""

    def metrics(self) -> dict[str, float | None]:
        """As metrics of a run, see :data:`engine.measure.metrics.METRICS`."""
        return {
            "perplexity": self.perplexity,
            "perplexity_se": self.perplexity_se,
            "kl_mean_nats": self.kl_mean,
            "kl_p99_nats": self.kl_p99,
            "same_top_percent": self.same_top_percent,
        }


@dataclasses.dataclass(frozen=True, slots=True)
class QualityComparison:
    """Two settings next to the unquantized model.

    Attributes:
        a, b: the two settings; reference: the unquantized model, whose distance to itself is 0.
        text: name of the text; text_hash: SHA-256 (hex) of its token ids.
        window, stride: in tokens.
        lossy: False if neither setting changes a knob that can change the tokens; then a, b and reference agree by
            construction and only the reference was run.
    """

    a: QualityStats
    b: QualityStats
    reference: QualityStats
    text: str
    text_hash: str
    window: int
    stride: int
    lossy: bool

    def describe(self, stats: QualityStats) -> str:
        """One line about one of the settings, with what is needed to compare it elsewhere."""
        scope = f"{stats.tokens} tokens of the {self.text}, window {self.window}, stride {self.stride}"
        return (
            f"quality: perplexity {stats.perplexity:.3f} ± {stats.perplexity_se:.3f}, "
            f"KL mean {stats.kl_mean:.4f} nats, same top token {stats.same_top_percent:.1f} %, "
            f"reference: {stats.reference or 'not stated'} ({scope})"
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return dataclasses.asdict(self)


class QualityAccumulator:
    """Collects scored positions, window by window."""

    def __init__(self) -> None:
        self._nll: list[torch.Tensor] = []
        self._kl: list[torch.Tensor] = []
        self._same: list[torch.Tensor] = []

    def add(self, logits: torch.Tensor, reference: torch.Tensor, targets: torch.Tensor) -> None:
        """Score positions.

        Args:
            logits, reference: [T, vocab], any float dtype; of the measured and the reference model.
            targets: int64 [T], the token that really follows.
        """
        self._nll.append(token_nll(logits, targets))
        self._kl.append(kl_divergence(reference, logits))
        self._same.append(reference.argmax(dim=-1) == logits.argmax(dim=-1))

    def stats(self, changes: Mapping[str, Any], path: Mapping[str, str]) -> QualityStats:
        """Figures over everything added so far (at least one position)."""
        nll, kl = torch.cat(self._nll).double(), torch.cat(self._kl).double()
        same = torch.cat(self._same).double()
        perplexity, perplexity_se = perplexity_of(nll)
        share = float(same.mean())
        return QualityStats(
            changes=dict(changes),
            path=dict(path),
            tokens=len(nll),
            perplexity=perplexity,
            perplexity_se=perplexity_se,
            kl_mean=float(kl.mean()),
            kl_mean_se=_standard_error(kl),
            kl_median=float(kl.quantile(0.5)),
            kl_p99=float(kl.quantile(0.99)),
            kl_max=float(kl.max()),
            same_top_percent=100 * share,
            same_top_percent_se=100 * math.sqrt(share * (1 - share) / len(same)),
        )


def token_nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """−ln p(target) at each position: float32 [T] of [T, vocab] logits and int64 [T] targets."""
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")


def kl_divergence(reference: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """D(P ‖ Q) in nats at each position: float32 [T]; P from ``reference``, Q from ``logits``, both [T, vocab].

    Never negative: rounding below 0 is cut off.
    """
    log_p = reference.float().log_softmax(dim=-1)
    log_q = logits.float().log_softmax(dim=-1)
    terms = log_p.exp() * (log_p - log_q)
    # where p is 0, p·ln(p/q) is 0, but 0 · (−inf) would be NaN
    return terms.masked_fill(log_p == -torch.inf, 0.0).sum(dim=-1).clamp_(min=0.0)


def perplexity_of(nll: torch.Tensor) -> tuple[float, float]:
    """(perplexity, its standard error) from the negative log-likelihoods [n] of n positions, in nats."""
    perplexity = math.exp(float(nll.double().mean()))
    return perplexity, perplexity * _standard_error(nll)


def _standard_error(values: torch.Tensor) -> float:
    if len(values) < 2:
        return math.inf
    return float(values.double().std()) / math.sqrt(len(values))


def windows(num_tokens: int, window: int, stride: int) -> Iterator[Window]:
    """Windows over a text of ``num_tokens``; every token but the first is scored exactly once.

    Raises:
        WorkloadError: if the text or the window is too short, or the stride does not fit into the window.
    """
    if window < 2 or num_tokens < 2:
        raise WorkloadError("at least two tokens are needed to score one.", field="window", remedy="Give more tokens.")
    if not 1 <= stride < window:
        remedy = f"Give a stride from 1 to {window - 1}."
        raise WorkloadError(f"a stride of {stride} does not fit a window of {window}.", field="stride", remedy=remedy)
    scored, end = 1, min(window, num_tokens)
    while True:
        yield Window(max(0, end - window), end, scored)
        if end == num_tokens:
            return
        scored, end = end, min(end + stride, num_tokens)


def is_lossy(changes: Mapping[str, Any]) -> bool:
    """True if one of these knobs, at this value, can change the tokens against the unquantized model."""
    return any(_reference_value(name) not in (None, str(value)) for name, value in changes.items())


def reference_changes() -> dict[str, Any]:
    """The knobs that bring the unquantized model back."""
    values = {spec.name: _reference_value(spec.name) for spec in knobs()}
    return {name: value for name, value in values.items() if value is not None}


def _reference_value(name: str) -> str | None:
    """The lossless value of a lossy knob that can be switched on a loaded model; None for every other knob."""
    spec = knob(name)
    if spec.lossless or spec.tier == Tier.RELOAD or "model" not in spec.choices:
        return None
    return "model"


def describe_reference(stored_as: str | None) -> str:
    """What the reference really is: the "unquantized" model has the weights of its file, which may be quantized.

    A setting that repeats the grid of the file costs nothing against such a reference, and one with another grid is
    charged for both roundings, so the figures of two models compare only where their references do.

    Args:
        stored_as: how the checkpoint keeps its weights, see :func:`engine.models.checkpoint.stored_as`; None if it is
            not known.

    Returns:
        ``"weights as stored, Q4_1 (GGUF)"``, ``"weights as stored, mostly Q4_K (78 %, GGUF)"`` …
    """
    return f"weights as stored, {stored_as}" if stored_as is not None else "weights as they are in memory"


def measure_quality(
    loop: EngineLoop,
    changes_a: Mapping[str, Any],
    changes_b: Mapping[str, Any],
    *,
    token_ids: Sequence[int] | None = None,
    text: str = "bundled corpus",
    max_tokens: int = 768,
    window: int = 256,
    stride: int = 128,
    progress: Callable[[float], None] | None = None,
    cancel: threading.Event | None = None,
) -> QualityComparison | None:
    """Quality of two settings on a text, on the live engine; the previous knobs are restored.

    Windows run one at a time between two steps, so requests in flight go on, under the setting being measured.

    Args:
        token_ids: the text, of which the first ``max_tokens`` tokens are used; if None, the beginnings of all bundled
            texts in equal parts (code, dialogue, instructions, prose, science).
        window, stride: in tokens; see the head of this module. Shortened to the context the engine was loaded with.
        progress: called with the fraction done.
        cancel: set it to end early; then None is returned.

    Raises:
        WorkloadError, ConfigError, CapacityError, EngineDeadError.
    """
    previous = {name: loop.snapshot.config.to_dict()[name] for name in {*changes_a, *changes_b, *reference_changes()}}
    in_force_a, in_force_b = {**previous, **changes_a}, {**previous, **changes_b}
    lossy = is_lossy(in_force_a) or is_lossy(in_force_b)
    window = min(window, loop.snapshot.max_model_len)
    stride = min(stride, window - 1)
    session = _Session(loop, _opened(loop, token_ids, max_tokens), window, stride, progress, cancel)
    settings = {"reference": {**previous, **reference_changes()}}
    if lossy:
        settings.update(a=in_force_a, b=in_force_b)
    try:
        stats = session.measure(settings)
    finally:
        _restore(loop, previous)
    if stats is None:
        return None
    stored = describe_reference(loop.status_now().model.get("stored_as"))
    stats = {name: dataclasses.replace(found, reference=stored) for name, found in stats.items()}
    reference = stats["reference"]
    a = dataclasses.replace(stats.get("a", reference), changes=dict(changes_a))
    b = dataclasses.replace(stats.get("b", reference), changes=dict(changes_b))
    return QualityComparison(a, b, reference, text, session.text_hash(), window, stride, lossy)


def _opened(loop: EngineLoop, token_ids: Sequence[int] | None, max_tokens: int) -> list[int]:
    """At most ``max_tokens`` tokens, begun as the tokenizer begins a text."""
    tokenizer = loop.snapshot.tokenizer
    if token_ids is None:
        documents = [tokenizer.encode(document, add_special_tokens=False) for document in corpus_documents()]
        share = -(-max_tokens // len(documents))
        token_ids = [token for document in documents for token in document[:share]]
    return (opening_tokens(tokenizer) + list(token_ids))[:max_tokens]


def _restore(loop: EngineLoop, previous: Mapping[str, Any]) -> None:
    try:
        loop.reconfigure(previous)
    except HeadroomError as error:
        if loop.alive:
            loop.add_event("error", f"the previous knobs were not restored: {error}", {"previous": dict(previous)})


class _Session:
    """Computes windows under one setting after another, in parts small enough to keep the reference's logits."""

    def __init__(
        self,
        loop: EngineLoop,
        tokens: list[int],
        window: int,
        stride: int,
        progress: Callable[[float], None] | None,
        cancel: threading.Event | None,
    ) -> None:
        self.loop = loop
        self.tokens = tokens
        self.windows = list(windows(len(self.tokens), window, stride))
        self.progress = progress
        self.cancel = cancel

    def text_hash(self) -> str:
        """SHA-256 (hex) over the token ids that were used."""
        return hashlib.sha256(repr(self.tokens).encode()).hexdigest()

    def measure(self, settings: Mapping[str, Mapping[str, Any]]) -> dict[str, QualityStats] | None:
        """Figures of each setting, the first of which is the reference; None if cancelled."""
        collected = {name: QualityAccumulator() for name in settings}
        paths: dict[str, dict[str, str]] = {}
        parts = self._parts()
        done, total = 0, len(self.windows) * len(settings)
        for part in parts:
            reference: list[torch.Tensor] = []
            for name, changes in settings.items():
                self.loop.reconfigure(changes)
                paths[name] = self.loop.status_now().path
                for number, window in enumerate(part):
                    if self.cancel is not None and self.cancel.is_set():
                        return None
                    logits = self._logits(window)
                    if len(reference) == number:  # the first setting is the reference
                        reference.append(logits)
                    targets = torch.tensor(self.tokens[window.first_scored : window.end])
                    collected[name].add(logits, reference[number], targets)
                    done += 1
                    if self.progress is not None:
                        self.progress(done / total)
        return {name: collected[name].stats(changes, paths[name]) for name, changes in settings.items()}

    def _parts(self) -> list[list[Window]]:
        bytes_per_token = self.loop.snapshot.vocab_size * 4
        parts: list[list[Window]] = [[]]
        used = 0
        for window in self.windows:
            size = (window.end - window.first_scored) * bytes_per_token
            if parts[-1] and used + size > REFERENCE_BYTES:
                parts.append([])
                used = 0
            parts[-1].append(window)
            used += size
        return parts

    def _logits(self, window: Window) -> torch.Tensor:
        """float32 [scored, vocab] on the CPU: the predictions of the window's scored tokens."""
        token_ids = self.tokens[window.start : window.end]
        logits: torch.Tensor = self.loop.call(lambda engine: engine.prompt_logits(token_ids))
        # the distribution after token i − 1 predicts token i; the last one predicts what is not in the window
        return logits[window.first_scored - 1 - window.start : len(token_ids) - 1].float().cpu().clone()
