"""``headroom generate``: one prompt, one answer, without a server."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from engine.cli import console
from engine.cli.options import AsJson, ComputeDtype, ModelName, Settings, engine_config, load_engine
from engine.errors import RequestError

if TYPE_CHECKING:
    from engine.core import Engine
    from engine.outputs import RequestOutput, RequestTimes
    from engine.sampling.params import SamplingParams

DEFAULT_MAX_TOKENS = 128
MAX_WHOLE = 2**31 - 1


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
    config = engine_config(model, dtype, settings)
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
        engine = load_engine(config)
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
