"""The rotary embedding that a ``config.json`` asks for, in its new (``rope_parameters``) or its older fields."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from engine.layers.rope_scaling import LinearScaling, Llama3Scaling, LongRopeScaling, RopeScaling, YarnScaling
from engine.layers.rotary import Rope
from engine.models.config_fields import MOST, bad_field, flag, number, numbers, optional_number, positive, shown
from engine.models.families import Family

Fields = Mapping[str, Any]
_ORIGINAL = "original_max_position_embeddings"


def read_ropes(config: Fields, family: Family, head_dim: int) -> tuple[Rope, Rope]:
    """(of layers that see everything, of layers that slide); the same one unless the family tells them apart.

    Raises:
        ModelLoadError: naming the field that is malformed or not supported.
    """
    fields = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(fields, Mapping):
        raise bad_field("rope_scaling", "must be an object")
    nested = "full_attention" in fields or "sliding_attention" in fields
    if not family.local_rope:
        if nested:
            raise bad_field("rope_parameters", "a rotary embedding for each kind of layer is not supported here")
        rope = _read_rope(config, fields, family, head_dim)
        return rope, rope
    # Older files scale the layers that see everything; those that slide only have a base of their own.
    everywhere = _part(fields, "full_attention") if nested else fields
    local = _part(fields, "sliding_attention") if nested else {}
    local = {"rope_theta": config.get("rope_local_base_freq"), **local}
    return _read_rope(config, everywhere, family, head_dim), _read_rope(config, local, family, head_dim)


def served_context(config: Fields) -> int:
    """Tokens of the longest sequence that the engine serves, from ``max_position_embeddings`` and the scaling.

    YaRN extends the original context by its factor, whatever the former says; of LongRoPE only the original context is
    served (see :class:`~engine.layers.rope_scaling.LongRopeScaling`).
    """
    stated = positive(config, "max_position_embeddings", 2048)
    fields = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = _kind(fields) if isinstance(fields, Mapping) else "default"
    if kind == "yarn":
        extended = number(fields, "factor") * _original(config, fields)
        if extended > MOST:
            raise bad_field("factor", f"a context of {extended:.3g} tokens is more than the limit of {MOST:,}")
        return max(stated, int(extended))
    return min(stated, _original(config, fields)) if kind == "longrope" else stated


def _read_rope(config: Fields, fields: Fields, family: Family, head_dim: int) -> Rope:
    share = number(fields, "partial_rotary_factor", number(config, "partial_rotary_factor", 1.0))
    if share != 1.0 and not family.partial_rotary:
        raise bad_field("partial_rotary_factor", f"rotating only a part of each head is not part of {family.name}")
    if share > 1:
        raise bad_field("partial_rotary_factor", f"{share} is more than the whole head")
    dim = int(head_dim * share)
    if dim % 2 or not 0 < dim <= head_dim:
        raise bad_field("partial_rotary_factor", f"{share} of head_dim {head_dim} is not an even number of dimensions")
    theta = number(fields, "rope_theta", number(config, "rope_theta", 10000.0))
    kind = _kind(fields)
    if kind not in _SCALINGS:
        raise bad_field(
            "rope_scaling", f"RoPE scaling {shown(kind)} is not supported; supported are {', '.join(_SCALINGS)}"
        )
    return Rope(dim, theta, _SCALINGS[kind](config, fields, dim))


def _part(fields: Fields, name: str) -> Fields:
    part = fields.get(name) or {}
    if not isinstance(part, Mapping):
        raise bad_field(f"rope_parameters.{name}", "must be an object")
    return part


def _kind(fields: Fields) -> str:
    kind = fields.get("rope_type") or fields.get("type") or "default"
    return "longrope" if kind == "su" else str(kind)  # its first name in Phi-3


def _original(config: Fields, fields: Fields) -> int:
    """A field of its own besides the scaling's has precedence, as in transformers."""
    for source in (config, fields):
        if source.get(_ORIGINAL) is not None:
            return positive(source, _ORIGINAL)
    return positive(config, "max_position_embeddings")


def _none(config: Fields, fields: Fields, dim: int) -> RopeScaling | None:
    return None


def _dynamic(config: Fields, fields: Fields, dim: int) -> RopeScaling | None:
    number(fields, "factor")  # checked, though it acts only beyond the context that is served
    return None


def _linear(config: Fields, fields: Fields, dim: int) -> RopeScaling:
    return LinearScaling(number(fields, "factor"))


def _llama3(config: Fields, fields: Fields, dim: int) -> RopeScaling:
    return Llama3Scaling(
        factor=number(fields, "factor"),
        low_freq_factor=number(fields, "low_freq_factor"),
        high_freq_factor=number(fields, "high_freq_factor"),
        original_max_position=_original(config, fields),
    )


def _yarn(config: Fields, fields: Fields, dim: int) -> RopeScaling:
    factor = number(fields, "factor")
    return YarnScaling(
        factor=factor,
        original_max_position=_original(config, fields),
        attention_factor=optional_number(fields, "attention_factor") or _yarn_attention_factor(fields, factor),
        beta_fast=number(fields, "beta_fast", 32.0),
        beta_slow=number(fields, "beta_slow", 1.0),
        truncate=flag(fields, "truncate", True),
    )


def _yarn_attention_factor(fields: Fields, factor: float) -> float:
    """0.1·ln(factor) + 1 (Peng et al. 2023, eq. 22), or DeepSeek's quotient of two such terms."""

    def term(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    stated = {name: fields.get(name) or None for name in ("mscale", "mscale_all_dim")}  # 0 means that there is none
    above, below = optional_number(stated, "mscale"), optional_number(stated, "mscale_all_dim")
    return term(above) / term(below) if above and below else term(1.0)


def _longrope(config: Fields, fields: Fields, dim: int) -> RopeScaling:
    factors = numbers(fields, "short_factor")
    if len(factors) != dim // 2:
        raise bad_field("short_factor", f"has {len(factors)} factors for {dim // 2} rotated pairs")
    original = _original(config, fields)
    extension = optional_number(fields, "factor") or positive(config, "max_position_embeddings") / original
    if original < 2:
        raise bad_field(_ORIGINAL, f"a context of {original} token cannot be extended")
    default = 1.0 if extension <= 1 else math.sqrt(1 + math.log(extension) / math.log(original))
    return LongRopeScaling(factors, number(fields, "attention_factor", default))


_SCALINGS: dict[str, Callable[[Fields, Fields, int], RopeScaling | None]] = {
    "default": _none,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
