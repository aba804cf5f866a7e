"""Our engine beside its peers on this machine, in one run: ``make bench``.

    python -m tests.benchmarks.run [--quick] [--only a,b] [--peers headroom,llama.cpp] [--repeats 3] [--minutes 240]
                                   [--settings "weights=w4a8, dtype=float32; headroom:dtype=float32@a+p512; llama.cpp:"]
                                   [--ours weights=int4,execution=eager] [--attempts 2] [--device cpu]
                                   [--shape smollm2-135m] [--no-readme]

Every setting of every engine is a process of its own, one at a time, with the same number of threads; it runs the
workloads in an order drawn again each time. A repeat runs every setting once, again in a new order, so that a drift of
the machine falls on all alike. A measurement that other processes disturb is made again, at most ``--attempts`` times;
the least disturbed one is kept, never the fastest, and what stays disturbed is marked.

A setting's name is every knob that differs from the defaults; our process reports the knobs it really ran with, and a
row whose label does not say the same counts as failed. What each of our settings costs in quality is measured in the
same run (``quality.py``); random weights have no quality.

Threads that wait for each other at every product suffer far more from other work on the machine than one thread does
(a step takes seconds instead of milliseconds): on a shared machine only ``--threads 1`` says anything at all.

Results go to ``tests/benchmarks/results/<date>-<machine>-<hash>.json`` and into docs/benchmarks.md between its marks;
those of ``--quick`` (one repeat, at most 16 requests, an eighth of the output) only to ``tests/artifacts/benchmarks/``.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from engine.measure.provenance import code_revision, hardware, versions
from engine.models import fetch_default_model
from tests.benchmarks import checkpoints, report, report_docs
from tests.benchmarks.bars import judge
from tests.benchmarks.floor import Shape, floor, measure, read_shape
from tests.benchmarks.metrics import METRICS, figures
from tests.benchmarks.peers.protocol import (
    DISTURBED_SHARE,
    Order,
    Report,
    Run,
    Work,
    report_from_json,
    shared_prefix,
    write,
)
from tests.benchmarks.quality import stored_as
from tests.benchmarks.settings import (
    ENGINES,
    OURS,
    Setting,
    all_settings,
    choose,
    label,
    parse_ours,
    quality_knobs,
    shared_knobs,
    weights_of,
)
from tests.benchmarks.workloads import BENCHMARKS, Benchmark, works

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results"
QUICK_RESULTS = ROOT / "tests" / "artifacts" / "benchmarks"
BUSY_LOAD_PER_CORE = 0.25
SEED = 0
GPU_WORKLOADS = ("a", "b8", "b32", "p512", "p2048")


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """What one call measures.

    Attributes:
        settings: those whose engine is installed.
        missing: ``{engine: why it is not measured}``.
        timeout_s: after which one process counts as hanging.
    """

    benchmarks: list[Benchmark]
    settings: list[Setting]
    missing: dict[str, str]
    shape: str
    device: str
    threads: int
    repeats: int
    minutes: float
    attempts: int
    quick: bool
    timeout_s: float


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one repeat, at most 16 requests, an eighth of the output")
    parser.add_argument("--only", help="workloads by key or its beginning, e.g. a,b,p512")
    parser.add_argument("--peers", help=f"engines or beginnings of their names, of {', '.join(ENGINES)}")
    parser.add_argument("--settings", help='by name: "[engine:]weights=w4a8, dtype=float32[@a+p512]; …"')
    parser.add_argument("--ours", action="append", default=[], help="one more setting of ours: knob=value,…")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=360.0, help="no repeat is begun that would not end within")
    parser.add_argument("--attempts", type=int, default=1, help="most measurements where other processes disturb")
    parser.add_argument("--timeout", type=float, default=60.0, help="minutes after which one process is given up")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", choices=checkpoints.CHECKPOINTS, help="default: smollm2-135m, on cuda llama-3.1-8b")
    parser.add_argument("--no-readme", action="store_true", help="leave docs/benchmarks.md as it is")
    return parser.parse_args(arguments)


def make_plan(arguments: argparse.Namespace) -> Plan:
    """Which settings of which engines run which workloads; fetches nothing and starts nothing."""
    keys = arguments.only.split(",") if arguments.only else list(GPU_WORKLOADS if arguments.device == "cuda" else ())
    benchmarks = [item for item in BENCHMARKS if not keys or any(item.key.startswith(key) for key in keys)]
    engines = arguments.peers.split(",") if arguments.peers else list(ENGINES)
    known = all_settings(arguments.device, [parse_ours(text) for text in arguments.ours])
    if arguments.settings:
        known = choose(known, arguments.settings, [item.key for item in BENCHMARKS])
    wanted = [setting for setting in known if any(setting.engine.startswith(engine) for engine in engines)]
    missing = {
        setting.engine: "not installed (make peers)"
        for setting in wanted
        if ENGINES[setting.engine].interpreter() is None
    }
    return Plan(
        benchmarks=benchmarks,
        settings=[setting for setting in wanted if setting.engine not in missing],
        missing=missing,
        shape=arguments.shape or (checkpoints.DEFAULT_MODEL if arguments.device == "cpu" else "llama-3.1-8b"),
        device=arguments.device,
        threads=arguments.threads,
        repeats=1 if arguments.quick else arguments.repeats,
        minutes=arguments.minutes,
        attempts=arguments.attempts,
        quick=arguments.quick,
        timeout_s=60 * arguments.timeout,
    )


# -- running ----------------------------------------------------------------------------------------------------------


class Results:
    """Values of every (engine, setting, workload, variant), one a repeat."""

    def __init__(self, repeats: int) -> None:
        self.repeats = repeats
        self.rows: dict[tuple[str, str, str, str], dict[str, Any]] = {}
        self.engines: dict[str, dict[str, Any]] = {}

    def add(self, setting: Setting, answer: Report, works_sent: Sequence[Work], repeat: int) -> None:
        """Take over a report; what it lacks is recorded with the reason."""
        self.engines[f"{setting.engine} {setting.name}"] = {
            "options": setting.options,
            "versions": answer.versions,
            "load_s": answer.load_s,
            "error": answer.error,
        }
        runs = {(run.workload, run.variant): run for run in answer.runs}
        for work in works_sent:
            missing = Run(work.name, work.variant, [], error=answer.error or "its process ended before this workload")
            self._add_run(setting, work, runs.get((work.name, work.variant), missing), repeat)

    def _add_run(self, setting: Setting, work: Work, run: Run, repeat: int) -> None:
        key = (setting.engine, setting.name, work.name, work.variant)
        row = self.rows.setdefault(key, self._empty(setting, work))
        error = run.error or mislabelled(setting, run)
        values = figures(run.timings, work) if run.timings and not error else {}
        for name in METRICS:
            row["values"][name][repeat] = values.get(name)
        row["others_share"][repeat] = run.others_share
        row["path"] = run.path or row["path"]
        if error:
            row["errors"].append(error)

    def _empty(self, setting: Setting, work: Work) -> dict[str, Any]:
        return {
            "engine": setting.engine,
            "setting": setting.name,
            "options": setting.options,
            "weights": weights_of(setting.options),
            "workload": work.name,
            "variant": work.variant,
            "values": {name: [None] * self.repeats for name in METRICS},
            "others_share": [None] * self.repeats,
            "errors": [],
            "path": {},
        }

    def finished(self, repeats: int) -> list[dict[str, Any]]:
        """All rows, cut to the repeats that were begun, in the order of workloads and engines."""
        for row in self.rows.values():
            row["values"] = {name: values[:repeats] for name, values in row["values"].items()}
            row["others_share"] = row["others_share"][:repeats]
        order = [item.key for item in BENCHMARKS]
        engines = list(ENGINES)
        return sorted(self.rows.values(), key=lambda row: (order.index(row["workload"]), engines.index(row["engine"])))


def mislabelled(setting: Setting, run: Run) -> str:
    """Why a row of ours would not name every knob that differs, "" if it does: what ran is what the label says."""
    ran = run.path.get("knobs")
    if setting.engine != OURS or ran is None or ran == setting.name:
        return ""
    return f"ran with other knobs than its label says: {ran}"


def run(plan: Plan) -> dict[str, Any]:
    """Measure everything; the document of the results."""
    load_average = os.getloadavg()
    warnings = busy_warning(load_average)
    for text in [*warnings, *(f"{name}: {why}" for name, why in plan.missing.items())]:
        say(f"warning: {text}")
    folder = _checkpoint(plan.shape)
    tokenizer = _tokenizer(folder)
    sent = {
        ours: {item.key: works(item, tokenizer, SEED, ours=ours, quick=plan.quick) for item in plan.benchmarks}
        for ours in (True, False)
    }
    say("measuring the floor of this machine …")
    machine = measure(plan.device, plan.threads)
    results, began, done = Results(plan.repeats), time.monotonic(), 0
    for repeat in range(plan.repeats):
        repeat_began = time.monotonic()
        for setting, work in _order(plan, sent, repeat):
            results.add(setting, _run_setting(plan, setting, work, folder), work, repeat)
        done = repeat + 1
        if 2 * time.monotonic() - repeat_began > began + 60 * plan.minutes:
            break
    rows = results.finished(done)
    quality = measure_quality(plan)
    for row in rows:
        if row["engine"] == OURS and quality:
            row["quality"] = quality["figures"].get(label(quality_knobs(row["options"])))
    _add_floors(rows, sent[True], read_shape(folder), machine)
    return {
        **_provenance(plan, done, load_average, warnings),
        "engines": results.engines,
        "workloads": {key: _describe(key, items[0]) for key, items in sent[True].items()},
        "machine_rates": dataclasses.asdict(machine),
        "quality": quality,
        "rows": rows,
        "bars": [dataclasses.asdict(verdict) for verdict in judge(rows)],
    }


def measure_quality(plan: Plan) -> dict[str, Any] | None:
    """``{reference, figures: {label: …}}`` of our settings, from a process of its own; None for random weights."""
    ours = [quality_knobs(setting.options) for setting in plan.settings if setting.engine == OURS]
    if plan.shape != checkpoints.DEFAULT_MODEL or not ours:
        return None
    say("measuring what our settings cost in quality …")
    shared = shared_knobs(plan.device, plan.threads)
    order = {"model": checkpoints.DEFAULT_MODEL, "shared": shared, "combinations": ours, "threads": plan.threads}
    with tempfile.TemporaryDirectory(prefix="headroom-bench-") as scratch:
        source, target = Path(scratch) / "in.json", Path(scratch) / "out.json"
        source.write_text(json.dumps(order), encoding="utf-8")
        command = [sys.executable, "-m", "tests.benchmarks.quality", str(source), str(target)]
        subprocess.run(command, cwd=ROOT, check=True, timeout=plan.timeout_s)
        found = json.loads(target.read_text(encoding="utf-8"))
    stored = stored_as(fetch_default_model())
    return {"reference": f"weights as stored, {stored}, computed in float32", "figures": found}


def _order(plan: Plan, sent: dict[bool, dict[str, list[Work]]], repeat: int) -> list[tuple[Setting, list[Work]]]:
    """Settings and, within each, workloads: drawn again for each repeat."""
    draw = random.Random(f"order/{repeat}")
    order = []
    for setting in plan.settings:
        works_of = sent[setting.engine == OURS]
        items = [work for key, items in works_of.items() if key in (setting.workloads or works_of) for work in items]
        draw.shuffle(items)
        if ENGINES[setting.engine].fragile:
            order.extend((setting, [item]) for item in items)
        elif items:
            order.append((setting, items))
    draw.shuffle(order)
    return order


def _run_setting(plan: Plan, setting: Setting, work: list[Work], folder: Path) -> Report:
    began = time.monotonic()
    say(f"{setting.engine} {setting.name}: {', '.join(f'{w.name} {w.variant}'.strip() for w in work)} …")
    gguf = str(fetch_default_model()) if plan.shape == checkpoints.DEFAULT_MODEL else ""
    order = Order(
        peer=setting.engine,
        setting=setting.name,
        options=setting.options,
        checkpoint=str(folder),
        gguf=gguf,
        threads=plan.threads,
        device=plan.device,
        work=work,
        attempts=plan.attempts,
    )
    answer = call_peer(ENGINES[setting.engine].interpreter(), ENGINES[setting.engine].module, order, plan.timeout_s)
    for entry in (*answer.runs, *([answer] if answer.error else [])):
        if entry.error:
            say(f"  {getattr(entry, 'workload', 'process')}: {entry.error}")
    say(f"  {time.monotonic() - began:.0f} s")
    return answer


def call_peer(interpreter: Path | None, module: str, order: Order, timeout_s: float) -> Report:
    """Run a peer's process to its end; whatever happens to it, a report (of what it had finished, with the reason)."""
    assert interpreter is not None
    with tempfile.TemporaryDirectory(prefix="headroom-bench-") as scratch:
        source, target, log = (Path(scratch) / name for name in ("order.json", "report.json", "log.txt"))
        write(order, source)
        command = [str(interpreter), "-m", module, str(source), str(target)]
        threads = str(order.threads)
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}
        with log.open("wb") as sink:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                status: int | str = process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                status = f"given up after {timeout_s / 60:.0f} minutes"
            finally:
                _end_session(process)
        answer = Report(order.peer, order.setting, order.options)
        if target.exists():
            answer = report_from_json(target.read_text(encoding="utf-8"))
        if not answer.error and status != 0:
            answer.error = f"its process ended: {status}; {_last_line(log)}"
        return answer


def _end_session(process: subprocess.Popen[bytes]) -> None:
    """End what is left of the process and its helpers (they have a session, and so a group, of their own)."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"


# -- around it --------------------------------------------------------------------------------------------------------


def busy_warning(load_average: Sequence[float]) -> list[str]:
    """A warning if the machine has other work at the start."""
    busy = load_average[0] > BUSY_LOAD_PER_CORE * (os.cpu_count() or 1)
    return [f"the machine was busy at the start: load average {load_average[0]:.1f}"] if busy else []


def say(text: str) -> None:
    """Progress, on standard error."""
    print(text, file=sys.stderr, flush=True)


def _checkpoint(shape: str) -> Path:
    """Made in a process of its own, whose memory it gives back."""
    command = [sys.executable, "-m", "tests.benchmarks.checkpoints", shape]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return checkpoints.folder(shape)


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)


def _describe(key: str, work: Work) -> dict[str, Any]:
    title = next(item.title for item in BENCHMARKS if item.key == key)
    return {
        "title": title,
        "requests": len(work.requests),
        "prompt_tokens": sum(len(request.prompt_token_ids) for request in work.requests),
        "output_tokens": sum(request.output_tokens for request in work.requests),
    }


def _add_floors(rows: list[dict[str, Any]], sent: dict[str, list[Work]], shape: Shape, machine: Any) -> None:
    """To each row whose resident weights are known: the seconds below which no implementation can go here."""
    for row in rows:
        resident = row["path"].get("weights_bytes")
        if resident is None:
            continue
        work = sent[row["workload"]][0]
        cached = len(shared_prefix(work)) if row["variant"] != "no prefix cache" else 0
        ideal = floor(work.requests, shape, machine, row["weights"], int(resident), cached)
        row["floor"] = {**dataclasses.asdict(ideal), "total_s": ideal.total_s}


def _provenance(plan: Plan, repeats: int, load_average: Sequence[float], warnings: list[str]) -> dict[str, Any]:
    revision, dirty = code_revision()
    return {
        "benchmark": "engines",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "model": plan.shape,
        "device": plan.device,
        "threads": plan.threads,
        "shared_knobs": shared_knobs(plan.device, plan.threads),
        "quick": plan.quick,
        "repeats": repeats,
        "seed": SEED,
        "disturbed_above_share": DISTURBED_SHARE,
        "load_average_at_start": list(load_average),
        "warnings": warnings,
        "missing": plan.missing,
        "code_revision": revision,
        "code_dirty": dirty,
        "versions": versions(),
        "hardware": hardware(),
    }


def main() -> None:
    """Measure, save, print the tables, write them into docs/benchmarks.md."""
    arguments = parse_arguments()
    plan = make_plan(arguments)
    document = run(plan)
    path = report.save(document, QUICK_RESULTS if plan.quick else RESULTS)
    say(f"written: {path}")
    text = report.markdown(document)
    print(text)
    if not plan.quick and not arguments.no_readme:
        report_docs.main()


if __name__ == "__main__":
    main()
