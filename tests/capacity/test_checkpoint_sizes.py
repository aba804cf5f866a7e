"""Sizes read from the headers of real checkpoints are those of their tensors, and of the planner's count."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from engine.capacity import ModelSpec, parameter_count
from engine.errors import ModelLoadError
from engine.models.checkpoint_sizes import checkpoint_sizes
from tests.capacity.by_name import weight_bytes


def test_folder_of_safetensors_sums_to_the_planned_weights(tiny_llama):
    sizes = checkpoint_sizes(tiny_llama)
    spec = ModelSpec.from_hf_config(json.loads((tiny_llama / "config.json").read_text()))
    assert sizes.elements == parameter_count(spec).total
    assert sizes.bytes == weight_bytes(spec, "float32")
    assert sizes.bytes_by_dtype == {"F32": sizes.bytes}


def test_dtypes_are_told_apart_largest_first(tmp_path):
    tensors = {"a": torch.zeros(64, 8, dtype=torch.bfloat16), "b": torch.zeros(16, dtype=torch.int8)}
    save_file(tensors, tmp_path / "model.safetensors")
    sizes = checkpoint_sizes(tmp_path / "model.safetensors")
    assert list(sizes.bytes_by_dtype.items()) == [("BF16", 1024), ("I8", 16)]
    assert (sizes.tensors, sizes.elements, sizes.bytes) == (2, 528, 1040)


@pytest.mark.model
def test_gguf_file_of_the_default_model_has_its_parameters():
    from engine.models import fetch_default_model

    sizes = checkpoint_sizes(fetch_default_model())
    assert sizes.elements == 134_515_008
    assert sizes.bytes < 134_515_008
    assert len(sizes.bytes_by_dtype) >= 2


@pytest.mark.parametrize(
    "content",
    [b"", b"short", struct.pack("<Q", 2**60), struct.pack("<Q", 4) + b"null", struct.pack("<Q", 9) + b'{"a": {}}'],
)
def test_broken_header_is_explained(tmp_path, content: bytes):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelLoadError) as problem:
        checkpoint_sizes(tmp_path)
    assert problem.value.remedy


def test_broken_gguf_and_missing_files_are_explained(tmp_path):
    with pytest.raises(ModelLoadError):
        checkpoint_sizes(tmp_path)
    (tmp_path / "model.gguf").write_bytes(b"GGUF nonsense that is long enough to be read as a header of a file")
    with pytest.raises(ModelLoadError):
        checkpoint_sizes(tmp_path)
