"""How much of what fits: the engine asks :mod:`engine.capacity`, the same functions that the Plan page shows.

limit ─┬─ weights       as they are resident when the cache is sized
       ├─ activations   of the largest step the envelope allows
       └─ KV cache      whole blocks, at most what `max_num_seqs` requests of `max_model_len` could ever use
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

import psutil
import torch

from engine.cache.kv_cache import KVCache
from engine.capacity import (
    CacheLayout,
    CompleteRequest,
    KVPrecision,
    ModelSpec,
    PlanRequest,
    check_holds_a_block,
    complete,
    custom_gpu,
    kv_bytes_per_block,
    kv_bytes_per_token,
    kv_precision,
    memory_budget,
)
from engine.capacity.text import GIB
from engine.config import EngineConfig
from engine.device import release_gpu_memory, total_memory, used_memory
from engine.errors import CapacityError, ConfigError, HeadroomError
from engine.models.checkpoint import stored_as
from engine.models.loader import resolve, resolve_device, resolve_dtype
from engine.models.weight_swap import free_bytes, planned_bytes
from engine.outputs import MemoryReport
from engine.quantization.registry import WeightChoice

if TYPE_CHECKING:
    from engine.models import LoadedModel

GPU_UTILIZATION = 0.9
CPU_DEFAULT_BYTES = 4 * GIB
CPU_SHARE_OF_FREE = 0.5


@dataclasses.dataclass(frozen=True, slots=True)
class Envelope:
    """What memory was reserved for when the model was loaded. Bytes and tokens.

    Attributes:
        limit_bytes, weights_bytes, activation_bytes: the budget the cache was sized with.
        num_blocks: blocks of the KV cache.
        max_model_len: tokens one request may hold.
        promised_len: of these, what one could hold before the cache took memory that lighter weights had left.
        limited_by: why it is not more, for error messages.
        remedy: what would make it more.
    """

    limit_bytes: int
    weights_bytes: int
    activation_bytes: int
    num_blocks: int
    max_model_len: int
    promised_len: int
    limited_by: str
    remedy: str


def size_engine(model: LoadedModel, config: EngineConfig) -> Envelope:
    """Size the KV cache of a loaded model.

    Raises:
        ConfigError: if `max_model_len` is above the model's own context length.
        CapacityError: if not even one block fits; the message has the arithmetic.
    """
    weights = model.weight_bytes()
    return _sized(model, config, memory_limit_bytes(config, model.device, weights), weights)


def resize_cache(model: LoadedModel, target: EngineConfig, envelope: Envelope) -> Envelope:
    """What the same memory holds with the KV cache in the format of ``target``.

    Weights count as when the cache was sized, or as ``target`` has them if that is more.

    Raises:
        CapacityError: if not even one block fits; the message has the arithmetic.
    """
    weights = max(envelope.weights_bytes, predicted_weight_bytes(model, target))
    return _sized(model, target, envelope.limit_bytes, weights)


def cache_on_offer(model: LoadedModel, config: EngineConfig, envelope: Envelope) -> Envelope:
    """What the same memory holds with the weights that are resident now: more blocks once they have become lighter."""
    larger = _sized(model, config, envelope.limit_bytes, model.weight_bytes())
    return dataclasses.replace(larger, promised_len=min(envelope.promised_len, larger.max_model_len))


def _sized(model: LoadedModel, config: EngineConfig, limit: int, weights: int) -> Envelope:
    """The planner's budget of this engine on this device, with the weights as they were measured."""
    context = _context_length(model, config)
    request = _as_planned(model, config, context, limit)
    budget = memory_budget(request, measured_weights=weights)
    check_holds_a_block(request, budget)
    longest = min(context, budget.kv_blocks * config.block_size)
    if longest < context:
        limited_by = f"the KV cache has {budget.kv_blocks:,} blocks of {config.block_size} tokens"
        remedy = "Load the model with a larger memory_limit_gib."
    elif context < model.max_position:
        limited_by, remedy = "the max_model_len it was loaded with", "Load the model with a larger max_model_len."
    else:
        limited_by, remedy = "the model's context length", "Shorten the prompt."
    return Envelope(limit, weights, budget.activation, budget.kv_blocks, longest, longest, limited_by, remedy)


def _as_planned(model: LoadedModel, config: EngineConfig, context: int, limit: int) -> CompleteRequest:
    """What :func:`engine.capacity.plan` would be asked to plan this engine: ``limit`` bytes are all there is."""
    return complete(
        PlanRequest(
            spec=dataclasses.replace(model.spec, max_position=model.max_position),
            gpu=custom_gpu("this device", limit / GIB),
            profile="headroom",
            dtype=_dtype_name(model.dtype),
            kv_dtype=kv_format_name(config, model.dtype),
            context=context,
            max_num_seqs=config.max_num_seqs,
            token_budget=config.max_num_batched_tokens,
            block_size=config.block_size,
            utilization=1.0,
        )
    )


def widest_window(model: LoadedModel) -> int | None:
    """Positions that a query sees at most in any layer, itself included; None where a layer sees all.

    All layers share a block table, so a block goes back to the pool only when every layer's window has left it behind.
    """
    windows = model.decoder.layer_windows
    return None if None in windows else max(window for window in windows if window is not None)


def memory_limit_bytes(config: EngineConfig, device: torch.device, weights_bytes: int) -> int:
    """Bytes for weights, activations and KV cache together: `memory_limit_gib`, or its automatic value."""
    if config.memory_limit_gib is not None:
        return int(config.memory_limit_gib * GIB)
    if device.type == "cuda":
        return int(GPU_UTILIZATION * total_memory(device))
    # The weights are resident already, so what is free now excludes them.
    free = psutil.virtual_memory().available + weights_bytes
    return int(min(max(CPU_DEFAULT_BYTES, 2 * weights_bytes), max(CPU_SHARE_OF_FREE * free, weights_bytes)))


def make_room_for_weights(model: LoadedModel, envelope: Envelope, target: EngineConfig) -> Envelope:
    """The envelope under which weights of another format fit: the current one, or a cache that gives blocks back.

    Blocks are given back as long as one request may hold what was promised when the cache was sized: a cache that has
    taken what lighter weights left returns that, at least.

    Raises:
        CapacityError: with the arithmetic and the remedy, if the current cache would have to go below that.
    """
    wanted = predicted_weight_bytes(model, target)
    kv_bytes = _kv_bytes(model, target, envelope)
    total = wanted + envelope.activation_bytes + kv_bytes
    if total <= envelope.limit_bytes or wanted <= envelope.weights_bytes:
        return envelope
    with contextlib.suppress(CapacityError):
        smaller = resize_cache(model, target, envelope)
        if smaller.max_model_len >= envelope.promised_len:
            return smaller
    raise CapacityError(
        f"{target.weights} weights need {wanted / GIB:.3f} GiB{wanted_formats(target).planning_note}; "
        f"with {kv_bytes / GIB:.3f} GiB of KV cache and {envelope.activation_bytes / GIB:.3f} GiB of activations "
        f"that is {total / GIB:.3f} GiB, above the limit of {envelope.limit_bytes / GIB:.3f} GiB; "
        f"a smaller cache would not hold a request of {envelope.promised_len:,} tokens.",
        field="weights",
        remedy="Load the model again with these weights: the KV cache is then sized to what is left.",
    )


class Explained(contextlib.AbstractContextManager[None]):
    """Turns an allocation that fails inside the block into the error that ``shortage`` makes; all else passes.

    The original's traceback is dropped: its frames hold the tensors made so far, which must be free for going on.
    """

    def __init__(self, shortage: Callable[[], CapacityError]) -> None:
        self._shortage = shortage

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del trace
        if error is not None and is_out_of_memory(error):
            error.__traceback__ = None
            raise self._shortage() from None


def is_out_of_memory(error: BaseException) -> bool:
    """True for a failed allocation of Python, NumPy or torch; on the CPU torch's is known by its text alone."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)


def release_memory() -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    release_gpu_memory()


def load_shortage(config: EngineConfig) -> CapacityError:
    """Memory ran out while a model was read."""
    try:
        device = resolve_device(config.device)
        dtype, choice = resolve_dtype(config.dtype, device), wanted_formats(config)
        needed = planned_bytes(ModelSpec.from_hf_config(resolve(config.model).config), choice, dtype)
        kept = _dtype_name(dtype) if choice.label == "model" else choice.label
        numbers = f": its weights are {needed / GIB:.3f} GiB in {kept}; {free_bytes(device) / GIB:.3f} GiB are free now"
    except HeadroomError:  # then the load would have failed for that, not for memory
        numbers = ""
    return CapacityError(
        f"memory ran out while {config.model} was read{numbers}.",
        field="model",
        remedy="Free memory, or choose a smaller model, a smaller dtype or quantized weights.",
    )


def cache_shortage(model: LoadedModel, config: EngineConfig, envelope: Envelope) -> CapacityError:
    """Memory ran out while the KV cache was allocated."""
    kv_bytes = _kv_bytes(model, config, envelope)
    return CapacityError(
        f"memory ran out while {kv_bytes / GIB:.3f} GiB of KV cache were allocated: the limit of "
        f"{envelope.limit_bytes / GIB:.3f} GiB leaves them next to {envelope.weights_bytes / GIB:.3f} GiB of weights "
        f"and {envelope.activation_bytes / GIB:.3f} GiB of activations, but free are "
        f"{free_bytes(model.device) / GIB:.3f} GiB.",
        field="memory_limit_gib",
        remedy="Set a lower memory_limit_gib, or free memory.",
    )


def swap_shortage(model: LoadedModel, target: EngineConfig) -> CapacityError:
    """Memory ran out while other weights were made or put in place."""
    wanted, current = predicted_weight_bytes(model, target), model.weight_bytes()
    return CapacityError(
        f"memory ran out while {target.weights} weights were made: they need {wanted / GIB:.3f} GiB next to the "
        f"current {current / GIB:.3f} GiB until these are dropped; {free_bytes(model.device) / GIB:.3f} GiB are free. "
        f"The current weights stay.",
        field="weights",
        remedy="Free memory, or load the model again with these weights.",
    )


def _kv_bytes(model: LoadedModel, config: EngineConfig, envelope: Envelope) -> int:
    layout = CacheLayout(_kv_precision(config, model), config.block_size)
    return envelope.num_blocks * kv_bytes_per_block(model.spec, layout)


def _kv_precision(config: EngineConfig, model: LoadedModel) -> KVPrecision:
    return kv_precision(kv_format_name(config, model.dtype))


def kv_format_name(config: EngineConfig, dtype: torch.dtype) -> str:
    """The planner's name of the KV cache's format, see :func:`engine.capacity.formats.kv_precision`.

    >>> kv_format_name(EngineConfig(kv_dtype="int8"), torch.bfloat16)
    'int8_per_token_head'
    """
    names = {"model": _dtype_name(dtype), "fp8": "fp8_per_token_head", "int8": "int8_per_token_head", "int4": "int4"}
    return names[config.kv_dtype]


def check_requests_fit(longest_request: int, envelope: Envelope, target: EngineConfig, field: str = "kv_dtype") -> None:
    """Refuse a cache in which a request in flight could not finish.

    Args:
        longest_request: tokens that the longest of them may grow to; 0 without any.
        field: the knob whose change asks for that cache.

    Raises:
        CapacityError: naming the remedy.
    """
    if longest_request > envelope.max_model_len:
        raise CapacityError(
            f"a request in flight may grow to {longest_request:,} tokens; with {field}={getattr(target, field)} one "
            f"may hold {envelope.max_model_len:,} ({envelope.limited_by}).",
            field=field,
            remedy="Wait until it is done, or abort it.",
        )


def predicted_weight_bytes(model: LoadedModel, config: EngineConfig) -> int:
    """Bytes of the weights in the format that ``config`` asks for, by the planner's formula."""
    return planned_bytes(model.spec, wanted_formats(config), model.dtype)


def wanted_formats(config: EngineConfig, linear: str = "torch") -> WeightChoice:
    """The weight formats that a configuration asks for, for these kernels."""
    return WeightChoice(config.weights, int(config.group_size), config.head_weights, linear)


def memory_report(model: LoadedModel, envelope: Envelope, cache: KVCache) -> MemoryReport:
    """Where the bytes are now."""
    on_gpu = model.device.type == "cuda"
    resident = used_memory(model.device) if on_gpu else psutil.Process().memory_info().rss
    return MemoryReport(
        limit=envelope.limit_bytes,
        weights=model.weight_bytes(),
        weights_at_load=envelope.weights_bytes,
        activations=envelope.activation_bytes,
        kv_cache=cache.nbytes,
        resident=resident,
    )


def describe_model(model: LoadedModel, config: EngineConfig) -> dict[str, Any]:
    """Facts of the model for display."""
    spec = model.spec
    return {
        "name": model.name,
        "family": model.family,
        "source": model.source,
        "stored_as": stored_as(model.checkpoint),
        "fingerprint": model.fingerprint,
        "parameters": model.num_parameters(),
        "layers": spec.num_layers,
        "hidden_size": spec.hidden_size,
        "heads": spec.num_heads,
        "kv_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "vocab_size": spec.vocab_size,
        "context_length": model.max_position,
        "warnings": list(model.warnings),
        "kv_bytes_per_token": kv_bytes_per_token(spec, _kv_precision(config, model)),
    }


def _context_length(model: LoadedModel, config: EngineConfig) -> int:
    if config.max_model_len is None:
        return model.max_position
    if config.max_model_len > model.max_position:
        raise ConfigError(
            f"{config.max_model_len:,} tokens are more than the model's own context of {model.max_position:,}.",
            field="max_model_len",
            remedy=f"Give at most {model.max_position:,}, or auto.",
        )
    return config.max_model_len


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
