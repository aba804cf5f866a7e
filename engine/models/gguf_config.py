"""What a GGUF file's metadata and tensor names are in the terms of a Hugging Face ``config.json``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from engine.errors import ModelLoadError
from engine.models.checkpoint import incomplete
from engine.models.config_fields import positive, shown
from engine.models.families import Family, unsupported

if TYPE_CHECKING:
    from engine.models.gguf_file import GGUFFile

_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def hf_name_of_gguf(name: str, family: Family) -> str | None:
    """``blk.3.attn_q.weight`` → ``model.layers.3.self_attn.q_proj.weight``; None if the decoder has no use for it."""
    if name in _TOP:
        return _TOP[name]
    parts = name.split(".")
    names = {**_LAYER, **family.gguf_names}
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in names:
        return f"model.layers.{parts[1]}.{names[parts[2]]}.{parts[3]}"
    return None


def config_of_gguf(file: GGUFFile, architecture: str, family: Family) -> dict[str, Any]:
    """The file's metadata under the field names of a ``config.json``."""
    metadata = file.metadata

    def value(key: str, default: Any = None) -> Any:
        return metadata.get(f"{architecture}.{key}", default)

    def size(key: str, default: int | None = None) -> int:
        return positive_metadata(file, f"{architecture}.{key}", default)

    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise incomplete(file.path, "lacks the tensor 'token_embd.weight'")
    if len(embedding.shape) != 2:
        raise incomplete(file.path, f"has a 'token_embd.weight' of shape {list(embedding.shape)}, which is no matrix")
    num_heads, hidden_size = size("attention.head_count"), size("embedding_length")
    if value("expert_count", 0):
        raise unsupported("general.architecture", architecture, "mixtures of experts are read from safetensors only")
    head_dim = size("attention.key_length", max(hidden_size // num_heads, 1))
    if size("attention.value_length", head_dim) != head_dim:
        raise incomplete(file.path, f"states another {architecture}.attention.value_length than key_length")
    config = {
        "architectures": [family.architectures[0]],
        "model_type": family.name,
        "_name_or_path": str(metadata.get("general.name", file.path.stem))[:200],
        "num_hidden_layers": size("block_count"),
        "hidden_size": hidden_size,
        "num_attention_heads": num_heads,
        "num_key_value_heads": size("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "intermediate_size": size("feed_forward_length"),
        "vocab_size": embedding.shape[0],
        "max_position_embeddings": size("context_length"),
        "rms_norm_eps": value("attention.layer_norm_rms_epsilon", 1e-6),
        "rope_theta": value("rope.freq_base", 10000.0),
        "sliding_window": value("attention.sliding_window"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in file.tensors,
        "partial_rotary_factor": size("rope.dimension_count", head_dim) / head_dim,
    }
    if value("rope.scaling.type", "none") != "none":
        config["rope_scaling"] = _rope_scaling(value)
    if family.attention_scalar is not None:
        # Not in the file: llama.cpp, too, knows the one size, of 62 layers, where it is not the head's.
        config[family.attention_scalar] = hidden_size // num_heads if config["num_hidden_layers"] == 62 else head_dim
    if family.local_rope:
        config["rope_local_base_freq"] = value("rope.freq_base_swa", 10000.0)
    return config


def _rope_scaling(value: Callable[..., Any]) -> dict[str, Any]:
    """The scaling of the rotary embedding, as a ``config.json`` states it."""
    kind = value("rope.scaling.type")
    scaling = {"rope_type": kind, "factor": value("rope.scaling.factor", 1.0)}
    original = value("rope.scaling.original_context_length")
    if original is not None:
        scaling["original_max_position_embeddings"] = original
    for name in ("beta_fast", "beta_slow") if kind == "yarn" else ():
        if (beta := value(f"rope.scaling.yarn_{name}")) is not None:
            scaling[name] = beta
    return scaling


ROPE_FACTORS = "rope_freqs.weight"


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_READ = _names(
    "attention.head_count attention.head_count_kv attention.key_length attention.value_length block_count "
    "embedding_length feed_forward_length context_length vocab_size attention.layer_norm_rms_epsilon rope.freq_base "
    "rope.freq_base_swa rope.dimension_count rope.scaling.type rope.scaling.factor "
    "rope.scaling.original_context_length rope.scaling.yarn_beta_fast rope.scaling.yarn_beta_slow "
    "attention.sliding_window attention.sliding_window_pattern expert_count"
)
#: Of the file's making; ``finetuned`` says how the scaling came about.
_HARMLESS = _names("rope.scaling.finetuned expert_used_count")


def gguf_warnings(file: GGUFFile, architecture: str) -> tuple[str, ...]:
    """A sentence for every property of the model that the file states and nothing reads."""
    properties = {key.removeprefix(f"{architecture}."): value for key, value in file.metadata.items()}
    ignored = [
        f"{architecture}.{key} = {shown(value)} is not followed: {architecture} is computed without it."
        for key, value in properties.items()
        if f"{architecture}.{key}" in file.metadata and key not in _READ and key not in _HARMLESS
    ]
    if file.metadata.get("tokenizer.ggml.model") == "gpt2" and "tokenizer.ggml.pre" not in file.metadata:
        ignored.append("tokenizer.ggml.pre is missing: text is split as llama.cpp's type 'default' does.")
    return tuple(ignored)


def read_rope_factors(file: GGUFFile, config: dict[str, Any]) -> torch.Tensor | None:
    """float32 [rotated dimensions / 2], all of them positive."""
    info = file.tensors.get(ROPE_FACTORS)
    if info is None:
        return None
    wanted = int(config["head_dim"] * config["partial_rotary_factor"]) // 2
    if info.shape != (wanted,):
        raise incomplete(file.path, f"has {ROPE_FACTORS!r} of shape {list(info.shape)} for {wanted} rotated pairs")
    factors = file.read(ROPE_FACTORS).float()
    if not bool((factors.isfinite() & (factors > 0)).all()):
        raise incomplete(file.path, f"has factors in {ROPE_FACTORS!r} that are not positive numbers")
    return factors


def positive_metadata(file: GGUFFile, key: str, default: int | None = None) -> int:
    """A positive whole number of the file's metadata."""
    try:
        return positive(file.metadata, key, default)
    except ModelLoadError as error:
        raise ModelLoadError(
            f"{file.path}: {error.message}", field=key, remedy="Check that the file is complete, or convert it again."
        ) from None
