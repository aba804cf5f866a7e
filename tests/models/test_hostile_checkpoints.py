"""Whatever a checkpoint says, it is loaded or refused by name: no other error, no wait, no memory by its numbers."""

from __future__ import annotations

import resource
import time
from pathlib import Path

import pytest

from engine.errors import HeadroomError
from engine.models import load_model
from tests.attack import checkpoints
from tests.conftest import byte_tokenizer

SEED = 7
MOST_SECONDS = 30.0  # hundreds of times what it takes, for machines that do something else
MOST_GROWTH_KIB = 400 << 10


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch):
    monkeypatch.setenv("HEADROOM_HOME", str(tmp_path / "home"))


def survive(name: str, path: Path) -> str:
    """Load or refuse; what came of it."""
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    refusal: HeadroomError | None = None
    try:
        load_model(str(path), dtype="float32", device="cpu")
    except HeadroomError as error:
        refusal = error
    assert refusal is None or (refusal.message and refusal.remedy), f"{name}: {refusal}"
    assert time.perf_counter() - began < MOST_SECONDS, name
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_GROWTH_KIB, name
    return "loaded" if refusal is None else "refused"


def test_undamaged_checkpoints_of_the_fuzzer_load(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(checkpoints.gguf_parts().to_bytes())
    assert survive("gguf", path) == "loaded"
    assert survive("folder", checkpoints.write_folder(tmp_path / "model", byte_tokenizer())) == "loaded"


def test_damaged_gguf_files_load_or_are_refused_by_name(tmp_path):
    outcomes = [survive(name, path) for name, path in checkpoints.gguf_mutations(SEED, 60, tmp_path)]
    assert outcomes.count("refused") > 30


def test_damaged_safetensors_folders_load_or_are_refused_by_name(tmp_path):
    folder = checkpoints.write_folder(tmp_path / "model", byte_tokenizer())
    outcomes = [survive(name, path) for name, path in checkpoints.safetensors_mutations(SEED, 50, folder)]
    assert outcomes.count("refused") > 25


def test_hostile_configurations_load_or_are_refused_by_name(tmp_path):
    folder = checkpoints.write_folder(tmp_path / "model", byte_tokenizer())
    outcomes = []
    for name, config in checkpoints.config_mutations(SEED, 60):
        checkpoints.write_config(folder, config)
        outcomes.append(survive(name, folder))
    assert outcomes.count("refused") > 20
