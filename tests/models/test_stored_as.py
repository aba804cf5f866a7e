"""What a checkpoint says its weights are stored as."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from engine.config import DEFAULT_MODEL
from engine.models.checkpoint import Checkpoint, stored_as
from engine.models.gguf_checkpoint import GGUFCheckpoint
from engine.models.loader import resolve
from engine.models.safetensors_checkpoint import SafetensorsCheckpoint


@pytest.mark.model
def test_the_default_model_is_told_to_be_stored_in_q4_1():
    checkpoint = resolve(DEFAULT_MODEL)
    assert isinstance(checkpoint, GGUFCheckpoint)
    assert stored_as(checkpoint) == "mostly Q4_1 (79 %, GGUF)"


@pytest.mark.parametrize(
    ("tensors", "config", "words"),
    [
        ({"model.embed_tokens.weight": torch.bfloat16}, {}, "BF16 (safetensors)"),
        ({"model.embed_tokens.weight": torch.float16, "x": torch.float32}, {}, "mostly F16 (50 %, safetensors)"),
        ({"x": torch.int32}, {"quantization_config": {"quant_method": "gptq"}}, "quantized by gptq (safetensors)"),
    ],
)
def test_a_folder_is_told_by_what_its_tensors_are(tmp_path, tensors, config, words):
    save_file({name: torch.zeros(4, 4, dtype=dtype) for name, dtype in tensors.items()}, tmp_path / "m.safetensors")
    base = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(base | config))
    assert stored_as(SafetensorsCheckpoint(tmp_path)) == words


def test_weights_of_no_file_are_told_so():
    class InMemory(Checkpoint):
        source, config = "random", {}

        def names(self):
            return frozenset()

        def tensor(self, name):
            raise AssertionError("how it is stored is told without reading a tensor")

        def fingerprint(self):
            return ""

    assert stored_as(InMemory([])) == "in no file"
