"""Small random models of every supported shape, and attention without a cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.models.decoder import Attend, Decoder
from tests.family_cases import save_random_model

SaveModel = Callable[..., Path]


@pytest.fixture
def save_model(tmp_path: Path, tiny_llama: Path) -> SaveModel:
    """(transformers config, **save_pretrained arguments) → folder with a random model and the tiny tokenizer."""

    def save(config: Any, **arguments: Any) -> Path:
        return save_random_model(config, tmp_path / "model", tiny_llama, **arguments)

    return save


def dense_attention(decoder: Decoder, lengths: list[int]) -> Attend:
    """Causal attention over whole sequences laid end to end, with each layer's window."""

    def attend(layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        group = query.shape[1] // key.shape[1]
        outputs = []
        start = 0
        for length in lengths:
            rows = slice(start, start + length)
            start += length
            q, k, v = query[rows], key[rows].repeat_interleave(group, 1), value[rows].repeat_interleave(group, 1)
            scores = torch.einsum("qhd,khd->hqk", q.float(), k.float()) * decoder.attention_scale(layer)
            distance = torch.arange(length).unsqueeze(1) - torch.arange(length)
            window = decoder.layer_windows[layer]
            visible = (distance >= 0) & (distance < (window or length))
            weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
            outputs.append(torch.einsum("hqk,khd->qhd", weights, v.float()).to(query.dtype))
        return torch.cat(outputs)

    return attend


def dense_logits(decoder: Decoder, sequences: list[list[int]]) -> torch.Tensor:
    """Logits of every position of every sequence, one ragged batch: [T, vocab]."""
    lengths = [len(sequence) for sequence in sequences]
    token_ids = torch.tensor([token for sequence in sequences for token in sequence])
    positions = torch.cat([torch.arange(length) for length in lengths])
    with torch.inference_mode():
        return decoder.logits(decoder(token_ids, positions, dense_attention(decoder, lengths)))


@pytest.fixture
def logits_of() -> Callable[[Decoder, list[list[int]]], torch.Tensor]:
    """:func:`dense_logits`, for tests of other files."""
    return dense_logits
