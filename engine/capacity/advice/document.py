"""A plan as a document: JSON, Markdown, YAML; and two plans side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from engine.capacity.advice.deployment import Deployment, deployment_dict
from engine.capacity.advice.launch import launch_commands

#: What people compare: (label, path in the document, format, True if more is better).
FIGURES: tuple[tuple[str, tuple[str, ...], str, bool | None], ...] = (
    ("GPUs", ("gpus",), "{:,.0f}", False),
    ("weights a GPU, GiB", ("memory", "weights_gib"), "{:,.2f}", False),
    ("KV cache a GPU, GiB", ("memory", "kv_gib"), "{:,.2f}", True),
    ("KV tokens", ("memory", "kv_tokens"), "{:,.0f}", True),
    ("requests at once", ("limits", "max_concurrency"), "{:,.0f}", True),
    ("longest context, tokens", ("limits", "max_context"), "{:,.0f}", True),
    ("TTFT p95, ms", ("latency", "ttft_p95_ms"), "{:,.0f}", False),
    ("TPOT, ms", ("latency", "tpot_ms"), "{:,.1f}", False),
    ("output tokens/s", ("latency", "output_tokens_s"), "{:,.0f}", True),
    ("largest rate within the objectives, 1/s", ("limits", "max_rate_within_slo"), "{:,.2f}", True),
    ("$ an hour", ("cost", "per_hour"), "{:,.2f}", False),
    ("$ a million output tokens", ("cost", "per_million_output_tokens"), "{:,.3f}", False),
    ("kWh a million output tokens", ("cost", "kwh_per_million_output_tokens"), "{:,.3f}", False),
)


def plan_document(answer: Deployment, name: str = "") -> dict[str, Any]:
    """Everything of a plan, with its name and launch commands. All values are JSON's."""
    commands = launch_commands(answer.plan.request, answer.workload)
    return {
        "name": name or f"{answer.plan.request.spec.name} on {answer.plan.request.gpu.name}",
        "gpus": answer.plan.request.gpus,
        **deployment_dict(answer),
        "launch": {item.engine: item.command for item in commands},
    }


def as_json(document: Mapping[str, Any]) -> str:
    """Indented JSON."""
    return json.dumps(document, indent=2, allow_nan=False) + "\n"


def as_yaml(document: Mapping[str, Any]) -> str:
    """YAML, keys in the order of the document."""
    import yaml  # type: ignore[import-untyped]

    return str(yaml.safe_dump(json.loads(as_json(document)), sort_keys=False, allow_unicode=True))


def as_markdown(document: Mapping[str, Any]) -> str:
    """A page for a ticket or a wiki: figures, commands, warnings, assumptions.

    >>> as_markdown({"name": "Plan A", "gpus": 2, "fits": True}).splitlines()[0]
    '# Plan A'
    """
    fits = "The goal fits." if document.get("fits") else "The goal does not fit."
    lines = [f"# {document.get('name', 'Plan')}", "", fits, "", "| figure | value |", "|---|---:|"]
    lines += [f"| {label} | {value} |" for label, value in figures(document).items()]
    for engine, command in document.get("launch", {}).items():
        lines += ["", f"## {engine}", "", "```", command, "```"]
    for title in ("warnings", "assumptions"):
        entries = document.get(title, [])
        lines += ["", f"## {title.capitalize()}", "", *(f"- {entry}" for entry in entries)] if entries else []
    return "\n".join(lines) + "\n"


def figures(document: Mapping[str, Any]) -> dict[str, str]:
    """``{label: value}`` of the figures that the document has.

    >>> figures({"gpus": 2, "memory": {"kv_tokens": 475888}})
    {'GPUs': '2', 'KV tokens': '475,888'}
    """
    found = {label: (_at(document, path), form) for label, path, form, _ in FIGURES}
    return {label: form.format(value) for label, (value, form) in found.items() if value is not None}


def compare_documents(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows ``figure``, ``first``, ``second``, ``change`` (second over first - 1, None if unknown), ``better`` (True if
    the second is, None if neither).

    >>> compare_documents({"gpus": 4}, {"gpus": 2})
    [{'figure': 'GPUs', 'first': '4', 'second': '2', 'change': -0.5, 'better': True}]
    """
    rows = []
    for label, path, form, more in FIGURES:
        left, right = _at(first, path), _at(second, path)
        if left is None and right is None:
            continue
        change = right / left - 1.0 if left and right is not None else None
        better = None if not change or more is None else (change > 0) == more
        texts = ["–" if value is None else form.format(value) for value in (left, right)]
        rows.append({"figure": label, "first": texts[0], "second": texts[1], "change": change, "better": better})
    return rows


def _at(document: Mapping[str, Any], path: tuple[str, ...]) -> float | None:
    value: Any = document
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
