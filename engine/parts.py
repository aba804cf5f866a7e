"""What a configuration is made of, for one model on this machine.

    EngineConfig ─┬─ ChosenKernels  attention backend, sampler      chosen again between two steps
                  ├─ WeightChoice   formats of the linear layers    swapped between two steps
                  └─ CacheParts     KV cache, executor, runner      made again with another cache

Each function refuses what this machine or model cannot do, with an error that names the knob and the remedy; nothing
else is put in its place.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from engine import sizing
from engine.attention.backends import get_backend
from engine.attention.base import AttentionBackend
from engine.batching.admission import Admission
from engine.batching.scheduler import Scheduler
from engine.cache.block_pool import BlockPool
from engine.cache.kv_cache import KVCache
from engine.capacity.text import GIB
from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.execution.executor import Executor
from engine.models import load_model
from engine.quantization.registry import WeightChoice
from engine.runner import Runner
from engine.sampling.samplers import Sampler, get_sampler, warm_up_sampler
from kernels.dispatch import cache_unsupported_reason, choose
from kernels.kv_formats import KV_FORMATS

if TYPE_CHECKING:
    from engine.models import LoadedModel


@dataclasses.dataclass(frozen=True, slots=True)
class ChosenKernels:
    """What attends and what chooses tokens, with the paths that they really take ("triton (interpreter)")."""

    attention: AttentionBackend
    attention_path: str
    sample: Sampler
    sampling_path: str

    def warm_up_sampler(self, logits: torch.Tensor) -> None:
        """Have the sampler's kernels compiled, where it has any, for logits [1, vocab] like these."""
        warm_up_sampler(logits, self.sampling_path)


def choose_kernels(model: LoadedModel, config: EngineConfig) -> ChosenKernels:
    """The attention backend and the sampler that a configuration asks for.

    Raises:
        ConfigError: if one of them cannot run here, or cannot read the KV cache's format.
    """
    device, head_dim = model.device, model.decoder.head_dim
    attention, path = get_backend(config.attention, device, model.dtype, head_dim)
    unsupported = cache_unsupported_reason(path, config.kv_dtype, device, head_dim)
    if unsupported is not None:
        message = f"{config.kv_dtype!r} is not supported here: {unsupported.reason}"
        raise ConfigError(message, field="kv_dtype", remedy=unsupported.remedy)
    sample, sampling_path = get_sampler(config.sampling, device)
    return ChosenKernels(attention, path, sample, sampling_path)


# -- weights -------------------------------------------------------------------------------------------


def load_weights(config: EngineConfig, progress: Callable[[str, float], None] | None = None) -> LoadedModel:
    """Load the model that ``config`` names, its weights in the formats asked for.

    Args:
        progress: called with a stage ("weights", …) and the fraction done.

    Raises:
        ModelLoadError, CapacityError, ConfigError: naming the field and the remedy.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)  # a setting of the process: torch knows no narrower one
    with sizing.Explained(lambda: sizing.load_shortage(config)):
        return load_model(
            config.model,
            dtype=config.dtype,
            device=config.device,
            progress=progress,
            choose=functools.partial(_choose_weights, config),
        )


def weight_choice(model: LoadedModel, config: EngineConfig) -> WeightChoice:
    """The weight formats that a configuration asks for, its `linear` decided for this machine.

    Raises:
        ConfigError: if the kernels it names cannot run here.
    """
    fallback = None if model.decoder.swaps_weights else model.spec.architecture
    return _choose_weights(config, model.device, model.dtype, fallback)


def bring_into_shape(model: LoadedModel, config: EngineConfig) -> sizing.Envelope:
    """Put freshly loaded weights into the formats asked for; the envelope is what memory is left for.

    Raises:
        ConfigError, CapacityError: naming the knob and the remedy.
    """
    with sizing.Explained(lambda: sizing.swap_shortage(model, config)):
        _bring_weights(model, weight_choice(model, config))
    return sizing.size_engine(model, config)


def _bring_weights(model: LoadedModel, choice: WeightChoice) -> None:
    """A mere change of layout reads nothing again."""
    present = model.weights_choice
    if choice.same_as(present):
        return
    as_loaded = present.linear == "torch"
    if as_loaded and choice.same_as(dataclasses.replace(present, linear=choice.linear)):
        model.repack_weights(choice.linear)
        return
    prepared = model.prepare_weights(choice.weights, choice.group_size, head=choice.head, linear=choice.linear)
    model.commit_weights(prepared)


def _choose_weights(
    config: EngineConfig, device: torch.device, dtype: torch.dtype, fallback: str | None
) -> WeightChoice:
    """As :func:`weight_choice`, for a model that may not be loaded yet.

    Args:
        fallback: name of a model whose layers transformers computes, which keeps its weights as they are; else None.
    """
    linear = config.linear
    if fallback is not None:
        if linear in ("native", "triton"):
            raise ConfigError(
                f"{linear!r} is not available for {fallback}, which runs through transformers.",
                field="linear",
                remedy="Choose auto or torch.",
            )
        linear = "torch"
    choice = choose("linear", linear, device=device, dtype=dtype)
    if choice.path is None:
        raise ConfigError(f"{linear!r} cannot run here: {choice.reason}", field="linear", remedy=choice.remedy)
    wanted = sizing.wanted_formats(config, choice.path.partition(" ")[0])
    if fallback is not None and wanted.label != "model":
        raise ConfigError(
            f"{wanted.label!r} is not available for {fallback}, which runs through transformers.",
            field="weights",
            remedy="Choose model.",
        )
    return wanted


# -- the cache, and what works on it -------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class CacheParts:
    """A KV cache with what works on it alone: another cache has others.

    Attributes:
        cache: keys and values.
        executor: how a forward pass over it runs.
        runner: from the rows of a step to its logits.
    """

    cache: KVCache
    executor: Executor
    runner: Runner


@dataclasses.dataclass(frozen=True, slots=True)
class Hooks:
    """What the executor asks of its engine.

    Attributes:
        add_event: writes (kind, summary, detail) into the event log.
        warm_up_sampler: has the kernels compiled that choose a token from logits [1, vocab].
    """

    add_event: Callable[[str, str, dict[str, Any]], None]
    warm_up_sampler: Callable[[torch.Tensor], None]


def make_cache(model: LoadedModel, config: EngineConfig, envelope: sizing.Envelope) -> KVCache:
    """A cache of the envelope's blocks, in the format asked for.

    Raises:
        CapacityError: if memory runs out; the message has the arithmetic.
    """
    with sizing.Explained(lambda: sizing.cache_shortage(model, config, envelope)):
        return _allocate_cache(model, config, envelope.num_blocks)


def _allocate_cache(model: LoadedModel, config: EngineConfig, num_blocks: int) -> KVCache:
    decoder = model.decoder
    # CUDA graphs write their padding into a block behind those of the pool.
    scratch = int(model.device.type == "cuda")
    return KVCache(
        num_layers=decoder.num_layers,
        num_blocks=num_blocks + scratch,
        block_size=config.block_size,
        num_kv_heads=decoder.num_kv_heads,
        head_dim=decoder.head_dim,
        dtype=model.dtype,
        device=model.device,
        format=KV_FORMATS[config.kv_dtype],
    )


def work_on(
    cache: KVCache, model: LoadedModel, config: EngineConfig, envelope: sizing.Envelope, hooks: Hooks
) -> CacheParts:
    """Make what works on a cache."""
    executor = Executor(
        model.decoder,
        cache,
        model.device,
        max_tokens=max(config.max_num_batched_tokens, envelope.max_model_len),  # unchunked prompts exceed it
        max_num_seqs=config.max_num_seqs,
        max_model_len=envelope.max_model_len,
        add_event=hooks.add_event,
        warm_up_sampler=hooks.warm_up_sampler,
    )
    return CacheParts(cache, executor, Runner(model, cache, executor))


def describe_memory(model: LoadedModel, cache: KVCache) -> str:
    """What the weights and the cache take, for the log."""
    weights, kv = model.weight_bytes() / GIB, cache.nbytes / GIB
    blocks = f"{cache.num_blocks:,} blocks of {cache.block_size} tokens"
    return f"weights {weights:.3f} GiB, KV cache {kv:.3f} GiB in {blocks}, on {model.device}"


def make_pool(config: EngineConfig, envelope: sizing.Envelope) -> BlockPool:
    """The bookkeeping of the cache's blocks, all of them free."""
    return BlockPool(envelope.num_blocks, config.block_size)


def make_scheduler(model: LoadedModel, config: EngineConfig, envelope: sizing.Envelope) -> Scheduler:
    """A scheduler over a fresh pool."""
    return Scheduler(make_pool(config, envelope), sizing.widest_window(model))


def make_admission(model: LoadedModel, config: EngineConfig, envelope: sizing.Envelope) -> Admission:
    """What a request is checked against under these knobs."""
    return Admission(model.decoder.vocab_size, envelope, config.max_running + config.max_waiting)
