"""How a checkpoint says that it is quantized: ``quantization_config`` of a ``config.json``, or NVIDIA ModelOpt's
``hf_quant_config.json`` next to it. Which matrices are, in which format, and what the KV cache is to be kept in."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from engine.capacity.formats import WeightPrecision
from engine.capacity.model.quantization import Quantization, QuantizationRule, RoleList
from engine.capacity.model.quantization_readers import READERS
from engine.capacity.model.stated import Stated
from engine.capacity.text import shown

_UNKNOWN = "The checkpoint's quantization_config is not understood: weights are planned unquantized unless you choose."


def checkpoint_quantization(
    config: Mapping[str, Any], separate: Mapping[str, Any] | None = None
) -> tuple[Quantization, list[str]]:
    """(the quantization that a checkpoint states, paths of fields of it that were not read).

    Args:
        config: the ``config.json``.
        separate: the ``hf_quant_config.json``, if there is one; it counts where ``config`` states nothing.

    >>> def name(**stated):
    ...     return checkpoint_quantization({"quantization_config": stated})[0].format.name
    >>> name(quant_method="mxfp4")  # gpt-oss
    'mxfp4'
    >>> name(quant_method="fp8", weight_block_size=[128, 128])
    'fp8-block'
    >>> name(quant_method="awq", bits=4, group_size=128)
    'int4-g128'
    >>> modelopt = {"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}}
    >>> found, _ = checkpoint_quantization({}, modelopt)
    >>> found.format.name, found.kv_dtype
    ('fp8', 'fp8')
    """
    field, value = _where(config, separate)
    if value is None:
        return Quantization(), []
    if not isinstance(value, Mapping):
        return Quantization(remarks=(_UNKNOWN,)), []
    stated = Stated(value, path=f"{field}.")
    method = stated.get("quant_method")
    if method is None and ("quant_algo" in value or field == "hf_quant_config.json"):
        method = "modelopt"
    if method is None and ("load_in_4bit" in value or "load_in_8bit" in value):
        method = "bitsandbytes"
    reader = READERS.get(method) if isinstance(method, str) else None
    found = reader(stated) if reader is not None else None
    if found is None or found.format is None:
        what = f" (quant_method {shown(method)})" if method is not None else ""
        remark = _UNKNOWN.replace("is not understood", f"is not understood{what}")
        known = found.kv_dtype if found else None
        return Quantization(kv_dtype=known, remarks=(remark,)), []
    found = _with_experts(found, stated.get("expert_dtype", config.get("expert_dtype")))
    stated.mark("quant_method", "quantization_status", "version", "backend", "producer", "sparsity_config", *_LOOSE)
    return found, stated.unread()


def _with_experts(found: Quantization, stated: object) -> Quantization:
    """The same with routed experts in a format of their own (DeepSeek-V4: FP4 in groups of 32)."""
    if stated in (None, "", "fp8"):
        return found
    if stated not in ("fp4", "mxfp4"):
        remark = f"Not read: expert_dtype ({shown(stated)}): experts are planned as the other matrices."
        return dataclasses.replace(found, remarks=(*found.remarks, remark))
    form = WeightPrecision("mxfp4", 4, 32, scale_bytes=1)
    rule = QuantizationRule(RoleList(["expert_up", "expert_down"]), form)
    return dataclasses.replace(found, rules=(*found.rules, rule))


#: What of a quantization changes neither bytes nor which matrices are quantized: how it was made, how it is computed.
_LOOSE = (
    "activation_scheme", "fmt", "scale_fmt", "do_fuse", "exllama_config", "fuse_max_seq_len", "format", "dataset",
    "damp_percent", "damp_auto_increment", "static_groups", "true_sequential", "model_seqlen", "use_exllama",
    "max_input_length", "use_cuda_fp16", "batch_size", "tokenizer", "checkpoint_format", "meta", "pack_dtype",
    "activation_scale_ub", "global_compression_ratio", "transform_config", "cache_block_outputs",
    "module_name_preceding_first_block",
    "llm_int8_threshold", "llm_int8_enable_fp32_cpu_offload", "bnb_4bit_compute_dtype", "bnb_4bit_quant_storage",
    "_load_in_4bit", "_load_in_8bit", "iters", "lr", "minmax_lr", "nsamples", "seqlen", "low_gpu_mem_usage",
    "enable_quanted_input", "autoround_version", "data_type", "packing_format", "amp", "gradient_accumulate_steps",
    "quant_lm_head", "act_bits", "dequantize", "modules_to_not_save", "desc_act", "sym", "lm_head", "is_marlin_format",
    "dynamic_activation", "supported_act_bits", "enable_minmax_tuning", "act_dynamic", "has_zero_point", "quant_type",
    "use_rms_norm",
)  # fmt: skip


def _where(config: Mapping[str, Any], separate: Mapping[str, Any] | None) -> tuple[str, Any]:
    """(path, object) of the statement, None where there is none."""
    inner = config.get("text_config")
    places = [config, *([inner] if isinstance(inner, Mapping) else [])]
    for place in places:
        for field in ("quantization_config", "compression_config"):
            if place.get(field):
                return field, place[field]
    if separate is None:
        return "", None
    stated = separate.get("quantization")
    return "hf_quant_config.json", stated if stated is not None else separate
