"""``python -m engine``: fetch a model, serve it, generate with it, plan its memory, measure it.

Results go to standard output, everything else to standard error. With ``--json`` standard output holds exactly one
JSON document, in case of an error ``{"error": {"message", "field", "remedy"}}``.

Exit codes: 0 done; 1 something failed that is not the caller's to mend, or a run that failed or was not recorded;
2 wrong input; 130 interrupted.

Whatever takes long to import (torch, transformers) is imported by the command that needs it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer
from typer.exceptions import TyperException

from engine.cli import console
from engine.cli.plan import plan
from engine.config import EngineConfig, knob, parse_assignments
from engine.errors import ConfigError, HeadroomError, RequestError
from engine.server.limits import ServerLimits, with_limit_options

if TYPE_CHECKING:
    from engine.core import Engine
    from engine.measure.results import RunResult
    from engine.outputs import RequestOutput, RequestTimes
    from engine.sampling.params import SamplingParams

PROGRAM = "python -m engine"
DEFAULT_MODEL = knob("model").default
DEFAULT_MAX_TOKENS = 128
MAX_WHOLE = 2**31 - 1
FAILED, WRONG_INPUT, INTERRUPTED = 1, 2, 130

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output and nothing else.")]
ModelName = Annotated[
    str | None,
    typer.Option(
        "--model", "-m", help=f"{DEFAULT_MODEL} (default), a folder of safetensors, a .gguf file, or a hub id."
    ),
]
ComputeDtype = Annotated[
    str | None, typer.Option("--dtype", help="Compute dtype: auto (default), float32, bfloat16 or float16.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KNOB=VALUE", help="Set a knob of the engine; may be given several times."),
]


@app.callback()
def _root() -> None:
    """Headroom's inference engine: fetch a model, serve it, generate with it, plan its memory, measure it."""


# -- fetch ---------------------------------------------------------------------------------------------------


@app.command()
def fetch(
    model: Annotated[str, typer.Argument(help="smollm2-135m, a hub id, or a local path to check.")] = DEFAULT_MODEL,
    as_json: AsJson = False,
) -> None:
    """Make sure that a model is on this machine, complete and verified."""
    with console.standard_output() as out:
        with console.progress_bar() as report:
            from engine.models import resolve

            checkpoint = resolve(model, report)
            sha256 = checkpoint.fingerprint()
        path = str(checkpoint.path)
        if as_json:
            console.write_json(out, {"model": model, "path": path, "source": checkpoint.source, "sha256": sha256})
        else:
            print(f"{model}: {path}", file=out)


# -- serve ---------------------------------------------------------------------------------------------------


@app.command()
@with_limit_options
def serve(
    model: ModelName = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8000,
    settings: Settings = None,
    dtype: ComputeDtype = None,
    parent_pid: Annotated[
        int | None, typer.Option(min=1, max=2**31 - 1, help="Exit once the process of this id is no longer the parent.")
    ] = None,
    ready_file: Annotated[
        Path | None, typer.Option(help="File that is written once the server listens: its port and pid, JSON.")
    ] = None,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(help="What the model is called in the API instead of its own name; may be given several times."),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            help="Key that /v1 asks for. Better set HEADROOM_API_KEY: every user of the machine can read arguments."
        ),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(help="Host that requests may be for, besides this machine's own; * is any. Several are possible."),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(help="Origin whose web pages may use /v1; * is any. May be given several times. Default: none."),
    ] = None,
    **limits: Any,
) -> None:
    """Serve a model over HTTP (OpenAI API, health, metrics, administration) until interrupted.

    Administration needs a token: that of the environment variable HEADROOM_ADMIN_TOKEN, or a fresh one that is shown on
    standard error. Each limit may also be set as an environment variable, e.g. HEADROOM_MAX_BODY_BYTES.
    """
    accepted = ServerLimits(**limits)
    config = _engine_config(model, dtype, settings)
    from engine.server.run import door_settings
    from engine.server.run import serve as serve_http

    door = door_settings(
        host,
        hosts=allowed_host or (),
        api_key=api_key,
        cors_origins=cors_origin or (),
        served_names=served_model_name or (),
    )
    token = os.environ.get("HEADROOM_ADMIN_TOKEN") or None
    serve_http(
        config,
        host=host,
        port=port,
        admin_token=token,
        parent_pid=parent_pid,
        ready_file=ready_file,
        limits=accepted,
        door=door,
    )


@app.command()
def reset_prefix_cache(
    url: Annotated[str, typer.Option(help="Address of the worker.")] = "http://127.0.0.1:8000",
    as_json: AsJson = False,
) -> None:
    """Make a running worker forget its reusable prefixes; needs its token in HEADROOM_ADMIN_TOKEN."""
    from engine.worker.client import EngineClient

    with console.standard_output() as out:
        client = EngineClient(url, os.environ.get("HEADROOM_ADMIN_TOKEN", ""))
        try:
            blocks = client.reset_prefix_cache()
        finally:
            client.close()
        if as_json:
            console.write_json(out, {"blocks": blocks})
        else:
            print(f"{blocks:,} blocks forgotten", file=out)


# -- generate ------------------------------------------------------------------------------------------------


@app.command()
def generate(
    model: ModelName = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="The text to go on from.")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="UTF-8 file with the prompt, taken as it is; - reads standard input.")
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            max=MAX_WHOLE, help=f"Most output tokens. Default: {DEFAULT_MAX_TOKENS}, less where the context is shorter."
        ),
    ] = None,
    greedy: Annotated[
        bool, typer.Option("--greedy", help="Always take the most likely token (as without any sampling option).")
    ] = False,
    temperature: Annotated[
        float | None, typer.Option(help="0 is greedy. Default: 1 if --top-k, --top-p or --min-p is given, else 0.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(max=MAX_WHOLE, help="Sample from the k most likely tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample from the fewest tokens of this probability.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Drop tokens below this share of the likeliest.")] = None,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: seen tokens become less likely.")] = 1.0,
    seed: Annotated[
        int | None,
        typer.Option(min=-(2**63), max=2**63 - 1, help="Makes sampling repeatable; without effect on greedy."),
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="Text that ends the output; may be given several times.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after the end of sequence.")] = False,
    dtype: ComputeDtype = None,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Generate from one prompt: greedy, unless a sampling option is given. Without --json the text is streamed."""
    config = _engine_config(model, dtype, settings)
    text = _prompt_text(prompt, prompt_file)
    params = _sampling_params(
        greedy,
        {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p},
        max_tokens=DEFAULT_MAX_TOKENS if max_tokens is None else max_tokens,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=tuple(stop or ()),
        ignore_eos=ignore_eos,
    )
    with console.standard_output() as out:
        engine = _load(config)
        token_ids = _token_ids(engine.tokenizer, text, chat)
        if max_tokens is None:
            room = max(1, engine.envelope.max_model_len - len(token_ids))
            params = dataclasses.replace(params, max_tokens=min(params.max_tokens, room))
        output = _generate(engine, token_ids, params, None if as_json else out)
        if as_json:
            console.write_json(out, _generation_document(engine, output))
        else:
            out.write("\n")
            console.note(_describe_generation(output))


def _prompt_text(prompt: str | None, prompt_file: Path | None) -> str:
    if prompt is not None and prompt_file is not None:
        remedy = "Give only one of --prompt and --prompt-file."
        raise RequestError("both a prompt and a file with one are given.", field="prompt", remedy=remedy)
    if prompt_file is None:
        if prompt is None:
            raise RequestError("is missing.", field="prompt", remedy="Give --prompt or --prompt-file.")
        return _utf8(os.fsencode(prompt), "prompt", "The prompt")
    try:
        content = sys.stdin.buffer.read() if str(prompt_file) == "-" else prompt_file.read_bytes()
    except OSError as error:
        raise RequestError(
            f"{prompt_file} cannot be read ({error.strerror or error}).",
            field="prompt_file",
            remedy="Give the path of a readable text file, or - for standard input.",
        ) from None
    return _utf8(content, "prompt_file", str(prompt_file))


def _utf8(content: bytes, field: str, what: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        message = f"{what} is not UTF-8 text (byte {error.start}: {error.reason})."
        raise RequestError(message, field=field, remedy="Convert it to UTF-8.") from None


def _sampling_params(greedy: bool, chosen: dict[str, Any], **others: Any) -> SamplingParams:
    """Greedy if asked for or if no option of sampling is given; else at temperature 1 if none is given."""
    from engine.sampling.params import SamplingParams

    given = {name: value for name, value in chosen.items() if value is not None}
    if greedy and given and given != {"temperature": 0.0}:
        name = next(iter(given))
        message = f"--greedy and --{name.replace('_', '-')} contradict each other."
        raise RequestError(message, field=name, remedy="Leave one of them out.")
    if given:
        given.setdefault("temperature", 1.0)
    return SamplingParams(**given, **others)


def _token_ids(tokenizer: Any, text: str, chat: bool) -> list[int]:
    """As ``tokenizer(text)`` does it, or in the model's chat template as one message of the user."""
    if not chat:
        return list(tokenizer(text)["input_ids"])
    if not tokenizer.chat_template:
        raise RequestError("this model has no chat template.", field="chat", remedy="Leave --chat out.")
    messages = [{"role": "user", "content": text}]
    filled = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(filled, add_special_tokens=False)["input_ids"])  # the template has them all


def _generate(engine: Engine, token_ids: list[int], params: SamplingParams, stream: TextIO | None) -> RequestOutput:
    """Run one request to its end, writing its text to ``stream`` as it comes."""
    engine.add_request("command-line", token_ids, params)
    while True:
        for output in engine.step():
            if stream is not None:
                stream.write(output.new_text)
                stream.flush()
            if output.finished:
                return output


def _generation_document(engine: Engine, output: RequestOutput) -> dict[str, Any]:
    from engine.status import path_of

    return {
        "text": output.text,
        "token_ids": output.token_ids,
        "prompt_token_ids": output.prompt_token_ids,
        "finish_reason": output.finish_reason,
        "config": engine.config.to_dict(),
        "path": path_of(engine),
        "metrics": _generation_metrics(output.times),
    }


def _generation_metrics(times: RequestTimes) -> dict[str, float | None]:
    """As :mod:`engine.measure.metrics` defines them, of one request: TTFT, TPOT, and output tokens over the time from
    arrival to the last one. None where there are too few tokens."""
    known = times.token_times
    if not known:
        return {"ttft_ms": None, "tpot_ms": None, "output_tokens_s": None}
    first, last, count = known[0], known[-1], len(known)
    return {
        "ttft_ms": (first - times.arrival) * 1e3,
        "tpot_ms": (last - first) / (count - 1) * 1e3 if count > 1 else None,
        "output_tokens_s": count / (last - times.arrival),
    }


def _describe_generation(output: RequestOutput) -> str:
    units = {"ttft_ms": "ms to the first token", "tpot_ms": "ms a token after it", "output_tokens_s": "tokens/s"}
    metrics = _generation_metrics(output.times)
    shown = [f"{console.number(value)} {units[name]}" for name, value in metrics.items() if value is not None]
    count = len(output.token_ids)
    return ", ".join([f"{count} token{'s' if count != 1 else ''} ({output.finish_reason})", *shown])


# -- plan ----------------------------------------------------------------------------------------------------


app.command(name="plan")(plan)


# -- bench ---------------------------------------------------------------------------------------------------


_RECORD_HELP = (
    "SQLAlchemy URL of the database to put the run on record in. Other users of this machine can read a command line: "
    "for a URL with a password, give --json, pipe into `python -m storage record`, and set HEADROOM_DB there."
)


@app.command()
def bench(
    workload: Annotated[str, typer.Option("--workload", "-w", help="Name of a workload, or path of a JSON file.")],
    model: ModelName = None,
    seed: Annotated[
        int, typer.Option(min=0, max=2**63 - 1, help="Of the workload: the same seed gives the same requests.")
    ] = 0,
    settings: Settings = None,
    dtype: ComputeDtype = None,
    label: Annotated[str, typer.Option(help="Free text on the record of the run.")] = "",
    record: Annotated[str | None, typer.Option(metavar="URL", help=_RECORD_HELP)] = None,
    as_json: AsJson = False,
) -> None:
    """Run a workload and measure it. Interrupting it ends the run; what was measured until then is kept."""
    config = _engine_config(model, dtype, settings)
    with console.standard_output() as out:
        result = _measure(config, workload, seed, label)
        document = dataclasses.asdict(result)
        if as_json:
            console.write_json(out, document)
        else:
            _show_run(out, result)
        recorded = record is None or _record(document, record)
    if result.status == "cancelled":
        raise typer.Exit(INTERRUPTED)
    if result.status != "completed" or not recorded:
        raise typer.Exit(FAILED)


def _measure(config: EngineConfig, workload: str, seed: int, label: str) -> RunResult:
    """Load the model, run the workload on it, with a bar on standard error."""
    from engine.measure import get_workload

    definition = get_workload(workload)  # a mistake in it shows before the model is loaded
    engine = _load(config)
    from engine.measure import run_workload
    from engine.worker.loop import EngineLoop

    loop = EngineLoop(engine)
    loop.start()
    try:
        with _interrupts() as cancel, console.progress_bar() as report:
            return run_workload(
                loop,
                definition,
                seed=seed,
                label=label,
                cancel=cancel,
                progress=lambda state: report(state.detail, state.done / state.total),
            )
    finally:
        loop.stop()


@contextlib.contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C (or SIGTERM) sets; the second one stops at once."""
    interrupted = threading.Event()

    def interrupt(signum: int, frame: object) -> None:
        if interrupted.is_set():
            raise KeyboardInterrupt
        interrupted.set()

    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupted
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _show_run(out: TextIO, result: RunResult) -> None:
    from engine.measure.metrics import METRICS

    record = result.provenance
    title = f"{record.workload['name']} on {record.model}: {result.status}"
    values = [(info, result.metrics.get(name)) for name, info in METRICS.items()]
    rows = [(info.label, console.number(value), info.unit) for info, value in values if value is not None]
    console.write_table(out, title, rows)
    path = ", ".join(f"{name}: {what}" for name, what in record.path.items())
    lines = ["", f"run {result.run_id}, seed {record.seed}, config {record.config_hash}", f"ran on {path}"]
    print("\n".join(lines + ([f"error: {result.error}"] if result.error else [])), file=out)


def _record(document: dict[str, Any], url: str) -> bool:
    """Put the run on record through the storage room's own command; False, with the run in a file, if it fails."""
    from engine.measure.unsaved import keep_document, kept_words

    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}
    environment["HEADROOM_DB"] = url  # not as an argument: everybody on the machine can read those
    command = [sys.executable, "-m", "storage", "record"]
    text = json.dumps(document)
    done = subprocess.run(command, input=text, capture_output=True, text=True, env=environment, check=False)
    if done.returncode == 0:
        console.note(f"run {document['run_id']} is on record.")
        return True
    console.note("error: the run could not be put on record:")
    told = (done.stderr or done.stdout).strip()
    for line in told.splitlines()[-5:]:
        console.note(f"  {line}")
    if f"headroom-run-{document['run_id']}.json" not in told:  # it ended before it could keep the run itself
        path = keep_document(document)
        console.note("It could not be kept in a file either." if path is None else kept_words(path))
    return False


# -- all commands --------------------------------------------------------------------------------------------


def _engine_config(model: str | None, dtype: str | None, settings: list[str] | None) -> EngineConfig:
    """The knobs of ``--set``, to which ``--model`` and ``--dtype`` are short ways."""
    values: dict[str, Any] = dict(parse_assignments(settings or []))
    for name, value in (("model", model), ("dtype", dtype)):
        if value is not None and values.setdefault(name, value) != value:
            message = f"--{name} says {value!r}, --set says {values[name]!r}."
            raise ConfigError(message, field=name, remedy="Give it once.")
    return EngineConfig.from_mapping(values)


def _load(config: EngineConfig) -> Engine:
    with console.progress_bar() as report:
        report("starting", 0.0)
        from engine.core import Engine

        return Engine.load(config, report)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; its exit code. Errors become one line, or with ``--json`` one document."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    as_json = "--json" in given
    try:
        code = app(args=given, prog_name=PROGRAM, standalone_mode=False)
        return code if isinstance(code, int) else 0
    except HeadroomError as exc:
        return _fail(exc.to_dict(), str(exc), as_json, WRONG_INPUT)
    except TyperException as exc:
        return _fail_usage(exc, as_json)
    except (KeyboardInterrupt, typer.Abort):
        error = {"message": "interrupted.", "field": None, "remedy": None}
        return _fail(error, "interrupted.", as_json, INTERRUPTED)
    except BrokenPipeError:  # whoever read the output has seen enough
        return FAILED
    except Exception as exc:
        traceback.print_exc()
        message = f"{type(exc).__name__}: {exc}"
        remedy = "This is a bug in the engine: please report it with the traceback above."
        return _fail({"message": message, "field": None, "remedy": remedy}, f"{message}. {remedy}", as_json, FAILED)


def _fail(error: dict[str, Any], line: str, as_json: bool, code: int) -> int:
    if as_json:
        console.write_json(sys.stdout, {"error": error})
    else:
        console.note(f"error: {line}")
    return code


def _fail_usage(problem: TyperException, as_json: bool) -> int:
    """A command line that cannot be parsed: the option at fault is the field."""
    context = getattr(problem, "ctx", None)
    command = context.command_path if context else PROGRAM
    parameter = getattr(problem, "param", None)
    field = parameter.name if parameter is not None else getattr(problem, "option_name", None)
    message = problem.format_message()
    remedy = f"See {command} --help."
    error = {"message": message, "field": field, "remedy": remedy}
    if not message:  # no command was given: its help has been shown
        return WRONG_INPUT
    return _fail(error, f"{message} {remedy}", as_json, WRONG_INPUT)
