"""How far a model's positions reach: its own context length, extended as its RoPE scaling says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.capacity.model.fields import MAX_DIMENSION, REMEDY, number, positive
from engine.capacity.model.stated import Stated
from engine.capacity.text import shown
from engine.errors import ConfigError

#: Scalings that leave the stated length as it is (the longest context of linear and dynamic ones is as stated, too).
_STATED = ("default", "llama3", "longrope", "su", "mrope", "proportional", "linear", "dynamic", "none")
_ANGLES = (
    "attention_factor",
    "attn_factor",
    "beta_fast",
    "beta_slow",
    "extrapolation_factor",
    "finetuned",
    "high_freq_factor",
    "long_factor",
    "long_mscale",
    "max_position_embeddings",
    "low_freq_factor",
    "mrope_interleaved",
    "mrope_section",
    "mscale",
    "mscale_all_dim",
    "rope_theta",
    "short_factor",
    "short_mscale",
    "truncate",
    "llama_4_scaling_beta",
)


def longest_position(config: Stated, default: int) -> tuple[int, float, list[str]]:
    """How far positions reach, which share of a head they turn, and what was not read on the way.

    YaRN's context is ``original_max_position_embeddings`` · ``factor``, whatever ``max_position_embeddings`` says. The
    older spelling (``rope_scaling``, ``type``) and the newer (``rope_parameters``, ``rope_type``) mean the same.

    Args:
        config: of the language model.
        default: of ``max_position_embeddings``.

    >>> scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    >>> longest_position(Stated({"max_position_embeddings": 40960, "rope_scaling": scaling}), 2048)
    (131072, 1.0, [])

    Raises:
        ConfigError: naming the field at fault.
    """
    own = positive(config, "max_position_embeddings", default)
    share = number(config, "partial_rotary_factor", 1.0, 0.0, 1.0)
    unread: list[str] = []
    longest = own
    for field in ("rope_scaling", "rope_parameters"):
        for scaling in _scalings(config, field):
            share = number(scaling, "partial_rotary_factor", share, 0.0, 1.0)
            extended = _extended(scaling, own, config)
            if extended is None:
                unread.append(f"{field}.rope_type {shown(scaling.get('rope_type', scaling.get('type')))}")
            longest = max(longest, extended or own)
            scaling.mark(*_ANGLES)
            unread += scaling.unread()
    if longest > MAX_DIMENSION:
        raise ConfigError(f"reaches {longest:,} tokens, beyond any real model.", field="factor", remedy=REMEDY)
    return longest, share, unread


def _scalings(config: Mapping[str, Any], field: str) -> list[Stated]:
    """The scaling's object, or those of each kind of layer (``full_attention``, ``sliding_attention``)."""
    stated = config.get(field)
    if stated is None:
        return []
    if not isinstance(stated, Mapping):
        raise ConfigError(f"{shown(stated)} is not an object.", field=field, remedy=REMEDY)
    nested = {name: value for name, value in stated.items() if isinstance(value, Mapping)}
    if nested:
        flat = {name: value for name, value in stated.items() if name not in nested}
        kinds = [Stated(value, path=f"{field}.{name}.") for name, value in nested.items()]
        return [*kinds, Stated(flat, path=f"{field}.")]
    return [Stated(stated, path=f"{field}.")]


def _extended(scaling: Stated, own: int, config: Mapping[str, Any]) -> int | None:
    """Tokens that this scaling reaches; None where its kind is not known."""
    kind = scaling.get("rope_type", scaling.get("type"))
    scaling.mark("type")
    kind = "default" if kind is None else kind
    if not isinstance(kind, str):
        raise ConfigError(f"{shown(kind)} is not the name of a scaling.", field="rope_type", remedy=REMEDY)
    factor = number(scaling, "factor", 1.0, 1e-3, 1e6)
    original = positive(scaling, "original_max_position_embeddings", own)
    if kind in _STATED:
        return own
    # A field of its own next to the scaling's has precedence, as in transformers.
    return int(positive(config, "original_max_position_embeddings", original) * factor) if kind == "yarn" else None
