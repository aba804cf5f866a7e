"""One formula, used twice: what is planned is what the engine really holds, to the byte."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engine.capacity import ModelSpec, PlanRequest, custom_gpu, parameter_count, plan
from engine.capacity.formats import BFLOAT16
from engine.capacity.memory import budget
from engine.capacity.memory.profiles import find_profile, profile_weight_precision, resident_weight_bytes
from tests.capacity.by_name import weight_bytes


@pytest.mark.model
def test_planned_weights_are_the_weights_that_the_default_model_holds(default_model_float32: Any):
    spec = default_model_float32.spec
    assert parameter_count(spec).total == 134_515_008
    assert weight_bytes(spec, "float32") == default_model_float32.weight_bytes()


@pytest.mark.parametrize(
    ("weights", "group", "planned"),
    [
        ("int8", 64, "int8"),
        ("int4", 32, "int4-g32"),
        ("int4", 64, "int4-g64"),
        ("w4a8", 64, "w4a8"),
        ("w8a8", 64, "w8a8"),
        ("fp8", 64, "fp8"),
    ],
)
def test_planned_quantized_weights_are_what_the_engine_keeps(tiny_llama: Any, weights: str, group: int, planned: str):
    from engine.models import load_model

    model = load_model(str(tiny_llama), dtype="bfloat16", device="cpu")
    model.commit_weights(model.prepare_weights(weights, group))
    spec = ModelSpec.from_hf_config(json.loads((tiny_llama / "config.json").read_text()))
    headroom = find_profile("headroom")
    precision = profile_weight_precision(headroom, planned, spec)
    assert resident_weight_bytes(headroom, spec, precision, BFLOAT16) == model.weight_bytes()


@pytest.fixture(scope="module")
def own_model(default_gguf: Any) -> Any:
    """A model of these tests' own: an engine may repack the weights of the model it is given."""
    from engine.models import load_model

    return load_model("smollm2-135m", dtype="float32", device="cpu")


def _plan_of_engine(spec: ModelSpec, limit_gib: float, sequences: int, context: int):
    return plan(
        PlanRequest(
            spec,
            custom_gpu("this machine", limit_gib),
            dtype="float32",
            context=context,
            max_num_seqs=sequences,
            token_budget=512,
            utilization=1.0,
            profile="headroom",
        )
    )


@pytest.mark.model
@pytest.mark.parametrize(("limit_gib", "sequences"), [(1.0, 64), (0.75, 16), (2.0, 8)])
def test_engine_allocates_exactly_the_planned_blocks(own_model: Any, limit_gib: float, sequences: int):
    from engine.config import EngineConfig
    from engine.core import Engine

    knobs = {"memory_limit_gib": limit_gib, "max_num_seqs": sequences, "max_num_batched_tokens": 512}
    engine = Engine(own_model, EngineConfig.from_mapping(knobs | {"max_model_len": 2048}))
    answer = _plan_of_engine(own_model.spec, limit_gib, sequences, 2048)
    assert engine.envelope.num_blocks == answer.kv_blocks
    assert engine.cache.nbytes == answer.memory.kv
    assert engine.envelope.weights_bytes == answer.memory.weights
    assert engine.envelope.activation_bytes == answer.memory.activation


def test_engine_and_plan_go_through_the_same_budget(tiny_llama: Any, monkeypatch: pytest.MonkeyPatch):
    from engine.config import EngineConfig
    from engine.models import load_model
    from engine.sizing import size_engine

    model = load_model(str(tiny_llama), dtype="float32", device="cpu")
    config = EngineConfig.from_mapping({"memory_limit_gib": 0.1, "max_num_seqs": 8, "max_num_batched_tokens": 512})

    def numbers() -> list[tuple[int, ...]]:
        envelope = size_engine(model, config)
        answer = _plan_of_engine(model.spec, 0.1, 8, model.max_position)
        limit, memory = int(config.memory_limit_gib * 2**30), answer.memory
        return [
            (envelope.limit_bytes, envelope.weights_bytes, envelope.activation_bytes, envelope.num_blocks),
            (limit, memory.weights, memory.activation, memory.kv_blocks),
        ]

    engine, planned = numbers()
    assert engine == planned
    # A term that is added to the one budget is taken from both caches.
    monkeypatch.setattr(budget, "peak_activation_bytes", lambda *_: 99 * 2**20)
    dearer = numbers()
    assert dearer[0] == dearer[1] != engine


_RESIDENT = """
import gc, json, psutil, torch
from engine.config import EngineConfig
from engine.core import Engine
from engine.models import load_model
from engine.sampling.params import SamplingParams
def resident():
    memory = psutil.Process().memory_info()
    return memory.rss - memory.shared  # pages of files (libraries, the checkpoint) are the kernel's to take back
torch.ones(512, 512) @ torch.ones(512, 512)
before = resident()
model = load_model("smollm2-135m", dtype="float32", device="cpu")
knobs = {"memory_limit_gib": 2.0, "max_num_seqs": 16, "max_num_batched_tokens": 512, "max_model_len": 2048}
engine = Engine(model, EngineConfig.from_mapping(knobs))
for storage in (*engine.cache.keys, *engine.cache.values):
    storage.fill_(0.5)
engine.add_request("one", list(range(100, 700)), SamplingParams(temperature=0.0, max_tokens=2))
most = 0
while engine.has_unfinished():
    engine.step()
    most = max(most, resident())
print(json.dumps({"used": most - before, "blocks": engine.envelope.num_blocks}))
"""


@pytest.mark.model
def test_resident_memory_is_within_five_percent_of_the_plan(own_model: Any):
    command = [sys.executable, "-c", _RESIDENT]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=True, timeout=300)
    seen = json.loads(done.stdout.splitlines()[-1])
    answer = _plan_of_engine(own_model.spec, 2.0, 16, 2048)
    assert seen["blocks"] == answer.kv_blocks
    assert seen["used"] == pytest.approx(answer.memory.fixed + answer.memory.kv, rel=0.05)
