"""The weight format that a checkpoint says it is quantized in (``quantization_config`` of a ``config.json``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_UNKNOWN = "The checkpoint's quantization_config is not understood: weights are planned unquantized unless you choose."


def checkpoint_format(config: Mapping[str, Any]) -> tuple[str | None, list[str]]:
    """(name of a weight format or None, remarks for display).

    >>> checkpoint_format({"quantization_config": {"quant_method": "mxfp4"}})[0]  # gpt-oss
    'mxfp4'
    >>> checkpoint_format({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}})[0]
    'fp8-block'
    >>> checkpoint_format({"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128}})[0]
    'int4-g128'
    """
    stated = config.get("quantization_config", config.get("compression_config"))
    if stated is None:
        return None, []
    name = _name(stated) if isinstance(stated, Mapping) else None
    return name, [] if name else [_UNKNOWN]


def _name(stated: Mapping[str, Any]) -> str | None:
    method = stated.get("quant_method")
    if method == "mxfp4":
        return "mxfp4"
    if method in ("fp8", "fbgemm_fp8"):
        return "fp8-block" if stated.get("weight_block_size") else "fp8"
    if method in ("awq", "gptq"):
        return _integers(
            stated.get("bits", stated.get("w_bit", 4)), stated.get("group_size", stated.get("q_group_size"))
        )
    if method == "modelopt" and stated.get("quant_algo") in ("NVFP4", "FP8"):
        return {"NVFP4": "nvfp4", "FP8": "fp8"}[stated["quant_algo"]]
    if method == "compressed-tensors":
        return _compressed(stated)
    return None


def _compressed(stated: Mapping[str, Any]) -> str | None:
    groups = stated.get("config_groups")
    first = next(iter(groups.values()), None) if isinstance(groups, Mapping) else None
    weights = first.get("weights") if isinstance(first, Mapping) else None
    if not isinstance(weights, Mapping):
        return None
    bits, kind, size = weights.get("num_bits"), weights.get("type"), weights.get("group_size")
    if kind == "float":
        return {8: "fp8", 4: "nvfp4" if size == 16 else "mxfp4"}.get(bits) if isinstance(bits, int) else None
    return _integers(bits, size)


def _integers(bits: object, group: object) -> str | None:
    if bits == 8:
        return "int8"
    if bits == 4:
        return f"int4-g{group}" if group in (32, 64, 128) else "int4-g128"
    return None
