"""GPUs: the bundled catalog, and machines described by the caller.

A nameplate's GB is 10^9 bytes for some vendors and 2^30 for others, and the driver keeps a share. What counts is what a
process can allocate: ``usable_gib``, in GiB (2^30), with its source.
"""

from __future__ import annotations

import csv
import dataclasses
import difflib
import functools
import importlib.resources

from engine.capacity.text import GIB, shown
from engine.errors import ConfigError

MAX_MEMORY_GIB = 100_000.0
#: Shares of the dense peak and of the memory bandwidth that large matrix products and long reads reach, where nothing
#: was measured. On an H200 they were 0.79 and 0.90.
USUAL_FLOPS_EFFICIENCY = 0.75
USUAL_BANDWIDTH_EFFICIENCY = 0.85


@dataclasses.dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU (or another device with memory of its own).

    Attributes:
        name: as in the catalog, e.g. ``"H100 SXM 80GB"``.
        usable_gib: what a process sees as the device's total memory, GiB.
        usable_source: where that number comes from.
        memory_gb: nameplate; None if unknown.
        bandwidth_gb_s: of the memory, 10^9 bytes a second; None if unknown.
        bf16_tflops, fp8_tflops: dense (not sparse) peak, 10^12 FLOP a second; None if unknown or not supported.
        int8_tops: the same of INT8 products, 10^12 operations a second.
        tdp_w: thermal design power in W; None if unknown.
        link_gb_s: to the other GPUs of a machine, one way, 10^9 bytes a second; None if unknown.
        hop_us: latency of one message over that link, µs.
        price_usd_hour: a round figure to begin with, to be replaced by what you pay; None if unknown.
        flops_efficiency, bandwidth_efficiency: share of the peaks that large operations reach; ``measured`` tells
            whether they were measured on this GPU or are the usual shares.
        note: what else an operator should know.
    """

    name: str
    usable_gib: float
    usable_source: str
    memory_gb: float | None = None
    bandwidth_gb_s: float | None = None
    bf16_tflops: float | None = None
    fp8_tflops: float | None = None
    int8_tops: float | None = None
    tdp_w: float | None = None
    link_gb_s: float | None = None
    hop_us: float = 5.0
    price_usd_hour: float | None = None
    flops_efficiency: float = USUAL_FLOPS_EFFICIENCY
    bandwidth_efficiency: float = USUAL_BANDWIDTH_EFFICIENCY
    measured: bool = False
    note: str = ""

    @property
    def usable_bytes(self) -> int:
        """Usable memory in bytes."""
        return int(self.usable_gib * GIB)


@functools.cache
def gpus() -> tuple[Gpu, ...]:
    """The catalog, in the order of its file."""
    text = (importlib.resources.files("engine.capacity") / "data" / "gpus.csv").read_text(encoding="utf-8")
    return tuple(_gpu(row) for row in csv.DictReader(text.splitlines()))


def _gpu(row: dict[str, str]) -> Gpu:
    return Gpu(
        name=row["name"],
        usable_gib=float(row["usable_gib"]),
        usable_source=row["usable_source"],
        memory_gb=_number(row["memory_gb"]),
        bandwidth_gb_s=_number(row["bandwidth_gb_s"]),
        bf16_tflops=_number(row["bf16_tflops_dense"]),
        fp8_tflops=_number(row["fp8_tflops_dense"]),
        int8_tops=_number(row["int8_tops_dense"]),
        tdp_w=_number(row["tdp_w"]),
        link_gb_s=_number(row["link_gb_s"]),
        hop_us=float(row["hop_us"]),
        price_usd_hour=_number(row["price_usd_hour"]),
        flops_efficiency=_number(row["flops_efficiency"]) or USUAL_FLOPS_EFFICIENCY,
        bandwidth_efficiency=_number(row["bandwidth_efficiency"]) or USUAL_BANDWIDTH_EFFICIENCY,
        measured=bool(row["flops_efficiency"]),
        note=row["note"],
    )


def _number(text: str) -> float | None:
    return float(text) if text else None


def find_gpu(name: str) -> Gpu:
    """The catalog GPU of that name; case and spacing do not matter, and a unique beginning is enough.

    >>> find_gpu("h100 sxm").usable_gib  # as vLLM sees it
    79.19

    Raises:
        ConfigError: if there is none, or several; the message lists them.
    """
    key = _key(name)
    found = _matches(key)
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(gpu.name for gpu in found)
        raise ConfigError(f"{name[:60]!r} could be several GPUs.", field="gpu", remedy=f"Choose one of: {names}.")
    keys = {_key(gpu.name): gpu.name for gpu in gpus()}
    close = [keys[match] for match in difflib.get_close_matches(key, keys, n=3)]
    remedy = f"Did you mean {' or '.join(close)}?" if close else f"Known GPUs: {', '.join(keys.values())}."
    raise ConfigError(
        f"{name[:60]!r} is not in the catalog.", field="gpu", remedy=f"{remedy} Or give its memory in GiB instead."
    )


def _matches(key: str) -> list[Gpu]:
    """By the whole name, else without its memory size ("L4" is not "L40S"), else by its first letters."""
    if not key:
        return []
    names = [(gpu, _key(gpu.name), _key(gpu.name.rsplit(" ", 1)[0])) for gpu in gpus()]
    exact = [gpu for gpu, whole, without_size in names if key in (whole, without_size)]
    return exact or [gpu for gpu, whole, _ in names if whole.startswith(key)]


def custom_gpu(name: str, memory_gib: float, source: str = "as given") -> Gpu:
    """A device described by its usable memory alone.

    Raises:
        ConfigError: if the memory is not a positive number of GiB.
    """
    _check_memory(memory_gib)
    return Gpu(name=name, usable_gib=float(memory_gib), usable_source=source)


def with_memory(gpu: Gpu, memory_gib: float) -> Gpu:
    """The same GPU with a measured usable memory in place of the catalog's.

    Raises:
        ConfigError: if the memory is not a positive number of GiB.
    """
    _check_memory(memory_gib)
    return dataclasses.replace(gpu, usable_gib=float(memory_gib), usable_source="as given")


def _check_memory(memory_gib: float) -> None:
    number = isinstance(memory_gib, int | float) and not isinstance(memory_gib, bool)
    if not number or not 0 < memory_gib <= MAX_MEMORY_GIB:
        raise ConfigError(
            f"{shown(memory_gib)} is not a memory size.",
            field="gpu_memory_gib",
            remedy=f"Give a number of GiB above 0 and up to {MAX_MEMORY_GIB:,.0f}.",
        )


def _key(name: str) -> str:
    text = "".join(character for character in name.lower() if character.isalnum())
    return text.removeprefix("nvidia").removeprefix("amd").removeprefix("instinct").removeprefix("geforce")
