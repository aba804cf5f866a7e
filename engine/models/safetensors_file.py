"""Reading a ``.safetensors`` file: its header once and with distrust, tensors by rows when they are asked for.

Layout (https://huggingface.co/docs/safetensors):

    header length N u64, little-endian | N bytes of JSON: {name: {dtype, shape, data_offsets}} | data

Bytes are read, not mapped: what is read counts once, pages of the file never count as the process's memory, and a file
that is truncated while it is read gives an error, not a bus error.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
from pathlib import Path
from typing import Any, TypeGuard

import torch

from engine.errors import ModelLoadError

#: Longest header that is accepted: the format's own limit.
LONGEST_HEADER = 100_000_000
_MOST_DIMENSIONS = 8
_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_FLOATS = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})


@dataclasses.dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies and how it is stored.

    Attributes:
        dtype: as the file names it, e.g. ``"BF16"``.
        begin, end: bytes from the start of the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class SafetensorsFile:
    """A file's tensors by name, and :meth:`rows`.

    Raises:
        ModelLoadError: if it is missing, cut off, or its header is malformed or contradicts itself.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._parse()
        except OSError as error:
            raise self._broken(f"cannot be read ({error.strerror or error})") from None
        except (ValueError, RecursionError, MemoryError, OverflowError) as error:
            raise self._broken(f"cannot be read: its header is damaged ({_short(error)})") from None

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows ``start`` … ``stop`` - 1 of a tensor (all of a scalar), in its stored float dtype. A fresh copy.

        Raises:
            ModelLoadError: if it is not there, holds no floats, or the file has changed.
        """
        stored = self.tensors.get(name)
        if stored is None:
            raise self._broken(f"lacks the tensor {name!r}")
        if stored.dtype not in _FLOATS:
            raise self._broken(f"stores {name!r} as {stored.dtype}: only tensors of floats are read as weights")
        count = stored.shape[0] if stored.shape else 1
        stop = count if stop is None else stop
        row_bytes = (stored.end - stored.begin) // max(count, 1)
        tensor = torch.empty((stop - start, *stored.shape[1:]), dtype=_DTYPES[stored.dtype])
        if tensor.nbytes:
            self._fill(tensor, stored.begin + start * row_bytes)
        return tensor if stored.shape else tensor[0]

    def _fill(self, tensor: torch.Tensor, offset: int) -> None:
        buffer = memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]  # it has a buffer
        try:
            with self.path.open("rb", buffering=0) as stream:
                stream.seek(offset)
                while buffer:  # one call reads at most 2 GiB
                    count = stream.readinto(buffer)
                    if not count:
                        raise self._broken("has become shorter since it was opened")
                    buffer = buffer[count:]
        except OSError as error:
            raise self._broken(f"cannot be read ({error.strerror or error})") from None

    def _parse(self) -> None:
        if not self.path.is_file():  # a pipe or a device would be waited for
            raise self._broken("cannot be read: it is not a regular file")
        with self.path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(LONGEST_HEADER, size - 8):
                raise ValueError(f"{length:,} bytes of header in a file of {size:,} bytes")
            header = json.loads(stream.read(length))
        if not isinstance(header, dict):
            raise ValueError("it is not a JSON object")
        header.pop("__metadata__", None)
        self.tensors = {str(name): self._entry(name, entry, 8 + length, size) for name, entry in header.items()}
        self._refuse_overlaps()

    def _entry(self, name: str, entry: Any, data: int, size: int) -> StoredTensor:
        """One tensor, checked against its own numbers and the file's size."""
        shown = repr(name[:100])
        if not isinstance(entry, dict):
            raise ValueError(f"tensor {shown} is not an object")
        dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
        if not isinstance(dtype, str):
            raise ValueError(f"tensor {shown} has no dtype")
        if not _are_whole_numbers(shape) or len(shape) > _MOST_DIMENSIONS:
            raise ValueError(f"tensor {shown} has no valid shape")
        if not _are_whole_numbers(offsets) or len(offsets) != 2:
            raise ValueError(f"tensor {shown} has no valid data_offsets")
        begin, end = offsets
        if not begin <= end <= size - data:
            raise ValueError(
                f"tensor {shown} ends at byte {data + end:,} of a file of {size:,} bytes: it is cut off or damaged"
            )
        if dtype in _DTYPES and math.prod(shape) * _DTYPES[dtype].itemsize != end - begin:
            raise ValueError(f"tensor {shown} of shape {shape} in {dtype} does not take {end - begin:,} bytes")
        return StoredTensor(name, dtype, tuple(shape), data + begin, data + end)

    def _refuse_overlaps(self) -> None:
        ordered = sorted((tensor for tensor in self.tensors.values() if tensor.end > tensor.begin), key=_by_place)
        for before, after in itertools.pairwise(ordered):
            if after.begin < before.end:
                raise ValueError(f"tensors {before.name[:100]!r} and {after.name[:100]!r} overlap")

    def _broken(self, what: str) -> ModelLoadError:
        return ModelLoadError(
            f"{self.path} {what}.",
            field="model",
            remedy="The file is missing, cut off or damaged: copy or download it again.",
        )


def _by_place(tensor: StoredTensor) -> tuple[int, int]:
    return tensor.begin, tensor.end


def _are_whole_numbers(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**62 for n in value)


def _short(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
