"""Configurations and command lines that nobody means well: for the planner, which must plan or explain every one."""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Iterator, Mapping
from typing import Any

from engine.capacity import model_config, model_names
from engine.errors import HeadroomError

#: Values of the wrong type, of absurd size, or that are no numbers (Python reads and writes those in JSON, too).
NONSENSE: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 3, 7, 2**31, 2**31 + 1, 10**9, 10**18, 10**400, -(10**30), 0.5, 1.5, -0.0, 1e308,
    5e-324, math.nan, math.inf, -math.inf, "", "8", "auto", "none", "a" * 5000, "\ud800", "\x00", [], [1], [None], [[]],
    [10**9] * 3, ["full_attention"], {}, {"a": 1}, {"factor": math.nan}, {"rope_type": 3},
    {"type": "yarn", "factor": 1e308}, [{}] * 100,
)  # fmt: skip
_QUANTIZATIONS: tuple[Any, ...] = (
    {"quant_method": "compressed-tensors"},
    {
        "quant_method": "compressed-tensors",
        "config_groups": {"a": None, "b": [], "c": {"weights": {"num_bits": 1e308}}},
    },
    {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"num_bits": 4, "group_size": 10**9}}}},
    {"quant_method": "compressed-tensors", "ignore": ["re:(a+)+$", "re:[", "re:" + "(" * 500, 3, None, {"a": 1}]},
    {"quant_method": "gptq", "bits": 10**9, "group_size": -5},
    {"quant_method": "gptq", "bits": 4, "dynamic": {"+:.*": {"bits": "x"}, "-:(": {}}},
    {"quant_method": "awq", "bits": True},
    {"quant_method": "fp8", "weight_block_size": [0, 0]},
    {"quant_method": "bitsandbytes"},
    {"quant_method": "bitsandbytes", "load_in_4bit": "yes", "llm_int8_skip_modules": {"a": 1}},
    {"quant_method": "modelopt", "quant_algo": 5, "quantized_layers": {"a": 1, "b": {"quant_algo": []}}},
    {"quant_method": ["fp8"]},
    {"quant_method": "x" * 5000},
)
_NUMBERS = (
    "nan",
    "inf",
    "-inf",
    "1e308",
    "1e300",
    "1e-300",
    "-1",
    "0",
    "1",
    "10",
    "1000000000",
    "9" * 40,
    "0.5",
    "x",
    "",
)
_OPTIONS = (
    "tp", "pp", "ep", "dp", "context", "max-num-seqs", "token-budget", "block-size", "gpu-memory-utilization",
    "gpu-memory-gib", "concurrency", "rate", "input-tokens", "output-tokens", "input-cv", "output-cv", "burstiness",
    "slo-ttft-ms", "slo-tpot-ms", "prefix-hit-rate", "lora-adapters", "lora-rank", "draft-length", "acceptance",
    "price",
)  # fmt: skip
_WORDS = {
    "dtype": ("bf16", "int1", "", "nan"),
    "weights": ("fp8", "q4_k_m", "nf4", "int4-g0", "int4-g99999", "unquantized", "../x"),
    "kv-dtype": ("fp8", "int4", "auto", "model", "nope"),
    "profile": ("vllm", "vllm-0.6", "headroom", "transformers", "vllm-0.999999999", "x" * 500),
    "gpu": ("H100", "H100 SXM 80GB", "", "no such", "x" * 500),
}


def plan_config_mutations(seed: int, count: int) -> Iterator[tuple[str, dict[str, Any], dict[str, str]]]:
    """``count`` hostile plans, the same for the same seed.

    Yields:
        (what it is, a ``config.json`` as a mapping, options of ``python -m engine plan``: long names without dashes).
        The promise: each is planned, with finite numbers only, or refused by an error that names the field and the
        remedy (exit code 2); none takes long.
    """
    draws = random.Random(seed)
    for number in range(count):
        name = draws.choice(model_names())
        config = copy.deepcopy(model_config(name))
        for _ in range(draws.choice((0, 1, 1, 2, 4))):
            _damage(draws, config)
        options = {"gpu": "H100 SXM 80GB", "context": "4096"}
        for _ in range(draws.choice((0, 1, 1, 2, 3))):
            option = draws.choice((*_OPTIONS, *_WORDS))
            options[option] = draws.choice(_WORDS.get(option, _NUMBERS))
        yield f"{number}: {name}", config, options


def _damage(draws: random.Random, config: dict[str, Any]) -> None:
    inner = config.get("text_config")
    target = inner if isinstance(inner, dict) and inner and draws.random() < 0.7 else config
    kind = draws.random()
    if kind < 0.15:
        target["quantization_config"] = copy.deepcopy(draws.choice(_QUANTIZATIONS))
    elif kind < 0.25:
        del target[draws.choice(list(target))]
    elif kind < 0.35:
        field = draws.choice(("rope_scaling", "rope_parameters", "layer_types", "head_dim", "block_configs", "zz"))
        target[field] = copy.deepcopy(draws.choice(NONSENSE))
    else:
        target[draws.choice(list(target))] = copy.deepcopy(draws.choice(NONSENSE))


def check_explained(problem: HeadroomError) -> None:
    """Assert that an error says in a few lines which field is wrong and what would be right."""
    assert problem.field
    assert problem.remedy
    assert len(str(problem)) < 4000


def check_finite(document: Any) -> None:
    """Assert that no number of a plan's document, however deep, is infinite or not a number."""
    if isinstance(document, float):
        assert math.isfinite(document)
    elif isinstance(document, Mapping):
        for value in document.values():
            check_finite(value)
    elif isinstance(document, list | tuple):
        for value in document:
            check_finite(value)


def as_file(config: Any) -> bytes:
    """The configuration as a file's bytes; what JSON cannot hold stays as Python writes it (NaN, lone surrogates)."""
    return json.dumps(config).encode()
