"""What a checkpoint on this machine really holds, read from headers alone: no weights are loaded.

A safetensors file begins with 8 bytes (the length N of the header, little-endian) and N bytes of JSON that name every
tensor with its dtype, shape and place. A GGUF file has the same in its own form.
"""

from __future__ import annotations

import dataclasses
import json
import struct
from collections import Counter
from pathlib import Path
from typing import Any

from engine.errors import ModelLoadError

#: Longest header that is believed: the format's own limit.
_LONGEST_HEADER = 100_000_000
_REMEDY = "Give a .safetensors file, a .gguf file, or a folder with one of them."


@dataclasses.dataclass(frozen=True, slots=True)
class CheckpointSizes:
    """Sums over a checkpoint's tensors.

    Attributes:
        path: file or folder.
        tensors: how many there are; elements: of all of them. A packed format stores several weights in one element.
        bytes: of all tensors.
        bytes_by_dtype: ``{dtype as the file names it: bytes}``, largest first.
    """

    path: str
    tensors: int
    elements: int
    bytes: int
    bytes_by_dtype: dict[str, int]


def checkpoint_sizes(path: str | Path) -> CheckpointSizes:
    """Sizes of a local checkpoint: a ``.safetensors`` file, a ``.gguf`` file, or a folder of them.

    A folder's safetensors files count together; if it has none, its only GGUF file counts.

    Raises:
        ModelLoadError: if there is none, or a header cannot be read.
    """
    place = Path(path).expanduser()
    files = _files(place)
    found = [entry for file in files for entry in _entries(file)]
    by_dtype: Counter[str] = Counter()
    for dtype, _, size in found:
        by_dtype[dtype] += size
    elements = sum(count for _, count, _ in found)
    total = sum(size for _, _, size in found)
    return CheckpointSizes(str(place), len(found), elements, total, dict(by_dtype.most_common()))


def _files(place: Path) -> list[Path]:
    if place.is_file() and place.suffix in (".safetensors", ".gguf"):
        return [place]
    if place.is_dir():
        safetensors = sorted(place.glob("*.safetensors"))
        gguf = sorted(place.glob("*.gguf"))
        if safetensors or len(gguf) == 1:
            return safetensors or gguf
    raise ModelLoadError(f"{place} is not a checkpoint.", field="model", remedy=_REMEDY)


def _entries(file: Path) -> list[tuple[str, int, int]]:
    """(dtype, elements, bytes) of every tensor."""
    return _gguf_entries(file) if file.suffix == ".gguf" else _safetensors_entries(file)


def _safetensors_entries(file: Path) -> list[tuple[str, int, int]]:
    header = _safetensors_header(file)
    entries = []
    try:
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            elements = 1
            for size in entry["shape"]:
                elements *= size
            start, end = entry["data_offsets"]
            entries.append((str(entry["dtype"]), elements, end - start))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _unreadable(file, f"its header is malformed ({error!r})") from None
    return entries


def _safetensors_header(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > _LONGEST_HEADER:
                raise ValueError(f"a header of {length:,} bytes")
            header = json.loads(stream.read(length))
    except (OSError, struct.error, ValueError) as error:
        raise _unreadable(file, str(error)) from None
    if not isinstance(header, dict):
        raise _unreadable(file, "its header is not a JSON object")
    return header


def _gguf_entries(file: Path) -> list[tuple[str, int, int]]:
    from gguf import GGUFReader

    try:
        tensors = GGUFReader(file).tensors
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise _unreadable(file, str(error)) from None
    return [(tensor.tensor_type.name, int(tensor.n_elements), int(tensor.n_bytes)) for tensor in tensors]


def _unreadable(file: Path, why: str) -> ModelLoadError:
    return ModelLoadError(f"{file} cannot be read: {why}.", field="model", remedy=_REMEDY)
