"""A model as a folder of safetensors."""

from __future__ import annotations

import functools
import hashlib
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from engine.errors import ModelLoadError
from engine.models.checkpoint import Checkpoint, incomplete, read_json
from engine.models.checksums import remembered
from engine.models.families import family_of
from engine.models.safetensors_file import SafetensorsFile

_FULL_HASH_LIMIT_BYTES = 1 << 30
_SAMPLE_BYTES = 1 << 20
_NUM_SAMPLES = 64
_INDEX = "model.safetensors.index.json"


class SafetensorsCheckpoint(Checkpoint):
    """A folder with ``config.json`` and one or more ``*.safetensors`` (with an index, if there is one)."""

    source = "safetensors"

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self.config = read_json(folder / "config.json", "config.json")
        self.family = family_of(self.config)
        self._file_of = self._locate()
        super().__init__(sorted({file.path for file in self._file_of.values()}))
        untied = self.family is not None and not self.family.complete(self.config).get("tie_word_embeddings", False)
        if untied and "lm_head.weight" not in self._file_of:
            raise incomplete(folder, "lacks lm_head.weight although its config.json does not tie the head")

    def names(self) -> frozenset[str]:
        return frozenset(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._file(name).tensors[name].shape

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self._file(name).rows(name, start, stop)

    def tensor(self, name: str) -> torch.Tensor:
        tensor = self._file(name).rows(name)
        if self.family is not None and self.family.norm_offset and name.endswith("norm.weight"):
            return tensor.float() + self.family.norm_offset  # in float32: 1 + w has more digits than w
        return tensor

    @functools.cached_property
    def stored_elements(self) -> Mapping[str, int]:
        counts: Counter[str] = Counter()
        for file in dict.fromkeys(self._file_of.values()):
            for _, tensor in sorted(file.tensors.items()):
                counts[tensor.dtype] += math.prod(tensor.shape)
        return counts

    def _file(self, name: str) -> SafetensorsFile:
        if name not in self._file_of:
            raise incomplete(self.path, f"lacks the tensor {name!r}")
        return self._file_of[name]

    def fingerprint(self) -> str:
        return remembered("safetensors-v1", [self.path / "config.json", *self._files], self._hash)

    def _hash(self) -> str:
        """Over the configuration and, per file, its name, size and content; of a file above 1 GiB its header and
        64 samples of 1 MiB stand for the content."""
        digest = hashlib.sha256((self.path / "config.json").read_bytes())
        for path in self._files:
            size = path.stat().st_size
            digest.update(f"{path.name}:{size}\n".encode())
            with path.open("rb") as stream:
                if size <= _FULL_HASH_LIMIT_BYTES:
                    digest.update(hashlib.file_digest(stream, "sha256").digest())
                    continue
                header_bytes = 8 + int.from_bytes(stream.read(8), "little")
                stream.seek(0)
                digest.update(stream.read(header_bytes))
                for index in range(_NUM_SAMPLES):
                    stream.seek(header_bytes + (size - header_bytes - _SAMPLE_BYTES) * index // (_NUM_SAMPLES - 1))
                    digest.update(stream.read(_SAMPLE_BYTES))
        return digest.hexdigest()

    def _locate(self) -> dict[str, SafetensorsFile]:
        """Tensor name → its file, from the index where there is one, else from the files' own headers."""
        index = self.path / _INDEX
        if index.exists():
            return self._follow(read_json(index, _INDEX).get("weight_map"))
        files = sorted(self.path.glob("*.safetensors"))
        if not files:
            raise incomplete(self.path, "contains no *.safetensors files")
        return {name: file for file in map(SafetensorsFile, files) for name in file.tensors}

    def _follow(self, weight_map: Any) -> dict[str, SafetensorsFile]:
        """The index's own table, each entry found in the file that it names."""
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise incomplete(self.path, f"has an {_INDEX} without a weight_map of tensor and file names")
        files = {name: SafetensorsFile(self._shard(name)) for name in sorted(set(weight_map.values()))}
        for tensor, name in weight_map.items():
            if tensor not in files[name].tensors:
                raise incomplete(
                    self.path, f"has an {_INDEX} that looks for {tensor[:200]!r} in {name}, which lacks it"
                )
        return {tensor: files[name] for tensor, name in weight_map.items()}

    def _shard(self, name: str) -> Path:
        """The place of a file that the index names; it names none outside the folder."""
        parts = PurePosixPath(name.replace("\\", "/"))
        if not parts.parts or parts.is_absolute() or ".." in parts.parts or "\0" in name or ":" in parts.parts[0]:
            raise ModelLoadError(
                f"{self.path / _INDEX} names {name[:200]!r}, which is not in its folder.",
                field=_INDEX,
                remedy="Let it name files of its own folder, or download the model again.",
            )
        path = self.path / name
        try:
            if path.is_file():
                return path
        except OSError:  # a name that no file system takes
            pass
        raise incomplete(self.path, f"lacks {name[:200]}, which {_INDEX} names")
