"""The proof's document as tables: on the terminal, and in docs/benchmarks.md between its GPU marks.

python -m tests.gpu.table tests/benchmarks/results/<file>.json      # the page's section from saved results
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- gpu:begin -->", "<!-- gpu:end -->"
PAGE = Path(__file__).resolve().parents[2] / "docs" / "benchmarks.md"


def markdown(document: dict[str, Any]) -> str:
    """The page's section."""
    parts = [
        introduction(document),
        _table(KERNEL_COLUMNS, kernel_rows(document)),
        _table(ENGINE_COLUMNS, engine_rows(document)),
        _table(PARITY_COLUMNS, parity_rows(document)),
    ]
    return "\n\n".join(part for part in parts if part)


def introduction(document: dict[str, Any]) -> str:
    """Where and with what it was measured, and the ceilings."""
    ceilings, versions = document["ceilings"], document["versions"]
    rates = ", ".join(f"{name} {rate / 1e12:,.0f} TFLOP/s" for name, rate in ceilings["flops_s"].items())
    software = ", ".join(f"{name} {version}" for name, version in versions.items())
    return (
        f"Measured on {document['date'][:10]} with `python -m tests.gpu.run`: {document['device']}; {software}. "
        f"Ceilings of the same run: copy {ceilings['copy_bytes_s'] / 1e12:.2f} TB/s, {rates}. Launches are replayed "
        "from a CUDA graph with cold caches; medians."
    )


KERNEL_COLUMNS = ("kernel", "shape", "right", "µs", "floor µs", "of bandwidth", "of matrix rate", "peers µs", "bar")


def kernel_rows(document: dict[str, Any]) -> list[tuple[str, ...]]:
    """One row a case."""
    rows = []
    for item in document["kernels"]:
        peers = ", ".join(f"{name} {_number(us)}" for name, us in item["peers_us"].items())
        bars = ", ".join(_bar(verdict) for verdict in item["verdicts"])
        rows.append(
            (
                item["kernel"],
                item["label"],
                item["problem"] or _right(item["right"]),
                _number(item["us"]),
                _number(item["floor_us"]),
                _percent(item["bandwidth"]),
                _percent(item["flops"]),
                peers,
                bars,
            )
        )
    return rows


ENGINE_COLUMNS = ("engine", "setting", "at once", "step ms", "tokens/s", "floor ms", "of floor", "bar")


def engine_rows(document: dict[str, Any]) -> list[tuple[str, ...]]:
    """One row a setting and batch."""
    return [
        (
            item["engine"],
            item["setting"],
            str(item["batch"]),
            item["problem"] or _number(item["step_ms"]),
            _number(item["tokens_s"]),
            _number(item["floor_ms"]),
            _percent(item["of_floor"]),
            _bar(item["verdict"]) if item["verdict"] else "",
        )
        for item in document["engine"]
    ]


PARITY_COLUMNS = ("model", "setting", "tokens of transformers")


def parity_rows(document: dict[str, Any]) -> list[tuple[str, ...]]:
    """One row a model and setting."""
    words = {True: "equal", False: "DIFFERENT"}
    return [
        (item["model"], item["setting"], item["problem"] or words.get(item["equal"], "–"))
        for item in document["parity"]
    ]


def failures(document: dict[str, Any]) -> list[str]:
    """What is wrong (not what is slow): kernels off their reference or broken, engines with other tokens."""
    found = [f"{item['kernel']}, {item['label']}: {item['problem']}" for item in document["kernels"] if item["problem"]]
    found += [
        f"{item['kernel']}, {item['label']}: off by {item['error']:.2g}, allowed {item['tolerance']:.2g}"
        for item in document["kernels"]
        if item["right"] is False
    ]
    found += [
        f"{item['model']}, {item['setting']}: {item['problem'] or 'other tokens'}"
        for item in document["parity"]
        if item["equal"] is not True
    ]
    return found + [f"{i['engine']}, {i['setting']}: {i['problem']}" for i in document["engine"] if i["problem"]]


def text(document: dict[str, Any]) -> str:
    """For the terminal."""
    tables = (
        (KERNEL_COLUMNS, kernel_rows(document)),
        (ENGINE_COLUMNS, engine_rows(document)),
        (PARITY_COLUMNS, parity_rows(document)),
    )
    return "\n\n".join([introduction(document), *(_aligned(columns, rows) for columns, rows in tables if rows)])


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in rows]
    return "\n".join(["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns), *lines]) if lines else ""


def _aligned(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[index]) for row in (columns, *rows)) for index in range(len(columns))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (columns, *rows)
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


def _right(right: bool | None) -> str:
    return {True: "yes", False: "NO", None: "not compared"}[right]


def _bar(verdict: dict[str, Any]) -> str:
    fraction = verdict["of"] in ("bandwidth", "flops", "floor")
    value, least = verdict["value"], verdict["at_least"]
    shown = "–" if value is None else f"{100 * value:.0f} %" if fraction else f"{value:.2f} ×"
    bar = f"{100 * least:.0f} %" if fraction else f"{least:g} ×"
    words = {True: "reached", False: "not reached", None: "not measured"}[verdict["reached"]]
    return f"{shown} of {verdict['of']} (≥ {bar}: {words})"


def main() -> None:
    """Write the page's section from a saved document."""
    from tests.benchmarks.report import replace_between

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("results", type=Path)
    replace_between(PAGE, BEGIN, END, markdown(json.loads(parser.parse_args().results.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
