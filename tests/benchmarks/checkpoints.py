"""The checkpoints that the benchmark runs on, as folders every engine can read.

    python -m tests.benchmarks.checkpoints smollm2-135m     # the default model, its GGUF file dequantized
    python -m tests.benchmarks.checkpoints llama-3.1-8b     # the shapes of Llama 3.1 8B, random weights (16 GB)
    python -m tests.benchmarks.checkpoints tiny             # the same in miniature, to check the path

Random weights are as fast as trained ones: a dense decoder computes the same whatever they are.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

from engine.config import DEFAULT_MODEL
from engine.models import fetch_default_model
from engine.paths import cache_dir

RANDOM_SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
    },
}
CHECKPOINTS = (DEFAULT_MODEL, *RANDOM_SHAPES)


def folder(name: str) -> Path:
    """Where a checkpoint lies once it is made."""
    return cache_dir() / "benchmarks" / name


def make(name: str) -> Path:
    """Make the folder unless it is there; it appears whole or not at all."""
    target = folder(name)
    if (target / "config.json").exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=target.parent, prefix=".part-"))
    try:
        model = _dequantized() if name == DEFAULT_MODEL else _random(RANDOM_SHAPES[name])
        model.save_pretrained(part)
        _tokenizer().save_pretrained(part)
        part.replace(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return target


def _dequantized() -> Any:
    """In float32, which holds the dequantized values exactly; who computes in bfloat16 rounds them on loading."""
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    gguf = fetch_default_model()
    return AutoModelForCausalLM.from_pretrained(
        str(gguf.parent),
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )


def _random(shape: dict[str, Any]) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**shape, tie_word_embeddings=False), dtype=torch.bfloat16)


def _tokenizer() -> Any:
    from transformers import AutoTokenizer

    gguf = fetch_default_model()
    return AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)


def main() -> None:
    """Make one and print where it is."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("name", choices=CHECKPOINTS)
    print(make(parser.parse_args().name))


if __name__ == "__main__":
    main()
