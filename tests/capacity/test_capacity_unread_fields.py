"""No field of a configuration is ignored in silence: it is read, known to change nothing, or named in a warning."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.capacity import ModelSpec, PlanRequest, find_gpu, model_config, model_names, parameter_count, plan
from engine.capacity.model.harmless import HARMLESS
from engine.cli.app import main
from engine.errors import HeadroomError
from tests.capacity.test_capacity_agrees_with_transformers import (
    BY_DEFAULT,
    LAYERS,
    built_parameters,
    cut_config,
    default_config,
)

NOT_FIELDS = ("architectures", "model_type", "torch_dtype", "quantization_config", "_name_or_path")
#: Fields that the other tests vary, or whose change costs too much to build.
VARIED_ELSEWHERE = {*NOT_FIELDS, "dtype", "id2label", "label2id", "num_hidden_layers", "vocab_size", "hidden_size"}


def unread(config: dict[str, Any]) -> str:
    """The warning of what was not read, "" without one."""
    return " ".join(note for note in ModelSpec.from_hf_config(config).notes if note.startswith("Not read"))


@pytest.mark.parametrize("name", model_names())
def test_catalog_gives_no_false_warning_and_an_unknown_field_is_named(name: str):
    config = model_config(name)
    assert not unread(config)
    assert "moe_zz_width" in unread(config | {"moe_zz_width": 512})
    for inside in ("text_config", "rope_scaling", "rope_parameters", "quantization_config"):
        if isinstance(config.get(inside), dict):
            assert f"{inside}.zz_size" in unread(config | {inside: config[inside] | {"zz_size": 512}})


names = st.text("abcdefghijklmnopqrstuvwxyz_", min_size=3, max_size=30).map(lambda text: f"zz{text}q")
values = st.integers(1) | st.floats(0.1) | st.text(min_size=1) | st.just(True) | st.lists(st.integers(), min_size=1)


@given(st.sampled_from(model_names()), names, values)
@settings(max_examples=150, deadline=None)
def test_any_unknown_field_is_named_whatever_it_says(name: str, field: str, value: Any):
    assert field in unread(model_config(name) | {field: value})


@pytest.mark.parametrize("value", [None, False, 0, 0.0, "", [], {}])
def test_a_field_that_says_none_of_it_is_not_warned_of(value: Any):
    assert not unread(model_config("Llama-3.1-8B") | {"zz_experts": value})


def test_many_unread_fields_are_one_warning():
    notes = ModelSpec.from_hf_config(model_config("Llama-3.1-8B") | {f"zz_{n}": n + 1 for n in range(500)}).notes
    assert len(notes) == 1
    assert "and 492 more" in notes[0]
    assert len(notes[0]) < 1000


def test_warning_reaches_plan_json_and_text(tmp_path, capfd):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(model_config("Qwen3-8B") | {"zz_latent_size": 64}))
    spec = ModelSpec.from_hf_config(json.loads(file.read_text()))
    assert "zz_latent_size" in " ".join(plan(PlanRequest(spec, find_gpu("H200"), context=4096)).warnings)
    options = ["plan", "--model", str(file), "--gpu", "H200", "--context", "4096"]
    assert main([*options, "--json"]) == 0
    assert "zz_latent_size" in " ".join(json.loads(capfd.readouterr().out)["warnings"])
    assert main(options) == 0
    assert "warning: Not read: zz_latent_size" in capfd.readouterr().out


def _variants(value: Any) -> list[Any]:
    if value is None:
        return [8, True]
    if isinstance(value, bool):
        return [not value]
    return [value * 2 or 1, max(value // 2, 1)] if isinstance(value, int) else []


def _changes(config: dict[str, Any]) -> Iterator[tuple[str, Any, int]]:
    """(field, value, parameters) of fields of transformers' own class that change the model it builds."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    family = CONFIG_MAPPING[config["model_type"]]
    full = family(**{key: value for key, value in config.items() if key not in NOT_FIELDS}).to_dict()
    before = built_parameters(config)
    fields = {*full, *getattr(family, "__dataclass_fields__", {})} - VARIED_ELSEWHERE
    for field in sorted(fields):
        for value in _variants(full.get(field)):
            try:
                after = built_parameters(config | {field: value})
            except Exception:
                continue
            if after != before:
                yield field, value, after


def shortened(name: str) -> dict[str, Any]:
    """A configuration of few layers: of a model of the catalog, or of a family's class by default."""
    return cut_config(name, LAYERS[name]) if name in LAYERS else default_config(name, BY_DEFAULT[name])


@pytest.mark.parametrize("name", [*LAYERS, *BY_DEFAULT])
def test_every_field_of_transformers_class_that_changes_the_count_is_read_or_named(name: str):
    config = shortened(name)
    changed = 0
    for field, value, parameters in _changes(config):
        changed += 1
        assert field not in HARMLESS, field
        try:
            spec = ModelSpec.from_hf_config(config | {field: value})
        except HeadroomError:
            continue  # refused by name
        assert parameter_count(spec).total == parameters or field in " ".join(spec.notes), (field, value)
    assert changed >= 3


@pytest.mark.parametrize("name", [*LAYERS, *BY_DEFAULT])
def test_all_that_transformers_writes_of_a_family_is_known(name: str):
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = shortened(name)
    fields = {key: value for key, value in config.items() if key not in NOT_FIELDS}
    written = CONFIG_MAPPING[config["model_type"]](**fields).to_dict()
    written |= {"architectures": config["architectures"], "model_type": config["model_type"]}
    assert not unread(written)
    count = parameter_count(ModelSpec.from_hf_config(written)).total
    assert count == parameter_count(ModelSpec.from_hf_config(config)).total
