"""A model as one GGUF file."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path

import torch

from engine.errors import ModelLoadError
from engine.models.checkpoint import Checkpoint, incomplete
from engine.models.checksums import remembered_sha256
from engine.models.families import Family, family_of_gguf
from engine.models.gguf_config import (
    ROPE_FACTORS,
    config_of_gguf,
    gguf_warnings,
    hf_name_of_gguf,
    positive_metadata,
    read_rope_factors,
)


class GGUFCheckpoint(Checkpoint):
    """One ``.gguf`` file, presented under Hugging Face names with the query and key rows in Hugging Face order."""

    source = "gguf"
    family: Family

    def __init__(self, path: Path) -> None:
        # Here, so that only who reads such a file needs the gguf package: GPU images of torch come without it.
        from engine.models.gguf_file import GGUFFile

        self.path = path
        self.file = GGUFFile(path)
        if positive_metadata(self.file, "split.count", 1) > 1:
            raise ModelLoadError(
                f"{path} is one part of a model that is split over several files.",
                field="model",
                remedy="Merge the parts into one file first, for example with llama-gguf-split --merge.",
            )
        architecture = str(self.file.metadata.get("general.architecture"))
        self.family = family_of_gguf(architecture)
        self.config = config_of_gguf(self.file, architecture, self.family)
        self._gguf_name = {
            hf_name: name for name in self.file.tensors if (hf_name := hf_name_of_gguf(name, self.family)) is not None
        }
        self._unmapped = self.file.tensors.keys() - set(self._gguf_name.values()) - {ROPE_FACTORS}
        self.warnings = gguf_warnings(self.file, architecture)
        self.rope_factors = read_rope_factors(self.file, self.config)
        super().__init__([path])

    def names(self) -> frozenset[str]:
        return frozenset(self._gguf_name)

    def unused(self, used: Collection[str]) -> set[str]:
        return super().unused(used) | self._unmapped

    def shape(self, name: str) -> tuple[int, ...]:
        return self.file.tensors[self._stored(name)].shape

    def tensor(self, name: str) -> torch.Tensor:
        shape = self.shape(name)
        return self.rows(name, 0, shape[0]) if shape else self.file.read(self._stored(name))

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        stored = self._stored(name)
        rows = self._rows_of_a_head(name)
        if rows is None:
            return self.file.read(stored, start, stop)
        first = start // rows * rows
        heads = self.file.read(stored, first, -(-stop // rows) * rows)
        return _unpermute(heads, heads.shape[0] // rows)[start - first : stop - first]

    def _stored(self, name: str) -> str:
        if name not in self._gguf_name:
            raise incomplete(self.path, f"lacks the tensor {name!r}")
        return self._gguf_name[name]

    def _rows_of_a_head(self, name: str) -> int | None:
        """Of a projection whose rows lie in GGUF's order, else None."""
        field = "num_attention_heads" if ".q_proj." in name else "num_key_value_heads"
        if not self.family.gguf_permuted or not (".q_proj." in name or ".k_proj." in name):
            return None
        heads, rows = self.config[field], self.shape(name)[0]
        if not isinstance(heads, int) or heads < 1 or rows % (2 * heads):
            raise incomplete(self.path, f"has {rows} rows in {name!r}, which {heads} heads of even size do not divide")
        return rows // heads

    @functools.cached_property
    def stored_elements(self) -> Mapping[str, int]:
        counts: Counter[str] = Counter()
        for info in self.file.tensors.values():
            counts[info.kind.name] += math.prod(info.shape)
        return counts

    def fingerprint(self) -> str:
        return remembered_sha256(self.path)


def _unpermute(tensor: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Undo the row order of GGUF's Llama conversion: pairs (2i, 2i+1) of each head go back to halves (i, i + D/2)."""
    half = tensor.shape[0] // num_heads // 2
    return tensor.view(num_heads, half, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
