"""Every kernel at every shape of its cases: right, how far from its floor, how it stands against its peers."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from tests.gpu.case import Bar, Case, Run, Size
from tests.gpu.ceilings import Ceilings
from tests.gpu.timing import seconds


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """A bar and what was reached; ``reached`` is None where it could not be measured."""

    of: str
    at_least: float
    value: float | None
    reached: bool | None


@dataclasses.dataclass(frozen=True, slots=True)
class Measurement:
    """What came of one case.

    Attributes:
        error: largest absolute difference from the reference, as a fraction of its largest value; None where the
            case has no reference (a smaller one covers it).
        right: ``error`` is within the case's tolerance; None without one.
        us: microseconds of one launch; None if it failed.
        floor_us: least time by the ceilings of this run.
        bandwidth: fraction of the measured copy bandwidth.
        flops: fraction of the measured matrix rate.
        peers_us: by name; None for one that failed.
        problem: why there is no measurement.
    """

    kernel: str
    label: str
    error: float | None = None
    tolerance: float | None = None
    right: bool | None = None
    us: float | None = None
    floor_us: float | None = None
    bandwidth: float | None = None
    flops: float | None = None
    peers_us: dict[str, float | None] = dataclasses.field(default_factory=dict)
    verdicts: tuple[Verdict, ...] = ()
    problem: str = ""


WAITING_CASES = "waiting_cases"


def case_modules(only: Sequence[str] = ()) -> list[str]:
    """``cases_<kernel>`` of every file in this folder, in alphabetical order.

    Args:
        only: beginnings of kernels' names; empty for all.
    """
    import tests.gpu

    found = (module.name for module in pkgutil.iter_modules(tests.gpu.__path__))
    names = sorted(name for name in found if name.startswith("cases_"))
    return [name for name in names if not only or name.removeprefix("cases_").startswith(tuple(only))]


def measure_all(
    device: torch.device,
    size: Size,
    ceilings: Ceilings,
    deadline: float,
    modules: Sequence[str],
    tell: Callable[[str], None],
) -> Iterator[Measurement]:
    """One measurement after another; a case that breaks says so and does not keep the others from theirs.

    Args:
        deadline: ``time.monotonic()`` after which no case is begun.
        modules: files of this folder with cases, see :func:`case_modules`.
        tell: progress in words.
    """
    for name in modules:
        tell(f"{name.removeprefix('cases_')} …")
        try:
            for case in importlib.import_module(f"tests.gpu.{name}").cases(device, size):
                if time.monotonic() > deadline:
                    yield Measurement(case.kernel, case.label, problem="no time left")
                    continue
                yield measure(case, device, ceilings)
        except Exception as raised:  # the making of a case: out of memory, a peer that torch lacks
            yield Measurement(name.removeprefix("cases_"), "making its cases", problem=_described(raised))
        if device.type == "cuda":
            torch.cuda.empty_cache()


def measure(case: Case, device: torch.device, ceilings: Ceilings) -> Measurement:
    """Check one case, then time it and its peers."""
    found = Measurement(case.kernel, case.label, tolerance=case.tolerance)
    try:
        error = None if case.reference is None else largest_error(_checked(case), case.reference)
        elapsed = seconds(case.run, device)
    except Exception as raised:  # a kernel that does not launch is a result, and the others still want theirs
        return dataclasses.replace(found, problem=_described(raised))
    floor = ceilings.floor_s(case.moved_bytes, case.flops, case.flop_unit)
    rate = ceilings.flops_s.get(case.flop_unit)
    found = dataclasses.replace(
        found,
        error=error,
        right=None if error is None else error <= case.tolerance,
        us=1e6 * elapsed,
        floor_us=None if floor is None else 1e6 * floor,
        bandwidth=case.moved_bytes / elapsed / ceilings.copy_bytes_s,
        flops=None if rate is None or not case.flops else case.flops / elapsed / rate,
        peers_us={name: _peer_us(peer, device) for name, peer in case.peers.items()},
    )
    return dataclasses.replace(found, verdicts=tuple(_judge(bar, found) for bar in case.bars))


def _checked(case: Case) -> Run:
    if case.result is None:
        return case.run
    result = case.result

    def run_and_read() -> torch.Tensor | tuple[torch.Tensor, ...] | None:
        case.run()
        return result()

    return run_and_read


def largest_error(run: Run, reference: Run) -> float:
    """Largest absolute difference over the reference's largest absolute value, the worst of several results.

    Token ids and counts (32 or 64 bits) must be equal: any difference is an infinite error. 8-bit ones are numbers.
    """
    worst = 0.0
    for ours, theirs in zip(_several(run()), _several(reference()), strict=True):
        if ours.shape != theirs.shape:
            return float("inf")
        if theirs.dtype in (torch.int32, torch.int64, torch.bool):
            worst = max(worst, 0.0 if torch.equal(ours, theirs) else float("inf"))
            continue
        if theirs.numel():
            difference = (ours.double() - theirs.double()).abs().max().item()
            scale = theirs.double().abs().max().item() or 1.0
            worst = max(worst, difference / scale if difference == difference else float("inf"))
    return worst


def _several(result: Any) -> tuple[torch.Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _peer_us(peer: Run, device: torch.device) -> float | None:
    try:
        return 1e6 * seconds(peer, device)
    except Exception:  # a peer that cannot run this shape is shown as a dash
        return None


def _judge(bar: Bar, found: Measurement) -> Verdict:
    if bar.of in ("bandwidth", "flops"):
        value = getattr(found, bar.of)
    else:
        theirs = found.peers_us.get(bar.of)
        value = None if theirs is None or not found.us else theirs / found.us
    return Verdict(bar.of, bar.at_least, value, None if value is None else value >= bar.at_least)


def _described(raised: BaseException) -> str:
    where = traceback.extract_tb(raised.__traceback__)[-1]
    lines = str(raised).strip().splitlines() or [""]
    return f"{type(raised).__name__}: {lines[0][:300]} ({where.name}, line {where.lineno})"
