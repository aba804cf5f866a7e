"""The proof on a GPU, in one command of at most nine minutes: right, how near to the hardware, how against the peers.

    python -m tests.gpu.run --out DIR [--only paged_attention,sample] [--parts kernels,parity,engine] [--minutes 9]

First the ceilings of this device (copy, matrix products), then every kernel against its reference, its floor and its
peers, then the engine: the tokens of transformers on small models, and its speed on the shapes of Llama-3.1-8B with
random weights. Prints one table and writes ``gpu.json`` after every part, so that what is done is kept whatever comes.

Without a GPU, ``TRITON_INTERPRET=1 python -m tests.gpu.run --device cpu --size tiny --out DIR`` goes the same way in
Triton's interpreter: it proves that everything runs and is right, and its times mean nothing.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from engine.measure.provenance import code_revision
from tests.gpu import ceilings, engine_parity, engine_speed, kernels, table

PARTS = ("kernels", "parity", "engine")
KERNELS_SHARE = 0.55  # of the time, at most; the engine has what is left


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.json")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument("--only", default="", help="kernels, by the beginning of their names")
    parser.add_argument("--waiting", action="store_true", help="the kernels that nothing calls yet, alone")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--minutes", type=float, default=9.0, help="nothing is begun after so many")
    return parser.parse_args(arguments)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure all parts; the document, which is on disk after every part."""
    began = time.monotonic()
    device, size = torch.device(arguments.device), arguments.size
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
    parts = arguments.parts.split(",")
    kernels_end = began + 60 * arguments.minutes * (KERNELS_SHARE if len(parts) > 1 else 1.0)
    end = began + 60 * arguments.minutes
    document: dict[str, Any] = {**_provenance(device), "kernels": [], "parity": [], "engine": []}
    _say("measuring the ceilings …")
    limits = ceilings.measure(device, size)
    document["ceilings"] = dataclasses.asdict(limits)
    if "parity" in parts:  # first: a number of an engine that is wrong is worth nothing
        for result in engine_parity.check_all(device, size, end, _say):
            document["parity"].append(dataclasses.asdict(result))
        _save(document, arguments.out, began)
    if "kernels" in parts:
        only = tuple(part for part in arguments.only.split(",") if part)
        modules = [kernels.WAITING_CASES] if arguments.waiting else kernels.case_modules(only)
        for measured in kernels.measure_all(device, size, limits, kernels_end, modules, _say):
            document["kernels"].append(dataclasses.asdict(measured))
        _save(document, arguments.out, began)
    if "engine" in parts:
        for speed in engine_speed.measure_all(device, size, limits, end, _say):
            document["engine"].append(dataclasses.asdict(speed))
            _save(document, arguments.out, began)
    _save(document, arguments.out, began)
    return document


def _provenance(device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU: Triton's interpreter"
    versions = {"torch": torch.__version__}
    for package in ("triton", "transformers"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": name,
        "capability": list(torch.cuda.get_device_capability(device)) if device.type == "cuda" else None,
        "cuda": torch.version.cuda,
        "versions": versions,
        "revision": code_revision(),
    }


def _save(document: dict[str, Any], folder: Path, began: float) -> None:
    document["minutes"] = round((time.monotonic() - began) / 60, 2)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "gpu.json"
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _say(words: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {words}", file=sys.stderr, flush=True)


def main() -> int:
    """Measure, print, and fail if anything is wrong; that something is slow is no failure."""
    arguments = parse_arguments()
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        print("there is no CUDA device; see --device cpu --size tiny", file=sys.stderr)
        return 2
    document = run(arguments)
    print(table.text(document))
    wrong = table.failures(document)
    print("\n".join(["", f"{len(wrong)} wrong", *wrong]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
