"""Another configuration between two steps, while requests are in flight.

    any thread        prepare ── validate, make new weights ──> PreparedChange
    stepping thread             apply ── swap what is swapped, all of it or none ──> ReconfigureResult

`live` knobs are read by the next step. Weights are swapped under running requests, which keep the keys and values they
have; a cache of another format or size has running requests computed again, with the tokens they have.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from engine import parts, sizing
from engine.capacity.text import GIB
from engine.config import EngineConfig, Tier, knob
from engine.core import Engine
from engine.errors import CapacityError, ConfigError
from engine.outputs import CacheOffer, ReconfigureResult
from engine.speculation.proposers.table import make_proposer, needs_new_proposer

if TYPE_CHECKING:
    from engine.models import PreparedWeights

logger = logging.getLogger(__name__)

LEAST_GAIN = 0.01  # of the blocks there are: less is not worth computing running requests again


@dataclasses.dataclass(frozen=True, slots=True)
class PreparedChange:
    """A validated change of knobs, with the work that could be done alongside the running engine already done.

    Attributes:
        changes: knob names and values.
        weights: quantized weights ready to be swapped; None if they stay.
        shrinks_cache: the cache gives blocks back for heavier weights.
        prepare_ms: how long the preparation took.
    """

    changes: dict[str, Any]
    weights: PreparedWeights | None
    shrinks_cache: bool
    prepare_ms: float


def reconfigure(engine: Engine, changes: Mapping[str, Any]) -> ReconfigureResult:
    """Prepare and apply in one go (the stepping thread's own way; a loop prepares in another thread).

    Raises:
        ConfigError, CapacityError: naming the knob and the remedy; then nothing has changed.
    """
    return apply(engine, prepare(engine, changes))


def prepare(engine: Engine, changes: Mapping[str, Any]) -> PreparedChange:
    """Validate a change and do what can be done alongside the running engine, which it does not change.

    For any thread, as long as nobody else changes the engine's configuration meanwhile.

    Raises:
        ConfigError, CapacityError: naming the knob and the remedy.
    """
    began, model = time.perf_counter(), engine.model
    target = engine.config.with_changes(changes)
    differences = engine.config.difference(target)
    fixed = [name for name in differences if knob(name).tier == Tier.RELOAD]
    if fixed:
        raise ConfigError(
            f"is fixed while a model is loaded ({differences[fixed[0]][0]!r} now).",
            field=fixed[0],
            remedy="Load the model again with the new value.",
        )
    engine.executor.check(target, parts.choose_kernels(model, target).attention)
    weights, shrinks, envelope = None, False, engine.envelope
    if "kv_dtype" in differences:
        envelope = sizing.resize_cache(model, target, envelope)
    choice = parts.weight_choice(model, target)
    if not choice.same_as(model.weights_choice):
        shrinks = sizing.make_room_for_weights(model, envelope, target).num_blocks < envelope.num_blocks
        with sizing.Explained(lambda: sizing.swap_shortage(model, target)):
            weights = model.prepare_weights(choice.weights, choice.group_size, head=choice.head, linear=choice.linear)
    return PreparedChange(dict(changes), weights, shrinks, (time.perf_counter() - began) * 1e3)


def apply(engine: Engine, prepared: PreparedChange) -> ReconfigureResult:
    """Make a prepared change between two steps; all of it or, on an error, none.

    Raises:
        ConfigError, CapacityError: naming the knob and the remedy.
    """
    began = time.perf_counter()
    target = engine.config.with_changes(prepared.changes)
    differences = engine.config.difference(target)
    kernels = parts.choose_kernels(engine.model, target)
    new_proposer = needs_new_proposer(target, differences.keys())
    proposer = make_proposer(target) if new_proposer else engine.drafting.proposer
    notes: list[str] = []
    if "kv_dtype" in differences or prepared.shrinks_cache:
        room = sizing.resize_cache(engine.model, target, engine.envelope)
        notes += _swap_cache(engine, target, room, prepared.weights)
    elif prepared.weights is not None:  # the last thing that can fail
        notes += _swap_weights(engine, prepared.weights, target)
    if new_proposer:
        engine.drafting.proposer = proposer
        engine.drafting.discard(engine.scheduler.running)
    if differences:
        engine.drafting.measure_again()
    engine.config, engine.kernels = target, kernels
    engine.admission = parts.make_admission(engine.model, target, engine.envelope)
    engine.executor.configure(target, kernels.attention)
    if prepared.weights is not None and (offer := cache_on_offer(engine)) is not None:
        notes.append(
            f"the KV cache could take {offer.gained_bytes / GIB:.2f} GiB more: {offer.num_blocks:,} blocks "
            f"instead of {engine.envelope.num_blocks:,} (resize)"
        )
    tiers = {knob(name).tier for name in differences}
    result = ReconfigureResult(
        changed=differences,
        tier="swap" if Tier.SWAP in tiers else ("live" if tiers else "none"),
        pause_ms=(time.perf_counter() - began) * 1e3,
        prepare_ms=prepared.prepare_ms,
        requests_in_flight=len(engine.streams),
        notes=notes,
    )
    if differences:
        _announce(engine, "reconfigure", _describe(result), result)
    return result


def cache_on_offer(engine: Engine) -> CacheOffer | None:
    """What :func:`resize` would give; None where lighter weights have left the cache nothing worth taking."""
    larger = _larger_envelope(engine)
    if larger is None:
        return None
    gained = larger.num_blocks - engine.envelope.num_blocks
    return CacheOffer(larger.num_blocks, gained, gained * engine.cache.nbytes // engine.cache.num_blocks)


def _larger_envelope(engine: Engine) -> sizing.Envelope | None:
    """What the memory holds with the present weights; None if that is hardly more."""
    larger, blocks = sizing.cache_on_offer(engine.model, engine.config, engine.envelope), engine.envelope.num_blocks
    return larger if larger.num_blocks - blocks >= max(1, LEAST_GAIN * blocks) else None


def resize(engine: Engine) -> ReconfigureResult:
    """Give the KV cache the memory that lighter weights have left, between two steps.

    The blocks are swapped as for another `kv_dtype`: running requests are computed again. Heavier weights take the
    memory back (see :func:`engine.sizing.make_room_for_weights`).

    Raises:
        CapacityError: if the machine does not have the memory after all; then the cache is what it was.
    """
    began, before, notes = time.perf_counter(), engine.envelope.num_blocks, []
    larger = _larger_envelope(engine)
    if larger is not None:
        notes = _swap_cache(engine, engine.config, larger, None)
        engine.executor.configure(engine.config, engine.kernels.attention)
    after = engine.envelope.num_blocks
    result = ReconfigureResult(
        changed={} if after == before else {"num_blocks": (before, after)},
        tier="none" if after == before else "swap",
        pause_ms=(time.perf_counter() - began) * 1e3,
        prepare_ms=0.0,
        requests_in_flight=len(engine.streams),
        notes=notes or ["the KV cache has all the memory there is for it"],
    )
    if result.changed:
        summary = f"KV cache resized: {before:,} → {after:,} blocks (paused {result.pause_ms:.1f} ms)"
        _announce(engine, "cache", summary, result)
    return result


def _swap_cache(
    engine: Engine, target: EngineConfig, envelope: sizing.Envelope, weights: PreparedWeights | None
) -> list[str]:
    """A cache of another format or size in place of the present one and, with it, other weights.

    Raises:
        CapacityError: if a request in flight could not finish in it, or memory runs out; then there is a cache in the
            previous format and size again, and requests go on.
    """
    previous, room = engine.config, engine.envelope
    longest = max((request.max_total_tokens for request in engine.requests), default=0)
    by = "weights" if target.kv_dtype == previous.kv_dtype else "kv_dtype"
    sizing.check_requests_fit(longest, envelope, target, by)
    count = engine.scheduler.vacate()
    engine.totals["preemptions"] += count
    notes = [f"the KV cache holds {envelope.num_blocks:,} blocks (before: {room.num_blocks:,})"]
    if count:
        notes.append(f"{count} running requests are computed again, with the tokens they have")
    try:
        _replace_cache(engine, target, envelope)
        if weights is not None:
            notes += _swap_weights(engine, weights, target)
    except Exception:
        _replace_cache(engine, previous, room)
        engine.executor.configure(previous, engine.kernels.attention)
        raise
    return notes


def _replace_cache(engine: Engine, config: EngineConfig, envelope: sizing.Envelope) -> None:
    """Another cache and another pool of blocks, of which nobody may hold one now."""
    model = engine.model
    engine.executor.close()
    # The old one goes first: there is no memory for both.
    engine.use(parts.work_on(engine.cache.like(0), model, engine.config, engine.envelope, engine.hooks))
    try:
        cache = parts.make_cache(model, config, envelope)
    except CapacityError:  # the garbage collector may find some, but takes longer than all the rest
        sizing.release_memory()
        cache = parts.make_cache(model, config, envelope)
    engine.envelope = envelope
    engine.admission = parts.make_admission(model, engine.config, envelope)
    engine.use(parts.work_on(cache, model, engine.config, envelope, engine.hooks))
    engine.scheduler.swap_pool(parts.make_pool(config, envelope))


def _swap_weights(engine: Engine, prepared: PreparedWeights, target: EngineConfig) -> list[str]:
    with sizing.Explained(lambda: sizing.swap_shortage(engine.model, target)):
        engine.model.commit_weights(prepared)
    running = engine.scheduler.running
    # Cached keys and values came from the old weights: nobody may take them for the new ones' work.
    engine.scheduler.pool.reset_prefixes()
    for request in running:
        request.publishable = False
    notes = [f"weights now: {engine.model.weights_path()}"]
    if running:
        notes.append(f"{len(running)} running requests keep the keys and values they have; their blocks are not reused")
    return notes


def _announce(engine: Engine, kind: str, summary: str, result: ReconfigureResult) -> None:
    engine.add_event(kind, summary, dataclasses.asdict(result))
    logger.info(
        "%s: %s tier, paused %.1f ms, %d requests in flight",
        _describe(result, pause=False),
        result.tier,
        result.pause_ms,
        result.requests_in_flight,
    )


def _describe(result: ReconfigureResult, *, pause: bool = True) -> str:
    changes = ", ".join(f"{name}: {_show(old)} → {_show(new)}" for name, (old, new) in result.changed.items())
    return f"{changes} (paused {result.pause_ms:.1f} ms)" if pause and result.tier == "swap" else changes


def _show(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "auto" if value is None else str(value)
