"""Loads checkpoints and plans configurations, and says what became of each: the victim of :mod:`.file_attack`.

    python -m tests.attack.loader      # standard input: {"load": folder or file} or {"plan": arguments}, a line each
                                       # standard output: {"verdict", "reason"}, a line each

A process of its own, so that a crash in it is seen; it may not take more memory than a tiny model could ever need.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import tempfile
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

from engine.cli.app import main as command_line
from engine.config import EngineConfig
from engine.core import Engine
from engine.errors import HeadroomError
from engine.sampling.params import SamplingParams

ADDRESS_SPACE_BYTES = 16 << 30
KNOBS = {"device": "cpu", "dtype": "float32", "memory_limit_gib": 0.25, "max_num_seqs": 4, "threads": 1}
LONGEST_ERROR = 6000


def load(path: str) -> tuple[str, str]:
    """(verdict, reason): refused in words, or served, which means that it also generates."""
    try:
        engine = Engine.load(EngineConfig.from_mapping(KNOBS | {"model": path}))
        vocabulary = engine.model.decoder.vocab_size
        prompt = [token % vocabulary for token in (1, 2, 3)]
        engine.add_request("attack", prompt, SamplingParams(max_tokens=3, ignore_eos=True))
        while engine.has_unfinished():
            for output in engine.step():
                if output.finish_reason == "error":
                    return _row_error(output.error or "without a reason")
    except HeadroomError as problem:
        return _explained(problem.field, str(problem))
    return "served", ""


def plan(arguments: list[str]) -> tuple[str, str]:
    """(verdict, reason): planned in finite numbers, or refused naming the field."""
    with tempfile.TemporaryFile() as sink:  # the command line writes its document past sys.stdout
        previous = os.dup(1)
        os.dup2(sink.fileno(), 1)
        try:
            code = command_line(["plan", *arguments, "--json"])
            sys.stdout.flush()
        finally:
            os.dup2(previous, 1)
            os.close(previous)
        sink.seek(0)
        document = json.loads(sink.read())
    if code == 2:
        return _explained(document["error"]["field"], document["error"]["message"])
    if code != 0:
        return "failed", f"exit code {code}"
    return ("served", "") if _is_finite(document) else ("failed", "it plans with numbers that are not finite")


def _row_error(text: str) -> tuple[str, str]:
    """Weights that are numbers of no use end their requests, which is right; any other error of a row is a fault."""
    return ("refused", "") if "NaN" in text else ("failed", f"it loads and then fails: {text}")


def _explained(field: str | None, text: str) -> tuple[str, str]:
    if not field or "Traceback" in text or len(text) > LONGEST_ERROR:
        return "failed", f"refused without naming the field, or at too great length: {field}: {text[:300]}"
    return "refused", ""


def _is_finite(document: Any) -> bool:
    if isinstance(document, dict | list):
        return all(map(_is_finite, document.values() if isinstance(document, dict) else document))
    return not isinstance(document, float) or math.isfinite(document)


def main() -> None:
    """Until standard input ends."""
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE_BYTES, ADDRESS_SPACE_BYTES))
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints must not stand among the answers
    for line in sys.stdin:
        order = json.loads(line)
        try:
            verdict, reason = load(order["load"]) if "load" in order else plan(order["plan"])
        except BaseException as problem:
            verdict, reason = "failed", f"{type(problem).__name__}: {problem}"
        answers.write(json.dumps({"verdict": verdict, "reason": reason[:600]}) + "\n")


if __name__ == "__main__":
    main()
