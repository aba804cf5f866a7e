"""Image encoders next to a language model: how many parameters they and their projectors have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.capacity.model.fields import flag, positive
from engine.capacity.model.stated import Stated

_QWEN = ("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")
_DEEP = ("qwen3_vl", "qwen3_vl_moe")
_MOST_BLOCKS = 512


def encoder_parameters(config: Mapping[str, Any], model_type: str, text_hidden: int) -> tuple[int | None, list[str]]:
    """(parameters of encoder and projector, None where the encoder is not known; fields of it that were not read).

    Args:
        config: of the whole model.
        model_type: of the whole model.
        text_hidden: width of the language model.

    >>> sizes = {"hidden_size": 1152, "num_hidden_layers": 27, "intermediate_size": 4304, "num_attention_heads": 16,
    ...          "image_size": 896, "patch_size": 14, "vision_use_head": False}
    >>> encoder_parameters({"vision_config": sizes}, "gemma3", 5376)[0]  # Gemma-3-27b, published: 27,432,406,640 in all
    423060336

    Raises:
        ConfigError: naming the field at fault.
    """
    stated = config.get("vision_config")
    if not isinstance(stated, Mapping) or not stated:
        return None, []
    vision = Stated(stated, path="vision_config.")
    vision.mark("model_type", "rope_parameters", "num_channels", "torch_dtype", "dtype")
    if model_type in _QWEN:
        count = _qwen(vision, model_type in _DEEP)
    elif model_type == "gemma3":
        count = _siglip(vision) + positive(vision, "hidden_size", 768) * (text_hidden + 1)
    elif model_type == "mistral3":
        count = _pixtral(vision, config, text_hidden)
    else:
        return None, []
    return count, vision.unread()


def _linear(inputs: int, outputs: int, bias: bool = True) -> int:
    return outputs * (inputs + bias)


def _size(config: Mapping[str, Any], field: str, default: int, maximum: int = 2**20) -> int:
    """A size, of which a list of equal ones may stand (height and width)."""
    value = config.get(field)
    if isinstance(value, list | tuple) and value and all(item == value[0] for item in value):
        return positive({field: value[0]}, field, default, maximum)
    return positive(config, field, default, maximum)


def _qwen(vision: Stated, deep: bool) -> int:
    """Qwen3-VL and Qwen3.5: a transformer over patches of two frames, merged four to one."""
    hidden, inner = positive(vision, "hidden_size", 1152), positive(vision, "intermediate_size", 4304)
    out = positive(vision, "out_hidden_size", 3584)
    patch = _size(vision, "patch_size", 16, 4096) ** 2 * _size(vision, "temporal_patch_size", 2, 64)
    merged = hidden * _size(vision, "spatial_merge_size", 2, 64) ** 2
    block = 4 * hidden + _linear(hidden, 3 * hidden) + _linear(hidden, hidden)
    block += _linear(hidden, inner) + _linear(inner, hidden)
    merger = _linear(merged, merged) + _linear(merged, out)
    count = positive(vision, "depth", 27, _MOST_BLOCKS) * block
    count += _linear(positive(vision, "in_channels", 3, 64) * patch, hidden)
    count += positive(vision, "num_position_embeddings", 2304) * hidden + 2 * hidden + merger
    vision.mark("num_heads")
    indexes = vision.get("deepstack_visual_indexes")
    extra = len(indexes) if isinstance(indexes, list | tuple) else 3
    return count + (min(extra, _MOST_BLOCKS) * (2 * merged + merger) if deep else 0)


def _siglip(vision: Stated) -> int:
    """SigLIP, as in Gemma 3."""
    hidden, inner = positive(vision, "hidden_size", 768), positive(vision, "intermediate_size", 3072)
    patch = _size(vision, "patch_size", 16, 4096)
    positions = (_size(vision, "image_size", 224) // patch) ** 2
    block = 4 * hidden + 4 * _linear(hidden, hidden) + _linear(hidden, inner) + _linear(inner, hidden)
    count = positive(vision, "num_hidden_layers", 12, _MOST_BLOCKS) * block + 2 * hidden
    vision.mark("num_attention_heads")
    if flag(vision, "vision_use_head", True):
        count += hidden + 2 * hidden + 4 * _linear(hidden, hidden) + _linear(hidden, inner) + _linear(inner, hidden)
    return count + _linear(3 * patch**2, hidden) + positions * hidden


def _pixtral(vision: Stated, config: Mapping[str, Any], text_hidden: int) -> int:
    """Pixtral, as in Mistral Small 3.1: gated MLPs, no biases; patches are merged before the projector."""
    hidden, inner = positive(vision, "hidden_size", 1024), positive(vision, "intermediate_size", 4096)
    heads = positive(vision, "num_attention_heads", 16)
    width = heads * positive(vision, "head_dim", max(hidden // heads, 1))
    vision.mark("image_size", "vocab_size")
    block = 2 * hidden + 4 * hidden * width + 3 * hidden * inner
    count = positive(vision, "num_hidden_layers", 24, _MOST_BLOCKS) * block
    count += 3 * _size(vision, "patch_size", 16, 4096) ** 2 * hidden + hidden
    merge = positive(config, "spatial_merge_size", 2, 64) ** 2
    bias = flag(config, "multimodal_projector_bias", False)
    count += hidden + merge * hidden * hidden
    return count + _linear(hidden, text_hidden, bias) + _linear(text_hidden, text_hidden, bias)
