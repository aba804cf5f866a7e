"""Commands of minutes that need no attention: they run beside the suite, one after another, at the lowest priority.

Browser tests wait, and most tests have one thread: the suite leaves much of a core idle. What takes minutes in a
process of its own anyway (Triton's interpreter, its compiler) or needs one thread only (parity of the families) begins
with the suite and is asked for at its end: tests marked ``beside("name of a command")`` come last, and their commands
start when the tests have been collected.
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
#: Files that a command runs where a test that waits for it has been collected, too; else they run where they are.
FILES = {"families": "tests/parity/test_families_parity.py"}
#: What a machine with a GPU may be expected to have. The proof must run there as it is.
GPU_IMAGE = ("torch", "triton", "transformers", "psutil")
_INTERPRETED = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}


@dataclasses.dataclass(frozen=True, slots=True)
class Command:
    """A Python command.

    Attributes:
        arguments: of the interpreter; ``{folder}`` stands for a folder of its own.
        environment: beside what the suite has, likewise.
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
        {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": "{folder}"},  # from scratch
    ),
    "interpreter": Command(
        ("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels/interpreter"),
        _INTERPRETED,
    ),
    "families": Command(
        ("-m", "pytest", "-q", "-p", "no:cacheprovider", FILES["families"]),
        {"OMP_NUM_THREADS": "1"},
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
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False

    def start(self, names: Sequence[str]) -> None:
        """Run these commands one after another, in a thread."""
        threading.Thread(target=self._run_all, args=(tuple(names),), daemon=True).start()

    def folder(self, name: str) -> Path:
        """The folder of a command."""
        return self._folder / name

    def result(self, name: str, timeout_s: float = 590) -> subprocess.CompletedProcess[str]:
        """What a command came to, waited for.

        Raises:
            TimeoutError: if it has not ended by then.
        """
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
