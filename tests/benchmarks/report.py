"""Results on disk and as tables: pure rendering of the document that ``run`` makes.

python -m tests.benchmarks.report tests/benchmarks/results/<file>.json      # the tables of saved results
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from tests.benchmarks.bars import BEST, HEAD_AS_STORED, PLAIN, best, median
from tests.benchmarks.settings import ENGINES, OURS, assignments, is_reference

BEGIN, END = "<!-- benchmark:begin -->", "<!-- benchmark:end -->"
METRIC_NAMES = {
    "output_tokens_s": "output tokens/s",
    "decode_tokens_s": "decode tokens/s",
    "prefill_tokens_s": "prefill tokens/s",
    "ttft_ms_p50": "TTFT p50",
}
COLUMNS = ("output_tokens_s", "decode_tokens_s", "prefill_tokens_s", "ttft_ms_p50", "ttft_ms_p95", "tpot_ms_p50")
CHOICE = {"d": "ttft_ms_p50", "p512": "prefill_tokens_s", "p2048": "prefill_tokens_s"}
"""By which metric the best setting of an engine is chosen, where it is not output tokens/s."""


def save(document: dict[str, Any], folder: Path) -> Path:
    """Write the JSON under its day and machine; a second run on the same day replaces the first."""
    machine = document["hardware"]
    slug = re.sub(r"[^a-z0-9]+", "-", f"{machine['cpu']} {machine['cores_usable']} cores".lower()).strip("-")
    device = "" if document["device"] == "cpu" else f"-{document['device']}"
    path = folder / f"{document['date'][:10]}-{slug}{device}-{machine['host_hash'][:6]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def replace_between(page: Path, begin_mark: str, end_mark: str, text: str) -> None:
    """Replace what stands between two marks of a file.

    Raises:
        ValueError: if the marks are not there, once each and in order.
    """
    whole = page.read_text(encoding="utf-8")
    try:
        page.write_text(with_text_between(whole, begin_mark, end_mark, text), encoding="utf-8")
    except ValueError as error:
        raise ValueError(f"{page}: {error}") from error


def with_text_between(whole: str, begin_mark: str, end_mark: str, text: str) -> str:
    """The text with what stands between the two marks replaced.

    Raises:
        ValueError: if the marks are not there, once each and in order.
    """
    before, begin, rest = whole.partition(begin_mark)
    _, end, after = rest.partition(end_mark)
    if not begin or not end or begin_mark in after or end_mark in after:
        raise ValueError(f"{begin_mark} and {end_mark} are needed, once each")
    return f"{before}{begin_mark}\n{text.strip()}\n{end_mark}{after}"


def markdown(document: dict[str, Any]) -> str:
    """The section of a run: how it was measured, the bars, the figures, the floors."""
    parts = [_introduction(document), _bars(document), _figures(document), _quality_note(document)]
    parts += [_footnotes(document), _missed(document)]
    return "\n\n".join(part for part in parts if part)


def _introduction(document: dict[str, Any]) -> str:
    machine, repeats = document["hardware"], document["repeats"]
    how = (
        "one repeat, so no interval: read the ratios as a first look"
        if repeats == 1
        else f"medians of {repeats} interleaved repeats in random order, 95 % bootstrap intervals"
    )
    engines = ", ".join(f"{name} {version}" for name, version in _engine_versions(document).items())
    threads = f"{document['threads']} thread{'s' if document['threads'] > 1 else ''}"
    lines = [
        f"Measured side by side in one run on {document['date'][:10]} with `make bench`: {document['model']}, "
        f"{machine['cpu']}, {machine['cores_usable']} cores ({machine['cpu_capability']}), {threads} for everybody; "
        f"{engines}; {how}. The same prompts (token ids), output lengths and arrivals for every engine, each in a "
        "process of its own, at the best of its settings; latencies include queueing. A setting is named by every "
        f"knob that differs from the defaults{_shared(document)}. All figures: `tests/benchmarks/results/`."
    ]
    notes = [*document["warnings"], *(f"{name} is missing: {why}" for name, why in document["missing"].items())]
    if document["quick"]:
        notes.insert(0, "quick run of at most 16 requests and an eighth of their output: not the benchmark")
    return "\n".join([*lines, *(f"\n**{note[0].upper()}{note[1:]}.**" for note in notes)])


def _engine_versions(document: dict[str, Any]) -> dict[str, str]:
    packages = {name: engine.package for name, engine in ENGINES.items() if engine.package}
    found = {"torch": document["versions"]["torch"]}
    for name, engine in document["engines"].items():
        package = next((pack for peer, pack in packages.items() if name.startswith(f"{peer} ")), None)
        if package in engine["versions"]:
            found[package] = engine["versions"][package]
    return found


def _shared(document: dict[str, Any]) -> str:
    knobs = document.get("shared_knobs")
    return f"; ours have in common {assignments(knobs)}" if knobs else ""


def _bars(document: dict[str, Any]) -> str:
    if not document["bars"]:
        return ""
    lines = [
        "| workload | metric | ours | quality cost of ours | against | ratio | bar | |",
        "|---|---|---|---|---|---:|---:|---|",
    ]
    for bar in document["bars"]:
        title = document["workloads"][bar["workload"]]["title"]
        ours = _value_and_setting(bar["ours"], bar["ours_setting"], bar["ours_label"])
        theirs = _value_and_setting(bar["theirs"], bar["theirs_setting"], bar["theirs_label"])
        verdict = {True: "reached", False: "not reached", None: "not measured"}[bar["reached"]]
        metric = METRIC_NAMES[bar["metric"]]
        metric += "" if bar["ours_label"] == BEST.label else f"; {bar['ours_label']}"
        cost = _quality_cost(document, bar["workload"], bar["ours_setting"])
        ratio = f"{_ratio(bar)} | ≥ {bar['factor']:g}"
        lines.append(f"| {title} | {metric} | {ours} | {cost} | {theirs} | {ratio} | {verdict} |")
    return "\n".join(lines)


def _quality_cost(document: dict[str, Any], workload: str, setting: str) -> str:
    """In one cell: what our setting of a bar costs, against the reference that the footnote names."""
    row = next((row for row in document["rows"] if _is_of(row, workload, OURS, "") and row["setting"] == setting), None)
    cells = _quality_cells(row) if row else ("", "", "")
    if not cells[0]:
        return "not measured"
    if row is not None and is_reference(row["options"]):
        return f"none: perplexity {cells[0]}"
    return f"perplexity {cells[0]}, KL {cells[1]}, same top {cells[2]}"


def _quality_cells(row: dict[str, Any]) -> tuple[str, str, str]:
    """Perplexity, mean KL, same top token; empty where they were not measured."""
    found = row.get("quality")
    if not found:
        return "", "", ""
    return f"{found['perplexity']:.2f}", f"{found['kl_mean']:.4f}", f"{found['same_top_percent']:.1f} %"


def _quality_note(document: dict[str, Any]) -> str:
    quality = document.get("quality")
    if not quality:
        return ""
    figures = next(iter(quality["figures"].values()))  # the reference is measured first
    return (
        f"Quality: {figures['tokens']} tokens of the bundled text, measured in the same run with exactly the knobs of "
        "the row (but for the execution mode, which moves it by rounding only). Reference: "
        f"{quality['reference']}, perplexity {figures['perplexity']:.2f} ± {figures['perplexity_se']:.2f}; KL in nats. "
        "What peers lose by 8-bit activations or caches of their own is not measured."
    )


def _value_and_setting(value: float | None, setting: str, label: str) -> str:
    return f"{label}: –" if value is None else f"{number(value)} ({setting})"


def _ratio(bar: dict[str, Any]) -> str:
    if bar["ratio"] is None:
        return "–"
    interval = "" if bar["low"] is None else f" ({bar['low']:.2f}–{bar['high']:.2f})"
    return f"{bar['ratio']:.2f}{interval}"


def _figures(document: dict[str, Any]) -> str:
    """The best settings of each engine and variant, workload by workload."""
    lines = [
        "| workload | engine (setting) | output tokens/s | decode tokens/s | prefill tokens/s | TTFT p50 ms | "
        "TTFT p95 ms | TPOT p50 ms | perplexity | mean KL | same top |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for key, workload in document["workloads"].items():
        title = workload["title"]
        for engine, variant in _groups(document, key):
            here = [row for row in document["rows"] if _is_of(row, key, engine, variant)]
            rows = _best_rows(here, key)
            if not rows:
                reason = next((error for item in here for error in item["errors"]), "not measured")
                lines.append(f"| {title} | {engine} {variant}".rstrip() + f" | {reason[:120]} |" + " |" * 8)
            for row in rows:
                mark = " *" if _is_disturbed(row, document) else ""
                values = " | ".join([*(_shown(median(row, metric)) for metric in COLUMNS), *_quality_cells(row)])
                lines.append(f"| {title} | {_full_name(row)}{mark} | {values} |")
                title = ""
            title = ""
    return "\n".join(lines)


def _best_rows(rows: list[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    """Of a peer its best; of ours also the best with the head as stored, and the best without quantization."""
    metric = CHOICE.get(key, "output_tokens_s")
    ours = bool(rows) and rows[0]["engine"] == OURS and not rows[0]["variant"]
    groups = [rows, *([row for row in rows if side.matches(row)] for side in (HEAD_AS_STORED, PLAIN) if ours)]
    found = [row for group in groups if (row := best(group, metric)) is not None]
    return list({row["setting"]: row for row in found}.values())


def _full_name(row: dict[str, Any]) -> str:
    return f"{row['engine']} ({', '.join(part for part in (row['setting'], row['variant']) if part)})"


def _groups(document: dict[str, Any], key: str) -> list[tuple[str, str]]:
    found = [(row["engine"], row["variant"]) for row in document["rows"] if row["workload"] == key]
    return list(dict.fromkeys(found))


def _is_of(row: dict[str, Any], key: str, engine: str, variant: str) -> bool:
    return (row["workload"], row["engine"], row["variant"]) == (key, engine, variant)


def _is_disturbed(row: dict[str, Any], document: dict[str, Any]) -> bool:
    return any(share is not None and share > document["disturbed_above_share"] for share in row["others_share"])


def _footnotes(document: dict[str, Any]) -> str:
    if not any(_is_disturbed(row, document) for row in document["rows"]):
        return ""
    share = document["disturbed_above_share"]
    return (
        f"\\* other processes took more than {share:.0%} of the machine in at least one repeat: not a fair figure, "
        "measure again on a quiet machine."
    )


def _missed(document: dict[str, Any]) -> str:
    """For each bar that was not reached: what the machine's own floor is, beside what was measured."""
    lines = []
    for bar in document["bars"]:
        if bar["reached"] is not False:
            continue
        row = next(
            row
            for row in document["rows"]
            if _is_of(row, bar["workload"], "headroom", "") and row["setting"] == bar["ours_setting"]
        )
        seconds = median(row, "duration_s")
        if row.get("floor") is None or seconds is None:
            continue
        ideal = row["floor"]
        bound = {"bytes": "bytes over bandwidth", "flops": "FLOPs over peak"}
        parts = [
            f"{part} {number(ideal[f'{part}_s'] * 1e3)}, {bound[ideal[f'{part}_bound']]}"
            for part in ("prefill", "decode")
            if ideal[f"{part}_s"] > 0
        ]
        lines.append(
            f"* {document['workloads'][bar['workload']]['title']}, {row['setting']}, against {bar['theirs_label']}: "
            f"measured {number(seconds * 1e3)} ms, floor {number(ideal['total_s'] * 1e3)} ms "
            f"({'; '.join(parts)})"
        )
    rates = document["machine_rates"]
    if not lines:
        return ""
    peaks = ", ".join(f"{dtype} {max(by.values()) / 1e9:.0f} GFLOP/s" for dtype, by in rates["gemm_flops_s"].items())
    head = (
        f"Where a bar is not reached, the time of the whole run next to the floor of this machine (copy "
        f"{rates['copy_bytes_s'] / 1e9:.1f} GB/s, read {rates['read_bytes_s'] / 1e9:.1f} GB/s, {peaks}; an ideal "
        "schedule, all prompts first, without any overhead):"
    )
    return "\n".join([head, "", *dict.fromkeys(lines)])


def number(value: float) -> str:
    """Three significant digits, without exponents.

    >>> number(1234.5), number(56.78), number(0.9876)
    ('1,234', '56.8', '0.988')
    """
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"


def _shown(value: float | None) -> str:
    return "" if value is None else number(value)


def main() -> None:
    """Print the tables of saved results."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("results", type=Path)
    print(markdown(json.loads(parser.parse_args().results.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
