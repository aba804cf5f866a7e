"""Which parallelism a model allows."""

from __future__ import annotations

from engine.capacity.model.mixers import AnyMixer, Attention, GatedDeltaNet, LatentAttention, Mamba2
from engine.capacity.model.spec import ModelSpec
from engine.capacity.text import shown
from engine.errors import ConfigError

MAX_GPUS = 1024


def kv_heads_per_gpu(num_kv_heads: int, tp: int) -> int:
    """Key/value heads that one GPU keeps: split, and replicated where there are more GPUs than heads.

    >>> kv_heads_per_gpu(8, 4), kv_heads_per_gpu(8, 16)
    (2, 1)
    """
    return -(-num_kv_heads // tp)


def possible_tp(spec: ModelSpec, most: int = 64) -> tuple[int, ...]:
    """Tensor-parallel sizes up to ``most`` that split heads, key/value heads, recurrent heads and MLPs evenly.

    >>> from engine.capacity.model.catalog import model_spec
    >>> possible_tp(model_spec("Qwen2.5-7B"), most=8)  # 28 heads, 4 key/value heads
    (1, 2, 4)
    """
    return tuple(tp for tp in range(1, most + 1) if _splits_evenly(spec, tp))


def _splits_evenly(spec: ModelSpec, tp: int, ep: int = 1) -> bool:
    return all(_mixer_splits(kind.mixer, tp) and kind.mlp.check(tp, ep) for kind in spec.kinds)


def _mixer_splits(mixer: AnyMixer, tp: int) -> bool:
    if isinstance(mixer, Attention):
        kv_fits = mixer.num_kv_heads % tp == 0 or tp % mixer.num_kv_heads == 0
        return mixer.num_heads % tp == 0 and kv_fits
    if isinstance(mixer, LatentAttention):
        return mixer.num_heads % tp == 0
    if isinstance(mixer, GatedDeltaNet):
        return mixer.num_key_heads % tp == 0 and mixer.num_value_heads % tp == 0
    if isinstance(mixer, Mamba2):
        return mixer.num_heads % tp == 0
    return True


def check_parallel(spec: ModelSpec, tp: int, pp: int, ep: int = 1, dp: int = 1) -> None:
    """Refuse a split that cannot be made.

    Args:
        tp, pp: tensor- and pipeline-parallel GPUs.
        ep: GPUs that the experts of a mixture are distributed over, whole; 1: they are split like everything else.
        dp: copies of the whole, each with requests of its own.

    Raises:
        ConfigError: with what would work.
    """
    for field, value in (("tp", tp), ("pp", pp), ("ep", ep), ("dp", dp)):
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_GPUS:
            raise ConfigError(
                f"{shown(value)} is not a number of GPUs.",
                field=field,
                remedy=f"Give a whole number from 1 to {MAX_GPUS:,}.",
            )
    _check_experts(spec, tp, ep)
    if not _splits_evenly(spec, tp, ep):
        sizes = ", ".join(map(str, possible_tp(spec)))
        raise ConfigError(
            f"{tp} GPUs do not divide {_what_is_divided(spec)} evenly.",
            field="tp",
            remedy=f"For this model choose one of: {sizes}.",
        )
    if pp > spec.num_layers:
        raise ConfigError(
            f"{pp} stages are more than the model's {spec.num_layers} layers.",
            field="pp",
            remedy=f"Give at most {spec.num_layers}.",
        )


def _check_experts(spec: ModelSpec, tp: int, ep: int) -> None:
    if ep == 1:
        return
    if not spec.is_mixture:
        raise ConfigError(f"{spec.name} has no experts to distribute.", field="ep", remedy="Give 1.")
    if ep != tp:
        raise ConfigError(
            f"experts on {ep} GPUs do not go with {tp} tensor-parallel GPUs: engines distribute them over the same.",
            field="ep",
            remedy=f"Give 1 or {tp}.",
        )


def _what_is_divided(spec: ModelSpec) -> str:
    things = []
    if spec.num_heads:
        things.append(f"{spec.num_heads} attention heads")
        things.append(f"{spec.num_kv_heads} key/value heads")
    widths = sorted({getattr(kind.mlp, "width", 0) for kind in spec.kinds} - {0})
    things += [f"{width:,} MLP rows" for width in widths]
    return " and ".join([", ".join(things[:-1]), things[-1]]) if len(things) > 1 else things[0]
