"""Reading a ``.gguf`` file: header in one pass, tensors dequantized on demand.

``gguf.GGUFReader`` builds a numpy view for each of the hundred thousand strings of a vocabulary, which takes seconds;
here arrays of strings are walked with ``struct`` and only decoded when asked for. Types, block sizes and the
dequantization itself come from the ``gguf`` package.

Layout (GGUF v2 and v3, little-endian; specification: ggml/docs/gguf.md):

    magic "GGUF" | version u32 | tensor count u64 | pair count u64 | key-value pairs | tensor infos | padding | data
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import mmap
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType
from gguf.quants import dequantize

from engine.errors import ModelLoadError

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_SUPPORTED_VERSIONS = (2, 3)
_MAX_DIMENSIONS = 4
_MOST_TRAILING = 1 << 20
_MOST_PAIRS = 1 << 16
_MOST_TENSORS = 1 << 20
_LONGEST_ARRAY = 1 << 24  # a vocabulary's scores are a hundredth of it
_PLAIN_DTYPES = {
    GGMLQuantizationType.F32: np.float32,
    GGMLQuantizationType.F16: np.float16,
    GGMLQuantizationType.F64: np.float64,
}


@dataclasses.dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies and how it is stored.

    Attributes:
        shape: as torch has it, rows first (GGUF stores the reverse).
        kind: storage type, e.g. Q4_1.
        offset: bytes from the start of the file.
        num_bytes: stored size.
    """

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int
    num_bytes: int


class GGUFFile:
    """An open GGUF file: ``metadata`` (arrays of strings excluded), ``tensors``, and :meth:`read`.

    Raises:
        ModelLoadError: if the file is missing, not GGUF, of an unknown version, or shorter than its header promises.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        if path.exists() and not path.is_file():  # a pipe or a device would be waited for
            raise self._broken("is not a regular file")
        try:
            with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as self._map:
                self._parse()
        except OSError as error:
            raise self._broken(f"cannot be read ({error})") from None
        except (ValueError, struct.error, MemoryError, OverflowError):  # mmap of an empty file is a ValueError
            raise self._broken("ends inside its header, or the header is damaged") from None

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """The tensor's rows ``start`` … ``stop`` - 1: float32 if it is stored quantized, else its stored float dtype. A
        fresh copy.

        Raises:
            ModelLoadError: if there is no such tensor or its storage type is unknown to the ``gguf`` package.
        """
        info = self.tensors.get(name)
        if info is None:
            raise self._broken(f"lacks the tensor {name!r}")
        count = info.shape[0] if info.shape else 1
        stop = count if stop is None else stop
        row_bytes = info.num_bytes // max(count, 1)
        raw = self._raw(info.offset + start * row_bytes, (stop - start) * row_bytes)
        shape = (stop - start, *info.shape[1:]) if info.shape else ()
        if info.kind in _PLAIN_DTYPES:
            return torch.from_numpy(raw.view(_PLAIN_DTYPES[info.kind]).reshape(shape))
        if info.kind == GGMLQuantizationType.BF16:
            return torch.from_numpy(raw).view(torch.bfloat16).reshape(shape)
        try:
            values = dequantize(raw.reshape(*shape[:-1], -1), info.kind)
        except (NotImplementedError, ValueError, IndexError):
            raise self._broken(f"stores {name!r} as {info.kind.name}, which cannot be dequantized here") from None
        return torch.from_numpy(np.ascontiguousarray(values.reshape(shape)))

    def _raw(self, offset: int, num_bytes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Read, not mapped: a file that is truncated while it is read must give an error, not a bus error."""
        try:
            raw = np.fromfile(self.path, dtype=np.uint8, count=num_bytes, offset=offset)
        except OSError as error:
            raise self._broken(f"cannot be read ({error.strerror or error})") from None
        if raw.size != num_bytes:
            raise self._broken("has become shorter since it was opened")
        return raw

    def _broken(self, what: str) -> ModelLoadError:
        return ModelLoadError(
            f"{self.path} {what}.",
            field="model",
            remedy="Check that it is a complete GGUF file; copy or download it again.",
        )

    def _parse(self) -> None:
        if self._map[:4] != b"GGUF":
            raise self._broken("is not a GGUF file")
        version, num_tensors, num_pairs = struct.unpack_from("<IQQ", self._map, 4)
        if version not in _SUPPORTED_VERSIONS:
            raise self._broken(f"has GGUF version {version}; supported are 2 and 3 (little-endian)")
        if num_pairs > _MOST_PAIRS or num_tensors > _MOST_TENSORS:
            raise self._broken(
                f"claims {num_pairs:,} metadata pairs and {num_tensors:,} tensors: its header is damaged"
            )
        position = 4 + struct.calcsize("<IQQ")
        for _ in range(num_pairs):
            key, position = self._string(position)
            if key in self.metadata:
                raise self._broken(f"has the metadata key {key[:100]!r} twice")
            self.metadata[key], position = self._value(position)
        infos: dict[str, TensorInfo] = {}
        for _ in range(num_tensors):
            info, position = self._tensor_info(position)
            if info.name in infos:
                raise self._broken(f"has the tensor {info.name[:100]!r} twice")
            infos[info.name] = info
        alignment = self.metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
            raise self._broken(f"has an invalid general.alignment of {str(alignment)[:80]}")
        data_start = position + (-position) % alignment
        for info in infos.values():
            self._add(dataclasses.replace(info, offset=info.offset + data_start))
        self._check_places()

    def _add(self, info: TensorInfo) -> None:
        end = info.offset + info.num_bytes
        if end > len(self._map):
            raise self._broken(
                f"is cut off: tensor {info.name[:100]!r} ends at byte {end:,} but the file has {len(self._map):,} bytes"
            )
        self.tensors[info.name] = info

    def _check_places(self) -> None:
        ordered = sorted(self.tensors.values(), key=lambda info: (info.offset, info.num_bytes))
        end = max((info.offset + info.num_bytes for info in ordered), default=0)
        if ordered and len(self._map) - end > _MOST_TRAILING:
            raise self._broken(f"has {len(self._map) - end:,} bytes behind its last tensor: it is damaged")
        for before, after in itertools.pairwise(ordered):
            if after.offset < before.offset + before.num_bytes:
                raise self._broken(f"lets the tensors {before.name[:100]!r} and {after.name[:100]!r} overlap")

    def _string(self, position: int) -> tuple[str, int]:
        (length,) = struct.unpack_from("<Q", self._map, position)
        start = position + 8
        if start + length > len(self._map):
            raise struct.error
        return self._map[start : start + length].decode("utf-8"), start + length

    def _value(self, position: int) -> tuple[Any, int]:
        (kind,) = struct.unpack_from("<I", self._map, position)
        position += 4
        if kind == _STRING:
            return self._string(position)
        if kind == _ARRAY:
            return self._array(position)
        return self._scalar(kind, position)

    def _scalar(self, kind: int, position: int) -> tuple[Any, int]:
        if kind not in _SCALARS:
            raise self._broken(f"has a metadata value of unknown type {kind}")
        return struct.unpack_from(_SCALARS[kind], self._map, position)[0], position + struct.calcsize(_SCALARS[kind])

    def _array(self, position: int) -> tuple[Any, int]:
        """Numbers become a list, strings only their count: the tokenizer reads them by its own way."""
        kind, length = struct.unpack_from("<IQ", self._map, position)
        position += 12
        if length > _LONGEST_ARRAY:
            raise self._broken(f"has a metadata array of {length:,} entries: its header is damaged")
        if kind == _STRING:
            unpack, view = struct.Struct("<Q").unpack_from, self._map
            for _ in range(length):
                position += 8 + unpack(view, position)[0]
            if position > len(self._map):
                raise struct.error
            return length, position
        if kind not in _SCALARS:
            raise self._broken(f"has a metadata array of unsupported type {kind}")
        layout = f"<{length}{_SCALARS[kind][1]}"
        return list(struct.unpack_from(layout, self._map, position)), position + struct.calcsize(layout)

    def _tensor_info(self, position: int) -> tuple[TensorInfo, int]:
        name, position = self._string(position)
        (num_dimensions,) = struct.unpack_from("<I", self._map, position)
        if num_dimensions > _MAX_DIMENSIONS:
            raise self._broken(f"gives tensor {name[:100]!r} {num_dimensions} dimensions")
        layout = f"<{num_dimensions}QIQ"
        *sizes, raw_kind, offset = struct.unpack_from(layout, self._map, position + 4)
        try:
            kind = GGMLQuantizationType(raw_kind)
            block_size, block_bytes = GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError):
            raise self._broken(
                f"stores {name[:100]!r} as type {raw_kind}, unknown to the installed gguf package"
            ) from None
        num_elements = math.prod(sizes)
        if sizes and sizes[0] % block_size:
            raise self._broken(
                f"gives tensor {name!r} a row of {sizes[0]}, not a multiple of {kind.name}'s {block_size}"
            )
        num_bytes = num_elements // block_size * block_bytes
        info = TensorInfo(name, tuple(reversed(sizes)), kind, offset, num_bytes)
        return info, position + 4 + struct.calcsize(layout)
