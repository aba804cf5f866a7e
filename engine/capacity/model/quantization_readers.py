"""How each tool that quantizes writes what it did: one reader for each ``quant_method``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from engine.capacity.formats import UNQUANTIZED, WeightPrecision, weight_precision
from engine.capacity.model.module_names import ROLES, ModuleList
from engine.capacity.model.quantization import Quantization, QuantizationRule, RoleList
from engine.capacity.model.stated import Stated
from engine.capacity.text import shown

_MOST_ENTRIES = 100_000
_MOST_BITS = 16


def _listed(stated: Stated, *fields: str) -> tuple[ModuleList | None, tuple[str, ...]]:
    """The modules that these fields list together, and remarks on what cannot be read of them."""
    entries: list[object] = []
    for field in fields:
        value = stated.get(field)
        if isinstance(value, str):
            entries.append(value)
        elif isinstance(value, list | tuple):
            entries += value[:_MOST_ENTRIES]
        elif value:
            entries.append(value)
    return _modules(entries, fields[0])


def _modules(entries: list[object], field: str) -> tuple[ModuleList | None, tuple[str, ...]]:
    modules = ModuleList(entries)
    remarks: tuple[str, ...] = ()
    if modules.unread:
        remarks = (
            f"Not read: {', '.join(modules.unread[:3])} in {field} of the quantization: which matrices that means is "
            "not known.",
        )
    return (modules if entries else None), remarks


def _plain_head(modules: ModuleList | None) -> tuple[QuantizationRule, ...]:
    """Rules of a method that leaves the head alone unless told otherwise, and of what is listed as unquantized."""
    rules = (QuantizationRule(ModuleList(["lm_head"]), UNQUANTIZED),)
    return (*rules, QuantizationRule(modules, UNQUANTIZED)) if modules is not None else rules


def _mxfp4(stated: Stated) -> Quantization:
    _listed(stated, "modules_to_not_convert")
    others = [role for role in ROLES if not role.startswith("expert")]
    return Quantization(weight_precision("mxfp4"), (QuantizationRule(RoleList(others), UNQUANTIZED),))


def _fp8(stated: Stated) -> Quantization:
    modules, remarks = _listed(stated, "modules_to_not_convert", "ignored_layers")
    if stated.get("weight_block_size"):
        form = weight_precision("fp8-block")
        block = stated["weight_block_size"]
        if block != [128, 128]:
            remarks = (*remarks, f"Not read: weight_block_size {shown(block)}: scales are counted for 128 · 128.")
    else:
        form = weight_precision("fp8")
    return Quantization(form, _plain_head(modules), remarks=remarks)


def _whole(stated: Mapping[str, Any], field: str, most: int) -> int | None:
    value = stated.get(field)
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= most else None


def _integers(bits: object, group: object, *, zero: bool, scale_bytes: int = 2) -> WeightPrecision | None:
    """INT2 … INT8 in groups along the input, or with a scale a channel where ``group`` is null or -1."""
    if not isinstance(bits, int) or isinstance(bits, bool) or not 2 <= bits <= 8:
        return None
    if group in (None, -1, 0):
        zeros = bits if zero else 0
        if bits == 8:
            return WeightPrecision("int8", 8, scale_bytes=scale_bytes, zero_point_bits=zeros)
        return WeightPrecision(f"int{bits}-channel", bits, scale_bytes=scale_bytes, zero_point_bits=zeros)
    if not isinstance(group, int) or isinstance(group, bool) or not 0 < group <= 2**20:
        return None
    name = f"int{bits}-g{group}"
    return WeightPrecision(name, bits, group, scale_bytes=scale_bytes, zero_point_bits=bits if zero else 0, exact=True)


def _packed(stated: Stated) -> Quantization | None:
    """AWQ, GPTQ and AutoRound: integers with scales in 16 bits, zero points packed next to them."""
    # GPTQ's layout stores zero points of a symmetric grid too.
    bits = stated.get("bits", stated.get("w_bit", 4))
    stated.mark("w_bit", "q_group_size", "zero_point", "group_size")
    form = _integers(bits, stated.get("group_size", stated.get("q_group_size", 128)), zero=True)
    if form is None:
        return None
    modules, remarks = _listed(stated, "modules_to_not_convert")
    rules = _plain_head(modules)
    if stated.get("lm_head") is True:
        rules = rules[1:]
    inside, more = _only(stated)
    dynamic, others = _overrides(stated, form)
    return Quantization(form, (*inside, *rules, *dynamic), remarks=(*remarks, *more, *others))


def _only(stated: Stated) -> tuple[tuple[QuantizationRule, ...], tuple[str, ...]]:
    """Rules where a field lists the modules that are quantized: nothing else is."""
    listed = stated.get("modules_in_block_to_quantize")
    if not isinstance(listed, list) or not listed:
        stated.mark("block_name_to_quantize", "to_quant_block_names")
        return (), ()
    flat = [entry for item in listed[:_MOST_ENTRIES] for entry in (item if isinstance(item, list) else [item])]
    modules, remarks = _modules(flat, "modules_in_block_to_quantize")
    stated.mark("block_name_to_quantize")
    unlisted = [role for role in ROLES if modules is None or not modules.holds(role, 0)]
    return (QuantizationRule(RoleList(unlisted), UNQUANTIZED),), remarks


def _overrides(stated: Stated, usual: WeightPrecision) -> tuple[list[QuantizationRule], list[str]]:
    """GPTQModel's ``dynamic`` and AutoRound's ``extra_config``: bits of some modules, or none."""
    rules: list[QuantizationRule] = []
    remarks: list[str] = []
    for field in ("dynamic", "extra_config"):
        value = stated.get(field)
        for name, change in list(value.items())[:1000] if isinstance(value, Mapping) else []:
            text = str(name)
            skips = text.startswith("-:")
            pattern = text.removeprefix("-:").removeprefix("+:")
            fields = change if isinstance(change, Mapping) else {}
            bits = fields.get("bits", usual.bits)
            form = _integers(bits, fields.get("group_size", usual.group_size), zero=True)
            if skips or (isinstance(bits, int) and bits >= _MOST_BITS):
                form = UNQUANTIZED
            modules = ModuleList([f"re:{pattern}" if field == "dynamic" else pattern])
            if form is None or modules.unread:
                remarks.append(f"Not read: {shown(text)} in {field} of the quantization.")
            else:
                rules.append(QuantizationRule(modules, form))
    return rules, remarks


def _bitsandbytes(stated: Stated) -> Quantization | None:
    """NF4 or FP4, with double quantization or not; or INT8 with a scale a row in float32."""
    modules, remarks = _listed(stated, "llm_int8_skip_modules")
    rules = _plain_head(modules)
    four = stated.get("load_in_4bit", stated.get("_load_in_4bit")) is True
    eight = stated.get("load_in_8bit", stated.get("_load_in_8bit")) is True
    kind = stated.get("bnb_4bit_quant_type")
    double = stated.get("bnb_4bit_use_double_quant") is True
    halves = stated.get("llm_int8_has_fp16_weight") is True
    if four:
        name = kind if kind in ("nf4", "fp4") else "fp4"
        form = WeightPrecision(str(name), 4, absmax=(64, 256 if double else 0))
    elif eight and not halves:
        form = WeightPrecision("int8", 8, scale_bytes=4)
    else:
        return None
    return Quantization(form, rules, remarks=remarks)


def _modelopt(stated: Stated) -> Quantization | None:
    """NVIDIA ModelOpt: one algorithm for all, or one a module."""
    modules, remarks = _listed(stated, "exclude_modules", "ignore", "modules_to_not_convert")
    kv_dtype, more = _kv_dtype(stated)
    stated.mark("config_groups")
    group = stated.get("group_size")
    rules = (QuantizationRule(modules, UNQUANTIZED),) if modules is not None else ()
    mixed, usual = _by_algorithm(stated, group)
    form = _algorithm(stated.get("quant_algo"), group) or usual
    stated.mark("quant_algo", "has_zero_point", "pre_quant_scale")
    found = (*rules, *mixed) if not mixed else (QuantizationRule(None, UNQUANTIZED), *mixed, *rules)
    return Quantization(form, found, kv_dtype, (*remarks, *more))


def _by_algorithm(stated: Stated, group: object) -> tuple[list[QuantizationRule], WeightPrecision | None]:
    """Rules of ``quantized_layers``, and the format of most of them."""
    listed = stated.get("quantized_layers")
    by_format: dict[WeightPrecision, list[object]] = {}
    for name, entry in list(listed.items())[:_MOST_ENTRIES] if isinstance(listed, Mapping) else []:
        form = (
            _algorithm(entry.get("quant_algo"), entry.get("group_size", group)) if isinstance(entry, Mapping) else None
        )
        if form is not None:
            by_format.setdefault(form, []).append(name)
    rules = [QuantizationRule(ModuleList(entries), form) for form, entries in by_format.items()]
    return rules, max(by_format, key=lambda form: len(by_format[form]), default=None)


def _algorithm(name: object, group: object) -> WeightPrecision | None:
    """The weight format of one of ModelOpt's algorithms."""
    text = name.upper() if isinstance(name, str) else ""
    if text == "FP8":
        return WeightPrecision("fp8", 8, scale_bytes=4, whole_tensor=True)
    if text.startswith(("FP8_PB", "FP8_BLOCK")):
        return weight_precision("fp8-block")
    if text.startswith("FP8_"):
        return weight_precision("fp8")
    if "NVFP4" in text:
        return weight_precision("nvfp4")
    if "MXFP4" in text:
        return WeightPrecision("mxfp4", 4, 32, scale_bytes=1)
    if text == "MXFP8":
        return WeightPrecision("mxfp8", 8, 32, scale_bytes=1, exact=True)
    if text.startswith(("W4A16", "W4A8", "INT4")):
        return _integers(4, group if group is not None else 128, zero=False)
    if text.startswith(("W8A16", "W8A8", "INT8")):
        return WeightPrecision("int8", 8, scale_bytes=4)
    return None


def _compressed(stated: Stated) -> Quantization | None:
    """compressed-tensors: groups of targets, each with a format; ``ignore`` wins over all."""
    modules, remarks = _listed(stated, "ignore")
    kv_dtype, more = _kv_dtype(stated)
    groups = stated.get("config_groups")
    rules: list[QuantizationRule] = []
    usual: WeightPrecision | None = None
    for name, group in list(groups.items())[:100] if isinstance(groups, Mapping) else []:
        form, targets, unread = _group(group)
        remarks = (*remarks, *unread)
        if form is None:
            remarks = (*remarks, f"Not read: config_groups.{shown(name)} of the quantization.")
        elif targets is None:
            usual = form
        else:
            rules.append(QuantizationRule(targets, form))
    if usual is None and not rules:
        return None
    found = rules if usual else [QuantizationRule(None, UNQUANTIZED), *rules]
    ignored = [QuantizationRule(modules, UNQUANTIZED)] if modules is not None else []
    return Quantization(usual or rules[0].format, (*found, *ignored), kv_dtype, (*remarks, *more))


#: Classes of modules that mean every linear layer.
_EVERY_LINEAR = frozenset(("Linear", "LinearBase", "FusedMoE"))
_GROUP_LOOSE = ("input_activations", "output_activations", "format")
_WEIGHT_LOOSE = (
    "block_structure", "dynamic", "observer", "observer_kwargs", "scale_dtype", "zp_dtype", "is_mx", "actorder",
)  # fmt: skip


def _group(group: object) -> tuple[WeightPrecision | None, ModuleList | None, tuple[str, ...]]:
    """(format, what it is for or None for every linear layer, remarks) of one of ``config_groups``."""
    if not isinstance(group, Mapping):
        return None, None, ()
    stated = Stated(group, path="config_groups.")
    targets = stated.get("targets")
    entries = list(targets[:_MOST_ENTRIES]) if isinstance(targets, list | tuple) else [targets]
    weights = stated.get("weights")
    if not isinstance(weights, Mapping):
        return None, None, ()
    fields = Stated(weights, path="config_groups.weights.")
    form = _compressed_format(fields)
    stated.mark(*_GROUP_LOOSE)
    fields.mark(*_WEIGHT_LOOSE)
    unread = [*stated.unread(), *fields.unread()]
    remarks = (f"Not read: {', '.join(unread)} of the quantization.",) if unread else ()
    if not targets or any(isinstance(entry, str) and entry in _EVERY_LINEAR for entry in entries):
        return form, None, remarks
    modules, more = _modules(entries, "targets")
    return form, modules, (*remarks, *more)


def _compressed_format(weights: Stated) -> WeightPrecision | None:
    bits, kind, size = weights.get("num_bits"), weights.get("type", "int"), weights.get("group_size")
    strategy = weights.get("strategy")
    zero = weights.get("symmetric", True) is False
    if kind == "int":
        if strategy == "tensor" and isinstance(bits, int) and bits == 8:
            return WeightPrecision("int8", 8, scale_bytes=4, whole_tensor=True)
        return _integers(bits, size, zero=zero)
    if kind != "float":
        return None
    if bits == 4:
        return weight_precision("nvfp4") if size == 16 else WeightPrecision("mxfp4", 4, 32, scale_bytes=1)
    if bits != 8:
        return None
    if strategy == "block" or weights.get("block_structure"):
        return weight_precision("fp8-block")
    if strategy == "group" and isinstance(size, int) and 0 < size <= 2**20:
        return WeightPrecision("mxfp8", 8, size, scale_bytes=1, exact=True)
    return (
        WeightPrecision("fp8", 8, scale_bytes=4, whole_tensor=True) if strategy == "tensor" else weight_precision("fp8")
    )


def _kv_dtype(stated: Stated) -> tuple[str | None, list[str]]:
    """The KV cache format that a checkpoint asks for, and a remark where it is none that is known."""
    for field, value in _kv_statements(stated):
        remarks: list[str] = []
        if isinstance(value, Mapping):
            scheme = Stated(value, path=f"{field}.")
            bits, kind = scheme.get("num_bits"), scheme.get("type")
            value = "FP8" if bits == 8 and kind == "float" else f"{shown(kind)} of {shown(bits)} bits"
            scheme.mark("strategy", "symmetric", *_WEIGHT_LOOSE)  # scales of a layer or a head cost nothing
            remarks = [f"Not read: {', '.join(scheme.unread())} of the quantization."] if scheme.unread() else []
        if isinstance(value, str) and value.upper() in ("FP8", "FP8_E4M3"):
            return "fp8", remarks
        return None, [f"Not read: {field} ({shown(value)}): the KV cache is planned in the model's dtype."]
    return None, []


def _kv_statements(stated: Stated) -> Iterator[tuple[str, object]]:
    for field in ("kv_cache_scheme", "kv_cache_quant_algo"):
        value = stated.get(field)
        if value and value != "NONE":
            yield field, value


READERS: dict[str, Callable[[Stated], Quantization | None]] = {
    "mxfp4": _mxfp4,
    "fp8": _fp8,
    "fbgemm_fp8": _fp8,
    "awq": _packed,
    "gptq": _packed,
    "gptqmodel": _packed,
    "auto-round": _packed,
    "auto_round": _packed,
    "bitsandbytes": _bitsandbytes,
    "bitsandbytes_4bit": _bitsandbytes,
    "bitsandbytes_8bit": _bitsandbytes,
    "modelopt": _modelopt,
    "modelopt_fp4": _modelopt,
    "compressed-tensors": _compressed,
}
