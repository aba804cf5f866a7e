"""The reference pages that follow from the code: ``python -m tests.docs.reference`` writes them into ``docs/api``.

Command line from typer's own description, routes from FastAPI's, knobs from the schema, metrics from the module that
gives them. ``test_reference.py`` fails while a committed page differs from what stands in the code.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer

ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT / "docs" / "api"
NOTE = "<!-- Written by `make reference`; changes by hand are lost. -->"


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table; bars and line ends inside of cells do not break it."""
    lines = [_row(head), _row(("---",) * len(head)), *map(_row, rows)]
    return "\n".join(lines)


def _row(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |"


def code(text: str) -> str:
    """Text as inline code, nothing as nothing."""
    return f"`{text}`" if text else ""


# -- command line ----------------------------------------------------------------------------------------------


def command_line() -> str:
    """Every command of ``headroom``, those of its history included."""
    from engine.cli.app import command_line as engine
    from storage.cli import app as storage

    parts = [
        NOTE,
        "# Command line",
        "Which commands are there, and which options do they take?",
        "`headroom` is the command of an installation; in a checkout `python -m engine` is the same (and `python -m "
        "storage` is `headroom history`). With `--json` standard output holds one JSON document and nothing else; an "
        'error is `{"error": {"message", "field", "remedy"}}`.',
        "Exit codes: 0 done; 1 failed; 2 wrong input; 130 interrupted.",
        "`headroom --version` prints the version; `headroom --install-completion` completes commands in your shell.",
        *_commands("headroom", typer.main.get_command(engine(completion=True))),
        *_commands("headroom history", typer.main.get_command(storage)),
    ]
    return "\n\n".join(parts) + "\n"


def _commands(program: str, group: Any) -> Iterator[str]:
    for name, command in group.commands.items():
        if command.hidden or name == "history":  # its own commands follow
            continue
        arguments = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
        options = [parameter for parameter in command.params if parameter not in arguments and not parameter.hidden]
        usage = "".join(f" {_argument(argument)}" for argument in arguments) + (" [OPTIONS]" if options else "")
        yield f"## {program} {name}"
        yield f"```\n{program} {name}{usage}\n```"
        yield "\n\n".join(" ".join(part.split()) for part in (command.help or "").split("\n\n"))
        if arguments:
            rows = [(code(argument.name.upper()), argument.help or "", _default(argument)) for argument in arguments]
            yield table(("argument", "meaning", "default"), rows)
        if options:
            rows = [(_flags(option), _meaning(option), _default(option)) for option in options]
            yield table(("option", "meaning", "default"), rows)


def _argument(argument: Any) -> str:
    return argument.name.upper() if argument.required else f"[{argument.name.upper()}]"


def _flags(option: Any) -> str:
    value = "" if option.is_flag else f" {option.metavar or 'VALUE'}"
    flags = ", ".join(option.opts) + (f" / {', '.join(option.secondary_opts)}" if option.secondary_opts else "")
    return code(flags + value)


def _meaning(option: Any) -> str:
    variable = f" Variable: `{option.envvar}`." if option.envvar else ""
    return (option.help or "") + variable


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    value = parameter.default
    if value is None or value is False or callable(value) or value == ():
        return ""
    return code("on" if value is True else str(getattr(value, "value", value)))


# -- HTTP ------------------------------------------------------------------------------------------------------

# What each route is for, in one sentence. A route without one fails the test.
ROUTES = {
    "GET /health": "State of the worker: 200 when ready, 503 while loading, failed or shutting down. Needs no key.",
    "GET /metrics": "Prometheus metrics, see [Metrics](metrics.md).",
    "GET /v1/models": "The model under each of its names, with `max_model_len`.",
    "POST /v1/completions": "OpenAI completions, streamed on request.",
    "POST /v1/chat/completions": "OpenAI chat completions, streamed on request.",
    "GET /admin/status": "What really runs: load state, engine status, newest telemetry sample.",
    "GET /admin/config": "The current knobs, their hash, and the schema of every knob.",
    "PATCH /admin/config": "Change knobs: a JSON object of names and values, all of them or none.",
    "GET /admin/series": "Steps and events numbered above `steps_since` and `events_since`.",
    "POST /admin/load": "Load a model in the background: a JSON object of knobs.",
    "POST /admin/reset_prefix_cache": "Forget every known prefix.",
    "POST /admin/resize": "Let the KV cache take the memory that lighter weights have left.",
    "GET /admin/workloads": "The bundled workloads.",
    "POST /admin/runs": "Start a measured run, or a comparison of two settings.",
    "GET /admin/runs/{job_id}": "How far a run is, and its results.",
    "DELETE /admin/runs/{job_id}": "Cancel a run.",
    "GET /admin/telemetry": "Samples of process, machine and GPUs above `since`; a quarter of an hour is kept.",
    "POST /admin/shutdown": "End the worker: answers in progress are drained first.",
}


def http() -> str:
    """Every route of the worker, and the bodies that have a schema."""
    parts = [
        NOTE,
        "# HTTP API",
        "Which routes does the worker answer, and what do they take?",
        "The worker's. `/v1` is the OpenAI API with vLLM's extra fields and asks for a key where one is set; `/admin` "
        "asks for the admin token (`Authorization: Bearer …`). `force=true` does what a run in progress would forbid, "
        "and marks that run as disturbed. [Security](../security.md) says who is answered at all.",
        table(("route", "what it does", "query"), [_route(*route) for route in routes()]),
        'Errors of `/admin` are `{"error": {"message", "field", "remedy"}}`, all others have OpenAI\'s form. 400 is a '
        "request that is wrong, 401 or 403 a token that is missing or wrong; 503 comes with `Retry-After`.",
        table(("status", "when"), _errors()),
        *_bodies(),
    ]
    return "\n\n".join(parts) + "\n"


def routes() -> list[tuple[str, str, dict[str, Any]]]:
    """(method, path, OpenAPI operation) of each route, in the order in which they are declared."""
    from engine.server.app import create_app

    app = create_app(None, admin_token="reference")
    document = app.openapi()
    app.state.host.close()
    return [
        (method.upper(), path, operation)
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    ]


def _route(method: str, path: str, operation: dict[str, Any]) -> tuple[str, str, str]:
    name = f"{method} {path}"
    query = [parameter["name"] for parameter in operation.get("parameters", ()) if parameter["in"] == "query"]
    return code(name), ROUTES.get(name, ""), ", ".join(map(code, query))


def _errors() -> list[tuple[str, ...]]:
    """(status, what it means) of each error that has a status of its own, from the classes' own first sentences."""
    from engine.errors import HeadroomError
    from engine.server.answers import _STATUS

    known: dict[str, type[HeadroomError]] = {}
    to_visit: list[type[HeadroomError]] = [HeadroomError]
    while to_visit:
        kind = to_visit.pop()
        known[kind.__name__] = kind
        to_visit += kind.__subclasses__()
    rows = [(str(status), (known[name].__doc__ or "").partition("\n")[0]) for name, status in _STATUS.items()]
    return sorted((status, text.replace(f" ({status})", "")) for status, text in rows)


def _bodies() -> Iterator[str]:
    from engine.server.schemas import ChatRequest, CompletionRequest, RunBody

    titles = {
        "POST /v1/completions": CompletionRequest,
        "POST /v1/chat/completions": ChatRequest,
        "POST /admin/runs": RunBody,
    }
    for title, body in titles.items():
        yield f"## Body of {title}"
        yield table(("field", "type", "default"), [_field(name, field) for name, field in body.model_fields.items()])
    yield (
        "Unknown fields are refused. These fields of the OpenAI API are accepted and have no effect on one local "
        f"model, or only with their neutral value: {_accepted()}."
    )


def _field(name: str, field: Any) -> tuple[str, str, str]:
    from pydantic_core import PydanticUndefined

    default = field.default_factory() if field.default_factory else field.default
    return (
        code(name),
        code(_type(field.annotation)),
        "required" if default is PydanticUndefined else code("null" if default is None else str(default)),
    )


def _type(annotation: Any) -> str:
    """A type as a reader of JSON thinks of it: without modules and without what pydantic notes beside it."""
    import types
    import typing

    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type(inner[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if member is type(None) else _type(member) for member in inner)
    if origin is list:
        return f"list of {_type(inner[0])}"
    if origin is dict:
        return "object"
    return "any" if annotation is Any else getattr(annotation, "__name__", str(annotation))


def _accepted() -> str:
    from engine.server import schemas

    return ", ".join(code(name) for name in (*schemas._IGNORED, *schemas._NEUTRAL))


# -- knobs -----------------------------------------------------------------------------------------------------


def knobs() -> str:
    """Every knob with its values, grouped as the Live page has them."""
    from engine.config import knobs as all_knobs

    parts = [
        NOTE,
        "# Knobs",
        "Which settings does the engine have, and when does a change take effect?",
        "Names and values are the same on the Live page, for `--set knob=value`, in HTTP and in the record; the "
        "default is bold. *live* takes effect at the next step; *swap* pauses between two steps; *reload* loads the "
        "model again. *lossy* may change the tokens.",
    ]
    for group in dict.fromkeys(knob.group for knob in all_knobs()):
        rows = [
            (code(knob.name), _values(knob), knob.tier + ("" if knob.lossless else ", lossy"), knob.help)
            for knob in all_knobs()
            if knob.group == group
        ]
        parts += [f"## {group}", table(("knob", "values", "change", "meaning"), rows)]
    return "\n\n".join(parts) + "\n"


def _values(knob: Any) -> str:
    default = f"**{code(_shown(knob.default))}**"
    if knob.choices or knob.kind == "bool":
        choices = knob.choices or ("on", "off")
        return ", ".join(default if choice == _shown(knob.default) else code(choice) for choice in choices)
    if knob.minimum is None:
        return f"a text, {default}"
    return f"{knob.minimum:g} to {knob.maximum:,.10g} {knob.unit}".strip() + f", {default}"


def _shown(value: Any) -> str:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else "auto" if value is None else str(value)


# -- metrics ---------------------------------------------------------------------------------------------------

PREFIXES = ("vllm:", "headroom:", "DCGM_")
SUFFIX = {"counter": "_total", "histogram": "_bucket, _sum, _count"}


def metrics() -> str:
    """Every metric that ``engine/server/metrics.py`` names, with its kind and help."""
    rows = [
        (code(name), kind, " ".join(map(code, SUFFIX.get(kind, "").split(", "))), text)
        for name, kind, text in sorted(named_metrics())
    ]
    parts = [
        NOTE,
        "# Metrics",
        "What can Prometheus scrape?",
        "`GET /metrics` of the worker, for Prometheus. Names are vLLM's where vLLM has the same metric and DCGM's for "
        "GPUs, so that their dashboards work; others begin with `headroom:`. Metrics of the process "
        "(`process_resident_memory_bytes` …) are prometheus-client's. A reading that is unavailable is left out.",
        table(("metric", "kind", "scraped with", "meaning"), rows),
    ]
    return "\n\n".join(parts) + "\n"


def named_metrics() -> set[tuple[str, str, str]]:
    """(name, kind, help): every call and every row of a table in the module that begins with a metric's name."""
    tree = ast.parse((ROOT / "engine" / "server" / "metrics.py").read_text(encoding="utf-8"))
    totals = {
        id(node)
        for assignment in ast.walk(tree)
        if isinstance(assignment, ast.Assign) and ast.unparse(assignment.targets[0]) == "_TOTALS"
        for node in ast.walk(assignment)
    }
    names = {  # a metric's help may stand under a name of its own
        node.targets[0].id: node.value.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Constant)
    }
    found = set()
    for node in ast.walk(tree):
        items = node.args if isinstance(node, ast.Call) else node.elts if isinstance(node, ast.Tuple) else []
        values = [names.get(item.id) if isinstance(item, ast.Name) else getattr(item, "value", None) for item in items]
        if not values or not isinstance(values[0], str) or not values[0].startswith(PREFIXES):
            continue
        texts = [value for value in values[1:] if isinstance(value, str) and value.endswith(".")]
        called = ast.unparse(node.func) if isinstance(node, ast.Call) else "Counter" if id(node) in totals else "Gauge"
        kind = next(kind for kind in ("histogram", "counter", "gauge") if kind in called.lower())
        found.add((values[0], kind, texts[0] if texts else ""))
    return found


PAGE_MAKERS: dict[str, Callable[[], str]] = {
    "command-line.md": command_line,
    "http.md": http,
    "knobs.md": knobs,
    "metrics.md": metrics,
}


def main() -> None:
    """Write every page."""
    PAGES.mkdir(parents=True, exist_ok=True)
    for name, make in PAGE_MAKERS.items():
        (PAGES / name).write_text(make(), encoding="utf-8")
        print(f"written: docs/api/{name}")


if __name__ == "__main__":
    main()
