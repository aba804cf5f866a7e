"""What would make a plan fit: the smallest changes, each tried by planning again."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from engine.capacity.hardware import gpus
from engine.capacity.memory.parallel import possible_tp
from engine.capacity.memory.plan import Plan, plan
from engine.capacity.memory.request import PlanRequest
from engine.capacity.text import GIB
from engine.errors import HeadroomError

_SAFE_UTILIZATION = 0.95
_MOST_GPUS = 16
_FULL_KV = ("bfloat16", "float16", "float32")


@dataclasses.dataclass(frozen=True, slots=True)
class Remedy:
    """One change that makes the goal fit.

    Attributes:
        kind: "utilization", "max_num_seqs", "kv_dtype", "weights", "both", "tp", "tp_fp8", "gpu", "context" or
            "concurrency".
        title: what to do.
        cost: what it costs, in a few words.
        changes: fields of :class:`~engine.capacity.memory.request.PlanRequest` with their new values.
        spare_bytes: what is then left for more KV cache on one GPU beyond the goal.
    """

    kind: str
    title: str
    cost: str
    changes: dict[str, Any]
    spare_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """JSON form; a GPU is given by name."""
        changes = {name: getattr(value, "name", value) for name, value in self.changes.items()}
        return {
            "kind": self.kind,
            "title": self.title,
            "cost": self.cost,
            "changes": changes,
            "spare_gib": self.spare_bytes / GIB,
        }


def what_would_fit(request: PlanRequest) -> tuple[Remedy, ...]:
    """Changes that make an unfitting goal fit, from what costs least to what costs most; () if it fits already.

    Every one is verified: it is listed only if a plan with it fits.

    >>> from engine.capacity.model.catalog import model_spec
    >>> from engine.capacity.hardware import find_gpu
    >>> tight = PlanRequest(model_spec("Llama-3.1-70B"), find_gpu("H100 SXM 80GB"), context=8192, concurrency=16)
    >>> [remedy.title for remedy in what_would_fit(tight)][:2]
    ['INT4 weights (groups of 128) and FP8 KV cache', '2 GPUs, FP8 weights and FP8 KV cache']

    Raises:
        ConfigError: if the request itself is not possible.
    """
    now = plan(request)
    if now.fits:
        return ()
    found = []
    for kind, title, cost, changes in _candidates(now):
        try:
            then = plan(dataclasses.replace(request, **changes))
        except HeadroomError:
            continue
        if then.fits:
            found.append(Remedy(kind, title, cost, changes, then.memory.kv - then.kv_bytes_needed))
    return _without_needless(found)


_Candidate = tuple[str, str, str, dict[str, Any]]


def _candidates(now: Plan) -> Iterator[_Candidate]:
    """In the order of what they cost an operator."""
    yield from _settings(now)
    yield from _precisions(now)
    yield from _hardware(now)
    yield from _smaller_goals(now)


def _settings(now: Plan) -> Iterator[_Candidate]:
    full = now.request
    if full.max_num_seqs > full.concurrency:
        yield (
            "max_num_seqs",
            f"Reserve for {full.concurrency:,} request{'s' if full.concurrency > 1 else ''} at most",
            f"no batch above {full.concurrency:,}, instead of {full.max_num_seqs:,}",
            {"max_num_seqs": full.concurrency},
        )
    if full.utilization < _SAFE_UTILIZATION:
        yield (
            "utilization",
            f"Raise the memory utilization to {_SAFE_UTILIZATION:g}",
            f"less reserve than now ({full.utilization:g}) for other processes on the GPU",
            {"utilization": _SAFE_UTILIZATION},
        )


def _precisions(now: Plan) -> Iterator[_Candidate]:
    weight_bits = now.request.weights.bits
    smaller_kv = now.request.kv_dtype.name in _FULL_KV
    lossy = "slightly lossy: check quality on your prompts"
    lossier = "lossy: check quality on your prompts"
    fp8, int4 = "FP8 weights", "INT4 weights (groups of 128)"
    if smaller_kv:
        yield "kv_dtype", "FP8 KV cache", lossy, {"kv_dtype": "fp8"}
    if weight_bits > 8:
        yield "weights", fp8, lossy, {"weights": "fp8"}
        if smaller_kv:
            yield "both", f"{fp8} and FP8 KV cache", lossy, {"weights": "fp8", "kv_dtype": "fp8"}
    if weight_bits > 4:
        yield "weights", int4, lossier, {"weights": "int4-g128"}
        if smaller_kv:
            yield "both", f"{int4} and FP8 KV cache", lossier, {"weights": "int4-g128", "kv_dtype": "fp8"}


def _hardware(now: Plan) -> Iterator[_Candidate]:
    full = now.request
    for tp in possible_tp(full.spec, _MOST_GPUS):
        if tp > full.tp:
            more = (tp - full.tp) * full.pp
            cost = f"{more} more × {full.gpu.name}"
            yield "tp", f"{tp} GPUs (tensor parallel)", cost, {"tp": tp}
            if full.weights.bits > 8 and full.kv_dtype.name in _FULL_KV:
                changes = {"tp": tp, "weights": "fp8", "kv_dtype": "fp8"}
                yield "tp_fp8", f"{tp} GPUs, FP8 weights and FP8 KV cache", f"{cost}; slightly lossy", changes
    for gpu in sorted(gpus(), key=lambda gpu: gpu.usable_gib):
        if gpu.usable_gib > full.gpu.usable_gib:
            count = full.tp * full.pp
            title = f"{gpu.name} instead" if count == 1 else f"{count} × {gpu.name} instead"
            yield "gpu", title, f"{gpu.usable_gib:,.0f} instead of {full.gpu.usable_gib:,.0f} GiB a GPU", {"gpu": gpu}


def _smaller_goals(now: Plan) -> Iterator[_Candidate]:
    full = now.request
    if 0 < now.max_context < full.context:
        title = f"A context of {now.max_context:,} tokens"
        yield "context", title, f"instead of {full.context:,}", {"context": now.max_context}
    if 0 < now.max_concurrency < full.concurrency:
        title = f"{now.max_concurrency:,} request{'s' if now.max_concurrency > 1 else ''} at once"
        yield "concurrency", title, f"instead of {full.concurrency:,}", {"concurrency": now.max_concurrency}


def _without_needless(found: list[Remedy]) -> tuple[Remedy, ...]:
    """The first of each kind, and no combination of which a part is enough alone."""
    kept: list[Remedy] = []
    kinds: set[str] = set()
    for remedy in found:
        alone = any(_is_part(other.changes, remedy.changes) for other in kept)
        if remedy.kind in kinds or alone:
            continue
        kinds.add(remedy.kind)
        kept.append(remedy)
    return tuple(kept)


def _is_part(less: dict[str, Any], more: dict[str, Any]) -> bool:
    """True if ``more`` changes all that ``less`` does, and as far."""
    return all(
        name in more and (more[name] == value or (name == "tp" and more[name] > value)) for name, value in less.items()
    )
