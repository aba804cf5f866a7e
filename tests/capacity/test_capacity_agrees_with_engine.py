"""One formula, used twice: what is planned is what the engine really holds, to the byte."""

from __future__ import annotations

import json
from typing import Any

import pytest

from engine.capacity import ModelSpec, parameter_count, weight_bytes
from engine.capacity.profiles import find_profile, profile_weight_format, resident_weight_bytes


@pytest.mark.model
def test_planned_weights_are_the_weights_that_the_default_model_holds(default_model_float32: Any):
    spec = default_model_float32.spec
    assert parameter_count(spec).total == 134_515_008
    assert weight_bytes(spec, "float32") == default_model_float32.weight_bytes()


@pytest.mark.parametrize(
    ("weights", "group", "planned"), [("int8", 64, "int8"), ("int4", 32, "int4-g32"), ("int4", 64, "int4-g64")]
)
def test_planned_quantized_weights_are_what_the_engine_keeps(tiny_llama: Any, weights: str, group: int, planned: str):
    from engine.models import load_model

    model = load_model(str(tiny_llama), dtype="bfloat16", device="cpu")
    model.commit_weights(model.prepare_weights(weights, group))
    spec = ModelSpec.from_hf_config(json.loads((tiny_llama / "config.json").read_text()))
    headroom = find_profile("headroom")
    assert weight_bytes(spec, profile_weight_format(headroom, planned), dtype="bfloat16") == model.weight_bytes()
    assert resident_weight_bytes(headroom, spec, planned, "bfloat16", tp=1) == model.weight_bytes()
