"""The whole engine on the device, kernels and CUDA graphs included, gives transformers' tokens in float32.

Over a quantized cache, which transformers has not, it gives the tokens of plain softmax attention over the same format.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from engine.config import EngineConfig
from engine.core import Engine
from engine.models import load_model
from engine.sampling.params import SamplingParams
from engine.status import path_of, take_status
from kernels.kv_formats import KV_FORMATS
from tests.gpu.case import Size
from tests.gpu.random_model import tokenizer_of

VOCABULARY, CONTEXT = 257, 512
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 192,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.2,  # wide logits: no near ties that rounding could turn
    "bos_token_id": None,
    "eos_token_id": 256,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
PROMPT_LENGTHS: dict[Size, tuple[int, ...]] = {"full": (5, 22, 39, 64, 90), "tiny": (3, 22)}
OUTPUT_TOKENS: dict[Size, int] = {"full": 24, "tiny": 4}
PREPARATION_TIMEOUT_S = 180.0
QUANTIZED_MODEL = "llama"


@dataclasses.dataclass(frozen=True, slots=True)
class Parity:
    """One model in one setting; ``equal`` is None if it could not run, ``problem`` says why."""

    model: str
    setting: str
    equal: bool | None
    path: dict[str, str]
    problem: str = ""


def models() -> dict[str, Any]:
    """Configurations of transformers: grouped queries, head norms, windows and extra norms, experts."""
    from transformers import Gemma3TextConfig, LlamaConfig, Qwen3Config, Qwen3MoeConfig

    window = {"sliding_window": 20, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
    experts = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    return {
        "llama": LlamaConfig(**SHAPE),
        "qwen3": Qwen3Config(**SHAPE),
        "gemma3": Gemma3TextConfig(**SHAPE, **window),
        "qwen3-moe": Qwen3MoeConfig(**SHAPE, **experts),
    }


def settings(device: torch.device) -> dict[str, dict[str, Any]]:
    """Knobs by the name of the setting."""
    found: dict[str, dict[str, Any]] = {
        "eager": {"execution": "eager", "attention": "triton"},
        "fused": {"execution": "fused", "attention": "triton"},
        "fused, drafts": {"execution": "fused", "attention": "triton", "speculation": "ngram"},
    }
    if device.type == "cuda":
        found["graphs"] = {"execution": "graphs", "attention": "triton"}
    return found


def check_all(device: torch.device, size: Size, deadline: float, tell: Callable[[str], None]) -> Iterator[Parity]:
    """Every model in every setting."""
    torch.backends.cuda.matmul.allow_tf32 = False
    with tempfile.TemporaryDirectory(prefix="headroom-parity-") as scratch:
        for name, config in models().items():
            tell(f"parity of {name} …")
            folder, expected = _reference(config, Path(scratch) / name, device, size)
            for setting, knobs in settings(device).items():
                if time.monotonic() > deadline:
                    yield Parity(name, setting, None, {}, "no time left")
                    continue
                yield _check(name, setting, folder, knobs, device, size, expected)
            if name == QUANTIZED_MODEL:
                yield from _check_quantized(name, folder, device, size, deadline)


def _check_quantized(name: str, folder: Path, device: torch.device, size: Size, deadline: float) -> Iterator[Parity]:
    """A model over every quantized format of the cache."""
    for kv_dtype in [key for key in KV_FORMATS if key != "model"]:
        plain = {"kv_dtype": kv_dtype, "execution": "eager", "attention": "reference"}
        expected = None
        for setting, knobs in settings(device).items():
            if setting not in ("fused", "graphs"):  # what an engine on a GPU would run
                continue
            label = f"{setting}, {kv_dtype} cache"
            if time.monotonic() > deadline:
                yield Parity(name, label, None, {}, "no time left")
                continue
            if expected is None:
                expected = _generate(folder, plain, device, size)[0]
            yield _check(name, label, folder, knobs | {"kv_dtype": kv_dtype}, device, size, expected)


def _reference(config: Any, folder: Path, device: torch.device, size: Size) -> tuple[Path, list[list[int]]]:
    """A random model on disk, and what transformers generates with it in float32 on the same device."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):  # initialised to a constant, which would hide mistakes
            torch.nn.init.normal_(parameter, mean=1.0, std=0.2)
    model.save_pretrained(folder)
    tokenizer_of(VOCABULARY).save_pretrained(folder)
    model = model.to(device)
    expected = []
    with torch.inference_mode():
        for prompt in prompts(size):
            ids = torch.tensor([prompt], device=device)
            found = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=OUTPUT_TOKENS[size],
                min_new_tokens=OUTPUT_TOKENS[size],
                do_sample=False,
                pad_token_id=0,
            )
            expected.append(found[0, len(prompt) :].tolist())
    return folder, expected


def prompts(size: Size) -> list[list[int]]:
    """Token ids, fixed; none ends a generation."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (length,), generator=generator).tolist() for length in PROMPT_LENGTHS[size]]


def _check(
    name: str,
    setting: str,
    folder: Path,
    knobs: dict[str, Any],
    device: torch.device,
    size: Size,
    expected: list[list[int]],
) -> Parity:
    try:
        found, path = _generate(folder, knobs, device, size)
    except Exception as error:  # a setting that cannot run is a result
        return Parity(name, setting, None, {}, f"{type(error).__name__}: {str(error)[:300]}")
    return Parity(name, setting, found == expected, path)


def _generate(
    folder: Path, knobs: dict[str, Any], device: torch.device, size: Size
) -> tuple[list[list[int]], dict[str, str]]:
    """The tokens of an engine of its own, and what really ran."""
    fixed = {"model": str(folder), "dtype": "float32", "device": str(device), "linear": "torch", "token_budget": 16}
    config = EngineConfig.from_mapping(fixed | {"memory_limit_gib": 0.5, "max_num_seqs": 8} | knobs)
    engine = Engine(load_model(str(folder), dtype="float32", device=str(device)), config)
    wait_until_prepared(engine)
    found = generate(engine, size)
    path = path_of(engine)
    engine.close()
    return found, path


def generate(engine: Engine, size: Size) -> list[list[int]]:
    """Greedy tokens of all prompts at once, prefilled in chunks. The first token that ends a text is passed over."""
    for index, prompt in enumerate(prompts(size)):
        params = SamplingParams(max_tokens=OUTPUT_TOKENS[size], min_tokens=OUTPUT_TOKENS[size])
        engine.add_request(str(index), prompt, params)
    tokens: dict[str, list[int]] = {}
    while engine.has_unfinished():
        for output in engine.step():
            tokens[output.request_id] = list(output.token_ids)
    return [tokens[str(index)] for index in range(len(PROMPT_LENGTHS[size]))]


def wait_until_prepared(engine: Engine) -> None:
    """Have an engine that serves nobody take over what its execution mode prepares.

    Raises:
        TimeoutError: if that takes longer than three minutes.
    """
    end = time.monotonic() + PREPARATION_TIMEOUT_S
    while take_status(engine).execution["preparing"] is not None:  # asking takes over what is ready
        if time.monotonic() > end:
            raise TimeoutError("the execution mode was not prepared in time")
        time.sleep(0.001)
