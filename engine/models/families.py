"""The model families that the engine runs: one row each.

A family says which configurations belong to it, how its layers are named in a checkpoint and what its configuration
means where it is silent. A new family of the same block structure is one new row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from engine.errors import ModelLoadError


@dataclasses.dataclass(frozen=True, slots=True)
class Family:
    """One row.

    Attributes:
        name: as recorded, e.g. ``"llama"``.
        architectures: entries of ``architectures`` in a ``config.json`` that belong to it.
        gguf_architectures: values of ``general.architecture`` in a GGUF file that belong to it.
        gguf_permuted: True if the GGUF conversion interleaved the rows of the query and key projections.
        slides: True if ``sliding_window`` and ``layer_types`` of the configuration apply.
        default_window: sliding window of a configuration that does not mention one, in tokens.
        biases: True if ``attention_bias`` and ``mlp_bias`` of the configuration apply.
    """

    name: str
    architectures: tuple[str, ...]
    gguf_architectures: tuple[str, ...]
    gguf_permuted: bool
    slides: bool
    default_window: int | None
    biases: bool


FAMILIES: tuple[Family, ...] = (
    Family(
        name="llama",
        architectures=("LlamaForCausalLM",),
        gguf_architectures=("llama",),
        gguf_permuted=True,
        slides=False,
        default_window=None,
        biases=True,
    ),
    Family(
        name="mistral",
        architectures=("MistralForCausalLM",),
        gguf_architectures=("mistral",),
        gguf_permuted=True,
        slides=True,
        default_window=4096,  # what transformers assumes where a config.json does not say
        biases=False,
    ),
)


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a parsed ``config.json``, by ``architectures``, else by ``model_type``.

    Raises:
        ModelLoadError: naming the architecture and what is supported.
    """
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list):
        raise _unsupported("architectures", str(architectures))
    model_type = config.get("model_type")
    for family in FAMILIES:
        if any(name in family.architectures for name in architectures) or (
            not architectures and model_type == family.name
        ):
            return family
    raise _unsupported("architectures", ", ".join(map(str, architectures)) or str(model_type))


def family_of_gguf(architecture: str) -> Family:
    """The family of a GGUF file's ``general.architecture``.

    Raises:
        ModelLoadError: naming the architecture and what is supported.
    """
    for family in FAMILIES:
        if architecture in family.gguf_architectures:
            return family
    raise _unsupported("general.architecture", architecture)


def _unsupported(field: str, architecture: str) -> ModelLoadError:
    supported = ", ".join(name for family in FAMILIES for name in family.architectures)
    return ModelLoadError(
        f"architecture {architecture!r} is not supported.",
        field=field,
        remedy=f"Supported are {supported} (SmolLM2, Llama 2 and 3, Mistral and models of the same structure).",
    )
