"""Tiny random models of every family, every RoPE scaling and some families that only the fallback runs.

Small enough to run thousands of tokens a second; head counts are odd where the family allows it, windows are shorter
than the tests' prompts, and weights are wide enough that no near tie turns on a rounding.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OlmoeConfig,
    OPTConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    Starcoder2Config,
)

VOCABULARY = 257
CONTEXT = 256
BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 96,  # and 160: whole panels of the native kernels on every machine
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 256,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
GEMMA = {
    **BASE,
    "num_hidden_layers": 4,
    "head_dim": 32,
    "sliding_window": 12,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
    "query_pre_attn_scalar": 20,
}
MOE = {**BASE, "head_dim": 16, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 40}


def rope(kind: str, theta: float = 10000.0, **fields: Any) -> dict[str, Any]:
    """Fields of ``rope_parameters``."""
    return {"rope_type": kind, "rope_theta": theta, **fields}


LONGROPE = rope(
    "longrope",
    short_factor=[1.0, 1.1, 1.3, 1.9, 2.5, 3.0, 3.0, 3.1, 3.1, 3.2, 3.5, 4.0],
    long_factor=[1.0, 2.0, 4.0, 8.0, 16.0, 32.0] * 2,
    original_max_position_embeddings=CONTEXT,
    partial_rotary_factor=0.75,
)

FAMILIES: dict[str, Any] = {
    "llama": LlamaConfig(**BASE),
    "mistral, window": MistralConfig(**BASE, sliding_window=16),
    "qwen2": Qwen2Config(**BASE),
    "qwen2, tied, upper layers slide": Qwen2Config(
        **{**BASE, "tie_word_embeddings": True}, use_sliding_window=True, sliding_window=16, max_window_layers=1
    ),
    "qwen3": Qwen3Config(**BASE, head_dim=32),
    "qwen3, tied, biases": Qwen3Config(**{**BASE, "tie_word_embeddings": True}, head_dim=16, attention_bias=True),
    "qwen3, window": Qwen3Config(**BASE, head_dim=16, use_sliding_window=True, sliding_window=16, max_window_layers=2),
    "gemma3": Gemma3TextConfig(**{**GEMMA, "tie_word_embeddings": True}),
    "gemma3, untied, soft cap, scaled": Gemma3TextConfig(
        **GEMMA,
        final_logit_softcapping=5.0,
        rope_parameters={
            "full_attention": rope("linear", 1e6, factor=8.0),
            "sliding_attention": rope("default", 1e4),
        },
    ),
    "phi3": Phi3Config(**{**BASE, "num_key_value_heads": 3}, sliding_window=20),
    "phi3, part of a head rotated": Phi3Config(**BASE, rope_parameters=rope("default", partial_rotary_factor=0.75)),
    "phi3, longrope": Phi3Config(
        **{**BASE, "max_position_embeddings": 8 * CONTEXT},
        original_max_position_embeddings=CONTEXT,
        rope_parameters=LONGROPE,
    ),
    "mixtral": MixtralConfig(**BASE, num_local_experts=4, num_experts_per_tok=2),
    "mixtral, window, one expert a token": MixtralConfig(
        **BASE, num_local_experts=3, num_experts_per_tok=1, sliding_window=16
    ),
    "qwen3 moe": Qwen3MoeConfig(**MOE, norm_topk_prob=True),
    "qwen3 moe, some layers dense, weights as they come": Qwen3MoeConfig(
        **{**MOE, "num_hidden_layers": 4, "tie_word_embeddings": True},
        norm_topk_prob=False,
        decoder_sparse_step=2,
        mlp_only_layers=[3],
    ),
}

SCALINGS: dict[str, Any] = {
    "linear": LlamaConfig(**BASE, rope_parameters=rope("linear", factor=4.0)),
    "dynamic": LlamaConfig(**BASE, rope_parameters=rope("dynamic", factor=4.0)),
    "llama3": LlamaConfig(
        **BASE,
        rope_parameters=rope(
            "llama3",
            500000.0,
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
    ),
    "yarn": Qwen3Config(
        **BASE, head_dim=32, rope_parameters=rope("yarn", 1e6, factor=4.0, original_max_position_embeddings=64)
    ),
    "yarn, all fields": LlamaConfig(
        **BASE,
        rope_parameters=rope(
            "yarn",
            factor=8.0,
            original_max_position_embeddings=32,
            attention_factor=1.3,
            beta_fast=16.0,
            beta_slow=2.0,
            truncate=False,
        ),
    ),
    "yarn, mscale": LlamaConfig(
        **BASE,
        rope_parameters=rope("yarn", factor=8.0, original_max_position_embeddings=32, mscale=0.7, mscale_all_dim=1.1),
    ),
}

FALLBACKS: dict[str, Any] = {
    "gpt_neox": GPTNeoXConfig(
        **{key: value for key, value in BASE.items() if key != "num_key_value_heads"},
        rope_parameters=rope("default", partial_rotary_factor=0.5),
    ),
    "cohere": CohereConfig(**{**BASE, "tie_word_embeddings": True}, logit_scale=0.25),
    "starcoder2, window": Starcoder2Config(**BASE, sliding_window=16),
    "gpt2": GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=48,
        n_layer=3,
        n_head=3,
        n_positions=CONTEXT,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=256,
    ),
    "opt": OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        word_embed_proj_dim=48,
        ffn_dim=80,
        num_hidden_layers=3,
        num_attention_heads=3,
        max_position_embeddings=CONTEXT,
        init_std=0.2,
        bos_token_id=None,
        pad_token_id=None,
        eos_token_id=256,
    ),
    "olmoe": OlmoeConfig(**BASE, num_experts=4, num_experts_per_tok=2),
}


def save_random_model(config: Any, folder: Path, tokenizer_from: Path, **arguments: Any) -> Path:
    """A random model of that transformers configuration, saved with the tokenizer of another folder.

    Args:
        arguments: passed on to ``save_pretrained``.
    """
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "norm.weight")):  # initialised to constants, which would hide mistakes
            torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.3)
    model.save_pretrained(folder, **arguments)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer_from / name, folder / name)
    return folder


def random_prompt(length: int, seed: int = 0) -> list[int]:
    """``length`` tokens, none of which ends a generation."""
    return torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
