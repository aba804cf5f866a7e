"""Helpers that tests of several rooms share."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from engine.capacity import CacheLayout, activation_bytes, compute_dtype, kv_bytes_per_block
from engine.capacity.text import GIB
from engine.config import EngineConfig
from engine.core import Engine
from engine.status import take_status

PATIENCE_S = 400.0


def wait_until_prepared(engine: Engine) -> Engine:
    """The engine, once the execution mode asked for is prepared (a second for shapes on disk, half a minute if not)."""
    end = time.monotonic() + PATIENCE_S
    while take_status(engine).execution["preparing"]:
        assert time.monotonic() < end, f"still preparing: {take_status(engine).execution}"
        time.sleep(0.05)
    return engine


def engine_with_blocks(model: Any, num_blocks: int, **knobs: Any) -> Engine:
    """An engine whose memory limit leaves room for exactly ``num_blocks`` KV blocks."""
    config = EngineConfig.from_mapping(knobs)
    dtype = compute_dtype(str(model.dtype))
    activations = activation_bytes(model.spec, config.max_num_batched_tokens, config.max_num_seqs, dtype)
    block = kv_bytes_per_block(model.spec, CacheLayout(dtype.as_kv, config.block_size))
    limit = model.weight_bytes() + activations + num_blocks * block + block // 2
    engine = Engine(model, config.with_changes({"memory_limit_gib": limit / GIB}))
    assert engine.envelope.num_blocks == num_blocks
    return engine


def transformers_greedy(reference: Any, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """What a transformers model generates for each prompt alone: up to ``count`` tokens, greedily."""
    outputs = []
    for prompt in prompts:
        generated = reference.generate(
            torch.tensor([list(prompt)]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
        )
        outputs.append(generated[0, len(prompt) :].tolist())
    return outputs
