"""Every class of attack against the real worker, loaders and storage: ``make attack``, at most ten minutes.

    python -m tests.attack [--seed 0] [--minutes 9.5] [--only http,gguf,…] [--share 1.0] [--out tests/artifacts]

Prints a table and writes ``attack.json`` and ``attack.md``. Exits with 1 unless of every class as many kinds were tried
as are demanded, and nothing failed: no engine's death, no 500, no traceback in a log, no request without an answer or a
clean end, no acknowledged run lost, and ``/health`` answered within 250 ms throughout.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

from tests.attack import file_attack, http_attack, import_attack, kill_attack, stream_attack
from tests.attack.outcome import Tally, markdown
from tests.attack.target import ROOT, make_home
from tests.conftest import save_tiny_llama

HEALTH_LIMIT_MS = 250.0


@dataclasses.dataclass(frozen=True)
class Setup:
    """What the classes share: the tiny checkpoint, a HEADROOM_HOME, and the share of the demanded kinds to try."""

    seed: int
    model: Path
    home: Path
    share: float

    def of(self, demanded: int) -> int:
        """So many of those demanded."""
        return max(1, round(self.share * demanded))


Attack = Callable[[Setup, Path, float], Tally]


def _files(kind: str) -> Attack:
    def attack(setup: Setup, folder: Path, end: float) -> Tally:
        count = setup.of(file_attack.DEMANDED[kind])
        return file_attack.attack(kind, setup.seed, folder, setup.home, end, count)

    return attack


def _http(setup: Setup, folder: Path, end: float) -> Tally:
    count = None if setup.share >= 1 else setup.of(http_attack.DEMANDED)
    return http_attack.attack(setup.seed, setup.model, folder, setup.home, end, count)


def _imports(setup: Setup, folder: Path, end: float) -> Tally:
    return import_attack.attack(setup.seed, folder, end, setup.of(import_attack.DEMANDED))


def _kills(setup: Setup, folder: Path, end: float) -> Tally:
    return kill_attack.attack(setup.seed, setup.model, folder, setup.home, end, setup.of(kill_attack.DEMANDED))


def _streams(setup: Setup, folder: Path, end: float) -> Tally:
    return stream_attack.attack(setup.seed, setup.model, folder, setup.home, end, setup.of(stream_attack.DEMANDED))


# In this order, each with its share of the minutes; what a class does not need, the next ones have.
CLASSES: dict[str, tuple[Attack, float]] = {
    "imports": (_imports, 0.08),
    "streams": (_streams, 0.10),
    "gguf": (_files("gguf"), 0.16),
    "safetensors": (_files("safetensors"), 0.12),
    "configs": (_files("configs"), 0.12),
    "kill": (_kills, 0.17),
    "http": (_http, 0.25),
}


def run(names: list[str], seed: int, minutes: float, share: float = 1.0) -> list[Tally]:
    """Run classes one after another.

    Args:
        names: keys of :data:`CLASSES`.
        minutes: for all of them together.
        share: of the demanded kinds.
    """
    tallies: list[Tally] = []
    began, shares = time.monotonic(), {name: CLASSES[name][1] for name in names}
    with tempfile.TemporaryDirectory(prefix="headroom-attack-") as scratch:
        model = Path(scratch) / "model"
        model.mkdir()
        save_tiny_llama(model)
        setup = Setup(seed, model, make_home(Path(scratch) / "home"), share)
        for name in names:
            folder = Path(scratch) / name
            folder.mkdir()
            left = 60 * minutes - (time.monotonic() - began)
            later = sum(value for other, value in shares.items() if names.index(other) >= names.index(name))
            class_began = time.monotonic()
            end = class_began + left * shares[name] / later
            tally = _attempt(name, setup, folder, end)
            tally.seconds = time.monotonic() - class_began
            print(f"{name}: {tally.tried} tried in {tally.seconds:.0f} s", file=sys.stderr, flush=True)
            tallies.append(tally)
    return tallies


def _attempt(name: str, setup: Setup, folder: Path, end: float) -> Tally:
    try:
        return CLASSES[name][0](setup, folder, end)
    except Exception as problem:  # the attack itself cannot go on: the other classes are tried all the same
        tally = Tally(name, "", 1)
        tally.add("failed", "the attack itself", f"{type(problem).__name__}: {problem}")
        return tally


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=9.5)
    parser.add_argument("--only", default=",".join(CLASSES), help="classes, separated by commas")
    parser.add_argument("--share", type=float, default=1.0, help="of the kinds demanded, for a quick look")
    parser.add_argument("--out", type=Path, default=ROOT / "tests" / "artifacts")
    arguments = parser.parse_args()
    names = [name for name in CLASSES if name in arguments.only.split(",")]
    if unknown := set(arguments.only.split(",")) - set(CLASSES):
        parser.error(f"no class {', '.join(sorted(unknown))}; there are: {', '.join(CLASSES)}")
    torch.set_num_threads(1)
    tallies = run(names, arguments.seed, arguments.minutes, arguments.share)
    text = markdown(tallies, HEALTH_LIMIT_MS)
    print(text)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "attack.md").write_text(text + "\n", encoding="utf-8")
    document = {"seed": arguments.seed, "share": arguments.share, "health_limit_ms": HEALTH_LIMIT_MS}
    document |= {"classes": [tally.to_dict() for tally in tallies]}
    (arguments.out / "attack.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 1 if any(tally.holds(HEALTH_LIMIT_MS) for tally in tallies) else 0


if __name__ == "__main__":
    sys.exit(main())
