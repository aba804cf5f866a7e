"""Which part of a model one GPU holds under tensor parallelism (TP) and pipeline parallelism (PP)."""

from __future__ import annotations

import dataclasses

from engine.capacity.spec import ModelSpec
from engine.capacity.words import shown
from engine.errors import ConfigError

MAX_GPUS = 1024


@dataclasses.dataclass(frozen=True, slots=True)
class Stage:
    """Layers ``start … stop - 1`` of a pipeline, and whether the stage holds the embedding (first) or head (last)."""

    start: int
    stop: int
    first: bool
    last: bool

    @property
    def num_layers(self) -> int:
        """How many layers the stage holds."""
        return self.stop - self.start


def whole_model(spec: ModelSpec) -> Stage:
    """The one stage of a model that is not split by layers."""
    return Stage(0, spec.num_layers, first=True, last=True)


def pipeline_stages(num_layers: int, pp: int) -> tuple[Stage, ...]:
    """Split layers over ``pp`` stages as vLLM does: evenly, and what remains goes one each to the stages before the
    last, from the back, because the last one also holds the head.

    >>> [stage.num_layers for stage in pipeline_stages(126, 4)]  # Llama 3.1 405B
    [31, 32, 32, 31]
    """
    sizes = [num_layers // pp] * pp
    for index in range(num_layers % pp):
        sizes[-2 - index] += 1
    stages, start = [], 0
    for index, size in enumerate(sizes):
        stages.append(Stage(start, start + size, first=index == 0, last=index == pp - 1))
        start += size
    return tuple(stages)


def kv_heads_per_gpu(num_kv_heads: int, tp: int) -> int:
    """Key/value heads that one GPU keeps: split, and replicated where there are more GPUs than heads.

    >>> kv_heads_per_gpu(8, 4), kv_heads_per_gpu(8, 16)
    (2, 1)
    """
    return -(-num_kv_heads // tp)


def possible_tp(spec: ModelSpec, most: int = 64) -> tuple[int, ...]:
    """Tensor-parallel sizes up to ``most`` that split heads, key/value heads and MLP evenly.

    >>> from engine.capacity.catalog import model_spec
    >>> possible_tp(model_spec("Qwen2.5-7B"), most=8)  # 28 heads, 4 key/value heads
    (1, 2, 4)
    """
    return tuple(tp for tp in range(1, most + 1) if _splits_evenly(spec, tp))


def _splits_evenly(spec: ModelSpec, tp: int) -> bool:
    kv_fits = spec.num_kv_heads % tp == 0 or tp % spec.num_kv_heads == 0
    return spec.num_heads % tp == 0 and spec.intermediate_size % tp == 0 and kv_fits


def check_parallel(spec: ModelSpec, tp: int, pp: int) -> None:
    """Refuse a split that cannot be made.

    Raises:
        ConfigError: with what would work.
    """
    for field, value in (("tp", tp), ("pp", pp)):
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_GPUS:
            raise ConfigError(
                f"{shown(value)} is not a number of GPUs.",
                field=field,
                remedy=f"Give a whole number from 1 to {MAX_GPUS:,}.",
            )
    if not _splits_evenly(spec, tp):
        sizes = ", ".join(map(str, possible_tp(spec)))
        raise ConfigError(
            f"{tp} GPUs do not divide {spec.num_heads} attention heads, {spec.num_kv_heads} key/value heads and "
            f"{spec.intermediate_size:,} MLP rows evenly.",
            field="tp",
            remedy=f"For this model choose one of: {sizes}.",
        )
    if pp > spec.num_layers:
        raise ConfigError(
            f"{pp} stages are more than the model's {spec.num_layers} layers.",
            field="pp",
            remedy=f"Give at most {spec.num_layers}.",
        )
