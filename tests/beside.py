"""Commands of minutes that tests ask for and that need a process of their own, at the lowest priority.

Triton's interpreter and its compiler cannot live in the process of the other tests. Tests marked
``beside("name of a command")`` read what it came to. Where the suite runs in one process, the commands begin when the
tests have been collected, run next to it one after another, and the tests that read them come last. Where it runs in
several (``make test``), the tests of a command stay together in one of them, which runs the command when the first of
them asks: the other processes keep the other cores busy meanwhile.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from tests.bare_site import make_bare_site

ROOT = Path(__file__).resolve().parents[1]
#: What Triton has compiled, by its own key (source, constants, target, versions): only what has changed is compiled.
COMPILED = ROOT / ".cache" / "triton"
#: What a machine with a GPU may be expected to have. The proof must run there as it is.
GPU_IMAGE = ("torch", "triton", "transformers", "psutil")
#: How long a test waits for a command on a slow machine that does other things as well.
PATIENCE_S = 1770.0
_INTERPRETED = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}


@dataclasses.dataclass(frozen=True, slots=True)
class Command:
    """A Python command.

    Attributes:
        arguments: of the interpreter; ``{folder}`` stands for a folder of its own.
        environment: added to what the suite has, likewise.
        packages: where given, only these and what they require can be imported.
    """

    arguments: tuple[str, ...]
    environment: dict[str, str]
    packages: tuple[str, ...] = ()


COMMANDS = {
    "proof": Command(
        ("-m", "tests.gpu.run", "--device", "cpu", "--size", "tiny", "--out", "{folder}"),
        _INTERPRETED,
        GPU_IMAGE,
    ),
    "compilation": Command(
        ("-m", "kernels.aot", "--json"),
        {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(COMPILED)},  # a clean clone compiles everything
    ),
    "interpreter": Command(
        ("-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=15", "tests/kernels/interpreter"),
        _INTERPRETED,
    ),
}


class Beside:
    """The commands of one run of the suite.

    Args:
        folder: where they may write; each gets a folder in it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._results: dict[str, subprocess.CompletedProcess[str]] = {}
        self._changed = threading.Condition()
        self._started: set[str] = set()
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False

    def start(self, names: Sequence[str]) -> None:
        """Run these commands one after another, in a thread."""
        self._started.update(names)
        threading.Thread(target=self._run_all, args=(tuple(names),), daemon=True).start()

    def folder(self, name: str) -> Path:
        """The folder of a command."""
        return self._folder / name

    def result(self, name: str, timeout_s: float = PATIENCE_S) -> subprocess.CompletedProcess[str]:
        """What a command came to, waited for; run now if it was not started.

        Raises:
            TimeoutError: if it has not ended by then.
        """
        if name not in self._started:
            self.start([name])
        with self._changed:
            if not self._changed.wait_for(lambda: name in self._results, timeout_s):
                raise TimeoutError(f"{name} has not ended within {timeout_s:.0f} s of waiting")
            return self._results[name]

    def close(self) -> None:
        """End what still runs."""
        with self._changed:
            self._closed = True
            if self._process is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)

    def _run_all(self, names: tuple[str, ...]) -> None:
        for name in names:
            result = self._run(name)
            with self._changed:
                self._results[name] = result
                self._changed.notify_all()

    def _run(self, name: str) -> subprocess.CompletedProcess[str]:
        folder, command = self.folder(name), COMMANDS[name]
        folder.mkdir(parents=True)
        arguments = [sys.executable, *(argument.format(folder=folder) for argument in command.arguments)]
        environment = {key: value.format(folder=folder) for key, value in command.environment.items()}
        if command.packages:
            site = self._folder / f"{name}.site"
            make_bare_site(command.packages, site)
            arguments.insert(1, "-S")
            environment["PYTHONPATH"] = str(site)
        if (nice := shutil.which("nice")) is not None:
            arguments = [nice, "-n", "19", *arguments]
        # To files: nobody reads a pipe until the end of the suite. Not in its folder, which it may look through.
        logs = [self._folder / f"{name}.{stream}" for stream in ("out", "err")]
        with logs[0].open("wb") as out, logs[1].open("wb") as err, self._changed:
            if self._closed:
                return subprocess.CompletedProcess(arguments, -1, "", "the suite has ended")
            self._process = subprocess.Popen(
                arguments, cwd=ROOT, env=os.environ | environment, stdout=out, stderr=err, start_new_session=True
            )
        code = self._process.wait()
        return subprocess.CompletedProcess(arguments, code, *(log.read_text(errors="replace") for log in logs))
