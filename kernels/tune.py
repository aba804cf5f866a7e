"""Measure which configuration of each kernel is the quickest on this GPU, and keep the answers for it.

    python -m kernels.tune [--only weight_only_linear] [--out kernels/tuned] [--minutes 10]

Every kernel's module that has ``tuning_problems`` gives shapes of Llama-3.1-8B, each with a launch in every
configuration; the quickest by the median of many launches goes into ``HEADROOM_HOME/tuned/<gpu>.json``, which engines
read from their next start on (:mod:`kernels.tuning`). ``--out kernels/tuned`` writes the table that is shipped. A
configuration that does not run on this GPU is passed over.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from kernels.aot import MODULES
from kernels.trust import home, private_dir, private_file
from kernels.tuning import gpu_slug, key_text, own_tables

Launch = Callable[[], object]
Problem = tuple[tuple[int | str, ...], Mapping[str, Launch]]
SAMPLES = 30
FLUSH_BYTES = 256 * 2**20  # more than any level-2 cache


def tunable(modules: Sequence[str] = MODULES) -> Iterator[tuple[str, Callable[[torch.device], Iterator[Problem]]]]:
    """(kernel, its problems) of every module that has any."""
    for name in modules:
        problems = getattr(importlib.import_module(f"kernels.{name}"), "tuning_problems", None)
        if problems is not None:
            yield name, problems


def tune(
    problems: Iterator[Problem],
    time_of: Callable[[Launch], float],
    deadline: float,
    tell: Callable[[str], None],
) -> dict[str, dict[str, Any]]:
    """The quickest configuration of each problem.

    Args:
        time_of: seconds of a launch; raises if it does not run here.
        deadline: ``time.monotonic()`` after which no problem is begun.
        tell: takes a line of progress.

    Returns:
        ``{key: {"config": name, "us": microseconds}}``, as a table has it.
    """
    found: dict[str, dict[str, Any]] = {}
    for key, launches in problems:
        if time.monotonic() > deadline:
            break
        times: dict[str, float] = {}
        for name, launch in launches.items():
            try:
                times[name] = time_of(launch)
            except Exception as error:  # shared memory, an element type: another configuration will do
                tell(f"  {name} does not run: {str(error).splitlines()[0][:120]}")
        if times:
            best = min(times, key=lambda name: times[name])
            found[key_text(key)] = {"config": best, "us": round(1e6 * times[best], 2)}
            tell(f"  {key_text(key)}: {best}, {1e6 * times[best]:.1f} µs")
    return found


def merge(path: Path, tables: Mapping[str, Mapping[str, Any]], provenance: Mapping[str, str]) -> None:
    """Write what was measured over what a table held; shapes that were not measured now stay."""
    whole: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for kernel, entries in tables.items():
        whole[kernel] = whole.get(kernel, {}) | dict(entries)
    whole["provenance"] = dict(provenance)
    private_dir(path.parent, home())
    part = private_file(path.with_suffix(".part"))
    part.write_text(json.dumps(whole, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    part.replace(path)


def device_seconds(launch: Launch) -> float:
    """Median time of a launch on the GPU, with cold caches."""
    for _ in range(3):
        launch()
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    samples: list[float] = []
    for _ in range(SAMPLES):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        flush.zero_()  # also gives the host time to enqueue what follows
        start.record()
        launch()
        stop.record()
        stop.synchronize()
        samples.append(start.elapsed_time(stop) / 1e3)
    return statistics.median(samples)


def main() -> int:
    """Tune this machine's first GPU."""
    parser = argparse.ArgumentParser(prog="python -m kernels.tune", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="kernels by name, e.g. weight_only_linear,scaled_linear")
    parser.add_argument("--out", type=Path, help="folder of the table; default: tuned under HEADROOM_HOME")
    parser.add_argument("--minutes", type=float, default=10.0)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("there is no CUDA device to tune for.", file=sys.stderr)
        return 2
    deadline = time.monotonic() + 60 * arguments.minutes
    wanted = [name for name in arguments.only.split(",") if name] or list(MODULES)
    path = (arguments.out or own_tables()) / f"{gpu_slug(0)}.json"
    provenance = {
        "gpu": torch.cuda.get_device_name(0),
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    for name, problems in tunable(wanted):
        print(name, flush=True)
        found = tune(problems(torch.device("cuda:0")), device_seconds, deadline, lambda line: print(line, flush=True))
        merge(path, {name: found}, provenance)
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
