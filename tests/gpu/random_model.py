"""A model of given shapes with random weights, made on the device: nothing is read, nothing is written to disk.

A dense decoder computes the same whatever its weights are, so random ones are as fast as trained ones.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from engine.capacity import ModelSpec
from engine.models.checkpoint import Checkpoint
from engine.models.decoder import Decoder
from engine.models.decoder_config import read_decoder_config
from engine.models.families import family_of
from engine.models.loader import LoadedModel
from engine.models.weight_reader import WeightSource

LLAMA_3_1_8B: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
TINY: dict[str, Any] = {
    **LLAMA_3_1_8B,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 257,
    "max_position_embeddings": 512,
}
STANDARD_DEVIATION = 0.02


class RandomCheckpoint(Checkpoint):
    """Gives the same random tensor for the same name, on a device, every time it is asked.

    Args:
        config: fields of a ``config.json`` of the Llama kind.
        device: where the tensors are made.
        dtype: of the tensors.
    """

    source = "random"

    def __init__(self, config: dict[str, Any], device: torch.device, dtype: torch.dtype) -> None:
        self.path = Path("random")
        self.config = config
        self.family = family_of(config)
        self._device, self._dtype = device, dtype
        self._shapes = _shapes(config)
        super().__init__([])

    def names(self) -> frozenset[str]:
        """As :meth:`Checkpoint.names`."""
        return frozenset(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """As :meth:`Checkpoint.shape`."""
        return self._shapes[name]

    def tensor(self, name: str) -> torch.Tensor:
        """As :meth:`Checkpoint.tensor`, but on the device."""
        shape = self._shapes[name]
        if len(shape) == 1:
            return torch.ones(shape, dtype=self._dtype, device=self._device)
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4])
        generator = torch.Generator(self._device).manual_seed(seed)
        values = torch.empty(shape, dtype=self._dtype, device=self._device)
        return values.normal_(0.0, STANDARD_DEVIATION, generator=generator)

    def fingerprint(self) -> str:
        """As :meth:`Checkpoint.fingerprint`."""
        return hashlib.sha256(json.dumps(self.config, sort_keys=True).encode()).hexdigest()


def _shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, width, vocab = (config[name] for name in ("hidden_size", "intermediate_size", "vocab_size"))
    heads, kv_heads = (config[name] * config["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "self_attn.q_proj": (heads, hidden),
        "self_attn.k_proj": (kv_heads, hidden),
        "self_attn.v_proj": (kv_heads, hidden),
        "self_attn.o_proj": (hidden, heads),
        "mlp.gate_proj": (width, hidden),
        "mlp.up_proj": (width, hidden),
        "mlp.down_proj": (hidden, width),
    }
    shapes = {"model.embed_tokens": (vocab, hidden), "model.norm": (hidden,), "lm_head": (vocab, hidden)}
    for index in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    return {f"{name}.weight": shape for name, shape in shapes.items()}


def make(config: dict[str, Any], device: torch.device, dtype: torch.dtype, tokenizer: Any) -> LoadedModel:
    """The model, as :func:`engine.models.load_model` would give it.

    Args:
        config: :data:`LLAMA_3_1_8B` or :data:`TINY`.
        tokenizer: any; only its vocabulary is looked at.
    """
    checkpoint = RandomCheckpoint(config, device, dtype)
    assert checkpoint.family is not None
    decoder_config = read_decoder_config(config, checkpoint.family)
    return LoadedModel(
        name="random llama",
        spec=ModelSpec.from_hf_config(config),
        decoder=Decoder(decoder_config, WeightSource(checkpoint, device, dtype)),
        tokenizer=tokenizer,
        eos_token_ids=(),
        max_position=decoder_config.max_position,
        device=device,
        dtype=dtype,
        fingerprint=checkpoint.fingerprint(),
        source=checkpoint.source,
        family="llama",
        checkpoint=checkpoint,
    )


def tokenizer_of(vocab_size: int) -> Any:
    """A tokenizer of ``vocab_size`` words, "t0 " onwards."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({f"t{index}": index for index in range(vocab_size)}, unk_token="t0"))
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="t0")
