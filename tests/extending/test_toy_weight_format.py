"""A weight format from outside: one class and one registration, switched on while a request runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from engine.config import EngineConfig, knob, schema
from engine.core import Engine
from engine.errors import CapacityError, ConfigError
from engine.models import weight_swap
from engine.models.weight_swap import planned_bytes
from engine.quantization.formats import WeightFormat
from engine.quantization.registry import WeightChoice, register_weight_format
from engine.quantization.rows import Weight, row_slices
from engine.reconfigure import reconfigure
from engine.sampling.params import SamplingParams
from engine.status import path_of, take_status
from tests.extending.steps import PROMPT, finish, make_engine
from tests.support import transformers_greedy

LONG = list(range(40, 64))


class Eighths(WeightFormat):
    """Every weight is a multiple of an eighth, in a byte."""

    name = "eighths"
    bits = 8

    def __init__(self, weight: Weight, group_size: int, device: torch.device, dtype: torch.dtype) -> None:
        self.shape = (weight.shape[0], weight.shape[1])
        self.q = torch.empty(self.shape, dtype=torch.int8, device=device)
        for rows, values in row_slices(weight, device, torch.float32):
            self.q[rows] = to_eighths(values).to(torch.int8)

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return F.linear(x, self.dequantize().to(x.dtype), bias)

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        return self.q[index].float() / 8

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"weight": self.q}

    def dequantize(self) -> torch.Tensor:
        return self.q.float() / 8

    @property
    def path(self) -> str:
        return "eighths: widened to a matmul"


def to_eighths(values: torch.Tensor) -> torch.Tensor:
    return (values * 8).round().clamp(-127, 127)


@pytest.fixture
def registered() -> Iterator[str]:
    remove = register_weight_format("eighths", Eighths, planned_as="int8")
    yield "eighths"
    remove()


@pytest.fixture
def engine(tiny_llama: Path) -> Engine:
    return make_engine(tiny_llama)


def ask(engine: Engine, name: str, prompt: list[int], count: int) -> None:
    engine.add_request(name, prompt, SamplingParams(max_tokens=count, ignore_eos=True))


def rounded_reference(folder: Path, prompt: list[int], count: int) -> list[int]:
    """The tokens of transformers with the blocks' weights rounded to eighths."""
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for module in reference.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = to_eighths(module.weight.data) / 8
    reference.generation_config.eos_token_id = None
    return transformers_greedy(reference, [prompt], count)[0]


def test_a_registered_format_is_switched_on_mid_request_and_computes_with_its_own_weights(
    engine: Engine, tiny_llama: Path, registered: str
):
    ask(engine, "running", LONG, 20)
    for _ in range(5):
        engine.step()
    before = engine.model.weight_bytes()
    reconfigure(engine, {"weights": registered})
    ask(engine, "fresh", PROMPT, 16)
    tokens = finish(engine)
    assert len(tokens["running"]) == 20
    assert tokens["fresh"] == rounded_reference(tiny_llama, PROMPT, 16)
    assert engine.model.weight_bytes() < before
    status = take_status(engine)
    assert status.config["weights"] == registered
    assert status.path["weights"].startswith("eighths: widened to a matmul")
    reconfigure(engine, {"weights": "model"})
    assert path_of(engine)["weights"].startswith("model")


def test_a_registered_format_is_offered_like_the_others_and_labelled_lossy(registered: str):
    offered = next(entry for entry in schema() if entry["name"] == "weights")
    assert registered in offered["choices"]
    assert knob("weights").lossless is False
    assert EngineConfig.from_mapping({"weights": registered}).weights == registered


@pytest.mark.parametrize("declared", [{"planned_as": "int8"}, {}], ids=["as declared", "as the model"])
def test_the_planner_counts_a_registered_format_as_it_declares_and_otherwise_as_the_model(
    engine: Engine, declared: dict[str, str]
):
    spec = engine.model.spec
    remove = register_weight_format("eighths", Eighths, **declared)
    found = planned_bytes(spec, WeightChoice("eighths"), torch.float32)
    remove()
    assert found == planned_bytes(spec, WeightChoice(declared.get("planned_as", "model")), torch.float32)


def test_a_refusal_says_where_the_size_of_a_registered_format_is_only_bounded(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(weight_swap, "free_bytes", lambda device: 1)
    for declared, said in (({}, True), ({"planned_as": "int8"}, False)):
        remove = register_weight_format("eighths", Eighths, **declared)
        with pytest.raises(CapacityError, match="the new weights need") as refused:
            reconfigure(engine, {"weights": "eighths"})
        remove()
        assert ("counted in the model's dtype: eighths declares no size" in refused.value.message) is said


def test_what_is_not_registered_any_more_or_declares_no_format_of_the_planner_is_refused():
    register_weight_format("eighths", Eighths)()
    with pytest.raises(ConfigError, match="eighths") as caught:
        EngineConfig.from_mapping({"weights": "eighths"})
    assert "w4a8" in caught.value.remedy
    with pytest.raises(ConfigError, match="'halves' is not a weight format"):
        register_weight_format("eighths", Eighths, planned_as="halves")
    with pytest.raises(ConfigError, match="already has"):
        register_weight_format("int8", Eighths)
    assert knob("weights").choices == ("model", "int8", "int4", "w4a8", "w8a8", "fp8")
