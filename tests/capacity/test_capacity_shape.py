"""A shape entered by hand is planned like a model of the catalog."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.capacity import SHAPE_FIELDS, PlanRequest, find_gpu, model_spec, parameter_count, plan, spec_of_shape
from engine.cli.app import main
from engine.errors import ConfigError
from tests.capacity.by_name import kv_bytes_per_token

LLAMA = {"layers": 32, "hidden": 4096, "heads": 32, "kv_heads": 8, "intermediate": 14336, "vocab": 128256}
SAME: list[tuple[str, dict[str, Any], int]] = [
    ("Llama-3.1-8B", LLAMA, 0),
    ("Llama-3.2-1B", LLAMA | {"layers": 16, "hidden": 2048, "intermediate": 8192, "tied": True, "head_dim": 64}, 0),
    ("Qwen3-30B-A3B", {"layers": 48, "hidden": 2048, "heads": 32, "kv_heads": 4, "head_dim": 128, "vocab": 151936,
                       "qk_norm": True, "experts": 128, "experts_per_token": 8, "expert_intermediate": 768}, 0),
    # Its routers have a bias an expert that the shape does not know.
    ("DeepSeek-V3", {"layers": 61, "hidden": 7168, "heads": 128, "intermediate": 18432, "vocab": 129280,
                     "kv_rank": 512, "q_rank": 1536, "nope_dim": 128, "rope_dim": 64, "value_dim": 128, "experts": 256,
                     "experts_per_token": 8, "expert_intermediate": 2048, "shared_experts": 1, "dense_layers": 3},
     58 * 256),
]  # fmt: skip


@pytest.mark.parametrize(("name", "shape", "left_out"), SAME)
def test_shape_of_a_catalog_model_gives_its_numbers(name: str, shape: dict[str, Any], left_out: int):
    spec, known = spec_of_shape(shape), model_spec(name)
    count, right = parameter_count(spec), parameter_count(known)
    assert count.total == right.total - left_out
    assert count.active == right.active - left_out
    assert kv_bytes_per_token(spec, "bf16") == kv_bytes_per_token(known, "bf16")


def test_windows_slide_in_all_but_every_nth_layer():
    spec = spec_of_shape(LLAMA | {"window": 1024, "full_every": 6})
    assert [window is None for window in spec.layer_windows].count(True) == 5
    assert spec_of_shape(LLAMA | {"window": 1024}).num_sliding_layers == 32


def test_number_of_parameters_gives_the_width_and_says_so():
    shape = {key: value for key, value in LLAMA.items() if key != "intermediate"} | {"parameters": 8_030_261_248}
    spec = spec_of_shape(shape)
    assert parameter_count(spec).total == pytest.approx(8_030_261_248, rel=0.001)
    assert "8,030,261,248 given" in " ".join(spec.notes)
    with pytest.raises(ConfigError) as problem:
        spec_of_shape(shape | {"parameters": 1000})
    assert problem.value.field == "parameters"
    wrong = spec_of_shape(LLAMA | {"parameters": 70_000_000_000})
    assert "not the 70,000,000,000 given" in " ".join(wrong.notes)


@pytest.mark.parametrize(
    ("field", "value"),
    [("layers", 0), ("layers", 10**9), ("hidden", -1), ("heads", "8"), ("vocab", 1.5), ("tied", 1), ("kv_heads", 5),
     ("experts_per_token", 200), ("head_dim", True), ("context", float("nan"))],
)  # fmt: skip
def test_wrong_field_is_named_with_its_bounds(field: str, value: Any):
    with pytest.raises(ConfigError) as problem:
        spec_of_shape(LLAMA | {"experts": 64} | {field: value})
    assert problem.value.field == field
    assert problem.value.remedy


def test_unknown_field_and_missing_width_are_named():
    for shape, field in ((LLAMA | {"zz": 1}, "shape"), ({"layers": 3}, "intermediate"), ([], "shape")):
        with pytest.raises(ConfigError) as problem:
            spec_of_shape(shape)  # type: ignore[arg-type]
        assert problem.value.field == field


anything = st.none() | st.booleans() | st.integers(-2, 300) | st.integers() | st.floats() | st.text(max_size=4)


@given(st.dictionaries(st.sampled_from([field.name for field in SHAPE_FIELDS]), anything, max_size=6))
@settings(max_examples=200, deadline=None)
def test_any_shape_is_planned_or_explained(changes: dict[str, Any]):
    try:
        spec = spec_of_shape(LLAMA | changes)
        plan(PlanRequest(spec, find_gpu("H200"), context=min(spec.max_position, 64))).to_dict()
    except ConfigError as problem:
        explained = problem.field and problem.remedy
    else:
        explained = True
    assert explained


@pytest.mark.parametrize("form", ["pairs", "json", "file"])
def test_command_line_takes_pairs_json_or_a_file(tmp_path, capfd, form: str):
    text = ",".join(f"{key}={value}" for key, value in LLAMA.items()) + ",tied=false,name=Mine"
    if form != "pairs":
        text = json.dumps(LLAMA | {"tied": False, "name": "Mine"})
    if form == "file":
        (tmp_path / "shape.json").write_text(text)
        text = str(tmp_path / "shape.json")
    assert main(["plan", "--shape", text, "--gpu", "H100 SXM 80GB", "--context", "8192", "--json"]) == 0
    document = json.loads(capfd.readouterr().out)
    assert document["parameters"]["total"] == 8_030_261_248
    assert document["request"]["model"] == "Mine"


@pytest.mark.parametrize("text", ["", "{", "layers=x", "nowhere.json", "{}[", "layers=1e400,hidden=4", "=", "[1]"])
def test_shape_that_cannot_be_read_is_explained(capfd, text: str):
    assert main(["plan", "--shape", text, "--gpu", "H100 SXM 80GB", "--json"]) == 2
    assert json.loads(capfd.readouterr().out)["error"]["field"] in ("shape", "layers", "intermediate")


def test_neither_a_model_nor_a_shape_is_explained(capfd):
    assert main(["plan", "--gpu", "H100 SXM 80GB", "--json"]) == 2
    assert json.loads(capfd.readouterr().out)["error"]["field"] == "model"
