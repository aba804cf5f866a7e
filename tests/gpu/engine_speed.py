"""The engine on a model's real shapes with random weights, beside its floor: formats of weights and cache, batches,
executions.

The floor of a decode step: its weights and the keys and values of its sequences read once at the copy bandwidth of the
same run, or its operations at the matrix rate of the same run, whichever takes longer.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from engine.config import EngineConfig
from engine.core import Engine
from engine.models.loader import LoadedModel
from engine.reconfigure import reconfigure
from engine.sampling.params import SamplingParams
from engine.status import path_of
from kernels.kv_formats import KV_FORMATS, KVFormat
from tests.gpu.case import Size
from tests.gpu.ceilings import Ceilings
from tests.gpu.engine_parity import wait_until_prepared
from tests.gpu.kernels import Verdict
from tests.gpu.random_model import LLAMA_3_1_8B, TINY, make, tokenizer_of

WEIGHTS: dict[str, dict[str, Any]] = {
    "bfloat16": {"weights": "model"},
    "int8": {"weights": "int8"},
    "int4": {"weights": "int4", "group_size": "128"},
    "w8a8": {"weights": "w8a8"},
    "fp8": {"weights": "fp8"},
    "bfloat16, fp8 cache": {"weights": "model", "kv_dtype": "fp8"},
    "bfloat16, int8 cache": {"weights": "model", "kv_dtype": "int8"},
}
BATCHES = {"full": (1, 32, 256), "tiny": (1, 2)}
PROMPT_TOKENS = {"full": 128, "tiny": 3}
OUTPUT_TOKENS = {"full": 96, "tiny": 3}
#: The matrix units that a format's products use, a key of the ceilings; of others the compute dtype's.
FLOP_UNITS = {"w8a8": "int8", "fp8": "float8"}
ONE_STREAM_BARS = {"bfloat16": 0.85, "int4": 0.65}
PEER_BAR = {256: 3.0}


@dataclasses.dataclass(frozen=True, slots=True)
class Speed:
    """One engine in one setting at one batch.

    Attributes:
        engine: ``"headroom"`` or ``"transformers"``.
        setting: weights and execution in words.
        batch: sequences decoding at once.
        step_ms: median time of a decode step; None if it could not run.
        tokens_s: output tokens per second of decode, all sequences together.
        floor_ms: least time of a step by the ceilings of this run.
        of_floor: ``floor_ms / step_ms``.
        path: what really ran.
    """

    engine: str
    setting: str
    batch: int
    step_ms: float | None
    tokens_s: float | None
    floor_ms: float | None
    of_floor: float | None
    path: dict[str, str]
    problem: str = ""
    verdict: Verdict | None = None


def measure_all(
    device: torch.device, size: Size, ceilings: Ceilings, deadline: float, tell: Callable[[str], None]
) -> Iterator[Speed]:
    """Ours in every weight format and execution, then transformers, batch by batch."""
    config = LLAMA_3_1_8B if size == "full" else TINY
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    theirs = {}
    tell("transformers …")
    for speed in _transformers(config, device, dtype, size, deadline):
        theirs[speed.batch] = speed.tokens_s
        yield speed
    if device.type == "cuda":
        torch.cuda.empty_cache()
    tell("making the random model …")
    model = make(config, device, dtype, tokenizer_of(config["vocab_size"]))
    for weights, knobs in WEIGHTS.items():
        tell(f"engine, {weights} …")
        for speed in _headroom(model, weights, knobs, device, size, ceilings, deadline):
            yield _with_verdict(speed, weights, theirs.get(speed.batch))


def _with_verdict(speed: Speed, weights: str, theirs: float | None) -> Speed:
    best_mode = speed.setting.endswith(("graphs", "auto"))
    if speed.batch == 1 and best_mode and weights in ONE_STREAM_BARS:
        bar, value = ONE_STREAM_BARS[weights], speed.of_floor
        verdict = Verdict("floor", bar, value, None if value is None else value >= bar)
        return dataclasses.replace(speed, verdict=verdict)
    if speed.batch in PEER_BAR and best_mode and weights == "bfloat16":
        bar = PEER_BAR[speed.batch]
        ratio = None if theirs is None or speed.tokens_s is None else speed.tokens_s / theirs
        return dataclasses.replace(
            speed, verdict=Verdict("transformers", bar, ratio, None if ratio is None else ratio >= bar)
        )
    return speed


# -- ours -------------------------------------------------------------------------------------------------------------


def _headroom(
    model: LoadedModel,
    weights: str,
    knobs: dict[str, Any],
    device: torch.device,
    size: Size,
    ceilings: Ceilings,
    deadline: float,
) -> Iterator[Speed]:
    executions = ("fused", "graphs") if device.type == "cuda" else ("fused",)
    most = max(BATCHES[size])
    fixed = {"device": str(device), "attention": "triton", "max_num_seqs": most, "max_running": most}
    fixed |= {"prefix_cache": False, "memory_limit_gib": 40.0 if device.type == "cuda" else 1.0}
    try:
        engine = Engine(model, EngineConfig.from_mapping(fixed | {"linear": "triton", "execution": "eager"} | knobs))
    except Exception as error:
        for batch in BATCHES[size]:
            yield _failed("headroom", weights, batch, error)
        return
    for execution in executions:
        for batch in BATCHES[size]:
            setting = f"{weights}, {execution}"
            if time.monotonic() > deadline:
                yield Speed("headroom", setting, batch, None, None, None, None, {}, "no time left")
                continue
            try:
                reconfigure(engine, {"execution": execution})
                wait_until_prepared(engine)
                step_s = _decode_step_s(engine, batch, size)
                floor = floor_s(model, batch, size, ceilings, engine.cache.format)
                yield _speed("headroom", setting, batch, step_s, floor, path_of(engine))
            except Exception as error:
                engine.fail_all("the measurement failed")
                yield _failed("headroom", setting, batch, error)
    engine.close()


def _decode_step_s(engine: Engine, batch: int, size: Size) -> float:
    """Median time of a step in which ``batch`` sequences decode one token each."""
    prompt_tokens, output_tokens = PROMPT_TOKENS[size], OUTPUT_TOKENS[size]
    vocab = engine.model.decoder.vocab_size
    generator = torch.Generator().manual_seed(0)
    for index in range(batch):
        prompt = torch.randint(0, vocab, (prompt_tokens,), generator=generator).tolist()
        params = SamplingParams(max_tokens=output_tokens, ignore_eos=True)
        engine.add_request(f"{index}", prompt, params)
    samples = []
    while engine.has_unfinished():
        began = time.perf_counter()
        outputs = engine.step()  # ends with the sampled tokens on the host: the device has been waited for
        elapsed = time.perf_counter() - began
        pure_decode = engine.steps[-1].prefill_tokens == 0
        if pure_decode and len(outputs) == batch:
            samples.append(elapsed)
    return statistics.median(samples)


def floor_s(
    model: LoadedModel, batch: int, size: Size, ceilings: Ceilings, cache: KVFormat = KV_FORMATS["model"]
) -> float | None:
    """Least time of a decode step in the middle of the measurement; None where the rate of its units is not known."""
    spec = model.decoder
    context = PROMPT_TOKENS[size] + OUTPUT_TOKENS[size] // 2
    heads = 2 * spec.num_layers * spec.num_kv_heads * context * batch
    kv_bytes = heads * cache.head_bytes(spec.head_dim, model.dtype)
    table = model.decoder.embed_tokens.format.nbytes()  # of which a step reads a row a sequence
    moved = model.weight_bytes() - table + kv_bytes
    flops = 2 * batch * (model.num_parameters() - model.decoder.vocab_size * model.decoder.hidden_size)
    return ceilings.floor_s(moved, flops, FLOP_UNITS.get(model.weights_choice.weights, "bfloat16"))


# -- transformers -----------------------------------------------------------------------------------------------------


def _transformers(
    config: dict[str, Any], device: torch.device, dtype: torch.dtype, size: Size, deadline: float
) -> Iterator[Speed]:
    """``generate`` in one static batch, with the dynamic cache and, for one stream, the compiled static one."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    fields = {name: value for name, value in config.items() if name not in ("architectures", "model_type")}
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**fields), dtype=dtype).eval()
    for batch in BATCHES[size]:
        if time.monotonic() > deadline:
            yield Speed("transformers", "dynamic cache", batch, None, None, None, None, {}, "no time left")
            continue
        try:
            step_s = _generate_step_s(model, batch, size, device)
            yield _speed("transformers", "dynamic cache", batch, step_s, None, {"attention": "sdpa"})
        except Exception as error:
            yield _failed("transformers", "dynamic cache", batch, error)


def _generate_step_s(model: Any, batch: int, size: Size, device: torch.device) -> float:
    """Median time between two tokens of a batch."""
    ids = torch.randint(0, model.config.vocab_size, (batch, PROMPT_TOKENS[size]), device=device)
    moments: list[float] = []

    def watch(input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        if device.type == "cuda":
            torch.cuda.synchronize()
        moments.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=device)

    arguments = {"max_new_tokens": OUTPUT_TOKENS[size], "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with torch.inference_mode():
        model.generate(ids, attention_mask=torch.ones_like(ids), stopping_criteria=[watch], **arguments)
    return statistics.median(after - before for before, after in itertools.pairwise(moments))


def _speed(engine: str, setting: str, batch: int, step_s: float, floor: float | None, path: dict[str, str]) -> Speed:
    floor_ms = None if floor is None else 1e3 * floor
    of_floor = None if floor is None else floor / step_s
    return Speed(engine, setting, batch, 1e3 * step_s, batch / step_s, floor_ms, of_floor, path)


def _failed(engine: str, setting: str, batch: int, error: BaseException) -> Speed:
    message = f"{type(error).__name__}: {str(error)[:300]}"
    return Speed(engine, setting, batch, None, None, None, None, {}, message)
