"""Make or refresh the virtual environment from the locks: ``make setup`` and ``make setup-dev`` call this.

    python3 .ci/environment.py [--venv .venv] [--torch auto|cpu|cuda] [--dev]
    python3 .ci/environment.py --lock            write the locks again from requirements*.txt

Every package comes with its hash. On Linux the default build of torch brings gigabytes of CUDA libraries; a machine
without an NVIDIA GPU gets the CPU build where one can be reached: in the places that pip has been told of, else in
PyTorch's own index, which uv knows. Needs Python alone; uv is installed into the environment, by its own lock.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DEFAULT, CPU, DEV, UV = (ROOT / f"requirements{name}.lock" for name in ("", "-cpu", "-dev", "-uv"))
UV_VERSION = "0.13.9"

#: uv does not read pip's settings: what names a place to look in is handed on.
_PLACES = {"index-url": "UV_DEFAULT_INDEX", "find-links": "UV_FIND_LINKS", "extra-index-url": "UV_INDEX"}
_FOR_LOCKS = (
    "UV_DEFAULT_INDEX",
    "UV_FIND_LINKS",
)  # an extra index may hold some files of a release, and so some hashes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv")
    parser.add_argument("--torch", choices=("auto", "cpu", "cuda"), default=os.environ.get("TORCH") or "auto")
    parser.add_argument("--dev", action="store_true", help="also what checks and tests need")
    parser.add_argument("--lock", action="store_true", help="write the locks instead")
    options = parser.parse_args()
    python = _environment(options.venv)
    if options.lock:
        _lock(python)
        return
    _install(python, "cuda" if options.torch == "auto" and _has_nvidia_gpu() else options.torch)
    if options.dev:
        _locked(python, DEV, "--no-deps")
    _uv(python, "check")


def _environment(folder: Path) -> Path:
    """The environment's Python, with uv."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    if not _is_installed(python):
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        wanted = ["--require-hashes", "-r", str(UV)] if UV.exists() else [f"uv=={UV_VERSION}"]
        subprocess.run([*pip, *wanted], check=True)
    return python


def _is_installed(python: Path) -> bool:
    uv = python.with_name("uv")
    return uv.exists() and UV_VERSION in subprocess.run([uv, "--version"], capture_output=True, text=True).stdout


def _has_nvidia_gpu() -> bool:
    tool = shutil.which("nvidia-smi")
    return bool(tool) and "GPU" in subprocess.run([tool, "-L"], capture_output=True, text=True).stdout


def _install(python: Path, torch: str) -> None:
    """The packages that Headroom runs on, with the wanted build of torch or, where there is none, the default one."""
    if torch != "cuda":
        for further in ((), ("--torch-backend", "cpu")):
            if _uv(python, "install", "--require-hashes", "-r", str(CPU), *further, must=False):
                return
        print("No CPU build of torch is in reach for this Python: its default build is installed.", file=sys.stderr)
    # the CPU build satisfies the default one's version
    other = ("--reinstall-package", "torch") if torch == "cuda" and _torch_version(python).endswith("+cpu") else ()
    _locked(python, DEFAULT, *other)


def _locked(python: Path, lock: Path, *options: str) -> None:
    """Install a lock by uv or, where uv reaches no index (a proxy whose certificates only pip knows), by pip."""
    if _uv(python, "install", "--require-hashes", "-r", str(lock), *options, must=False):
        return
    print(f"uv cannot install {lock.name}: pip tries, which takes longer.", file=sys.stderr)
    again = [
        "--force-reinstall" if option == "--reinstall-package" else option for option in options if option != "torch"
    ]
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--require-hashes"]
    subprocess.run([*pip, "-r", str(lock), *again], check=True)


def _torch_version(python: Path) -> str:
    """The installed one, "" if there is none."""
    code = "from importlib.metadata import version; print(version('torch'))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True).stdout.strip()


def _lock(python: Path) -> None:
    """Resolve requirements*.txt for every platform and write the locks: versions, hashes, who asked for what."""
    default, dev = str(ROOT / "requirements.txt"), str(ROOT / "requirements-dev.txt")
    _compile(python, UV, "-", stdin=f"uv=={UV_VERSION}")
    _compile(python, DEFAULT, default)
    torch = next(line for line in (ROOT / "requirements.txt").read_text().splitlines() if line.startswith("torch=="))
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as override:
        override.write(f"{torch}+cpu ; sys_platform == 'linux'\n{torch} ; sys_platform != 'linux'\n")
        override.flush()
        cpu = (default, "--override", override.name, "--constraint", str(DEFAULT))
        if not _compile(python, CPU, *cpu, must=False):
            _compile(python, CPU, *cpu, "--torch-backend", "cpu")
    known = [option for name in _names(DEFAULT) for option in ("--no-emit-package", name)]
    _compile(python, DEV, dev, "--constraint", str(DEFAULT), *known)


def _names(lock: Path) -> Iterator[str]:
    return (line.partition("==")[0] for line in lock.read_text().splitlines() if line[:1].isalnum())


def _compile(python: Path, target: Path, *arguments: str, stdin: str = "", must: bool = True) -> bool:
    options = ["--universal", "--python-version", "3.11", "--generate-hashes", "--no-annotate"]
    options += ["--no-emit-index-url", "--no-emit-find-links", "--custom-compile-command", "make lock"]
    return _uv(python, "compile", *options, "--output-file", str(target), *arguments, stdin=stdin, must=must)


def _uv(python: Path, *arguments: str, stdin: str = "", must: bool = True) -> bool:
    """Run ``uv pip …`` on this environment; False if it failed and need not succeed."""
    command = [str(python.with_name("uv")), "pip", *arguments, *(() if sys.stderr.isatty() else ("--quiet",))]
    places = _pip_places(python)
    if arguments[0] == "compile":
        places = {name: value for name, value in places.items() if name in _FOR_LOCKS}
    else:
        command += ["--python", str(python)]
        places["UV_INDEX_STRATEGY"] = "unsafe-best-match"  # as pip: every index is equal; the hashes say what is taken
    where = {**places, **os.environ}
    done = subprocess.run(command, cwd=ROOT, env=where, input=stdin, text=True, capture_output=not must)
    if must and done.returncode != 0:
        sys.exit(done.returncode)
    return done.returncode == 0


def _pip_places(python: Path) -> dict[str, str]:
    """The places that pip has been told to look in, as uv's variables."""
    command = [python, "-m", "pip", "config", "list"]
    return _as_uv_variables(subprocess.run(command, capture_output=True, text=True).stdout)


def _as_uv_variables(settings: str) -> dict[str, str]:
    """What ``pip config list`` prints, one ``section.name='value'`` a line, as far as uv needs it.

    >>> _as_uv_variables("global.find-links='/a /b'\\nglobal.timeout='9'")
    {'UV_FIND_LINKS': '/a,/b'}
    """
    places = {}
    for line in settings.splitlines():
        name, _, value = line.partition("=")
        variable = _PLACES.get(name.rpartition(".")[2])
        several = value.strip("'\"").replace("\\n", " ").split()
        if variable and several:
            places[variable] = ("," if variable == "UV_FIND_LINKS" else " ").join(several)
    return places


if __name__ == "__main__":
    main()
