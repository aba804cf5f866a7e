"""What the worker accepts from outside: every limit once (default, bounds, unit, help), and who may come in."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import ipaddress
import math
import os
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any

import psutil
import typer

from engine.errors import ConfigError

_ENVIRONMENT = "HEADROOM_"


def _limit(default: float, low: float, high: float, text: str) -> Any:
    return dataclasses.field(default=default, metadata={"low": low, "high": high, "help": text})


@dataclasses.dataclass(frozen=True)
class ServerLimits:
    """How much the worker takes from anybody. Each is a flag of ``serve`` and an environment variable ``HEADROOM_…``.

    Raises:
        ConfigError: naming the limit that is out of bounds.
    """

    max_body_bytes: int = _limit(4 << 20, 1024, 1 << 30, "Largest body of a request, bytes.")
    max_header_bytes: int = _limit(32 << 10, 1024, 1 << 20, "Largest head of a request (line and headers), bytes.")
    max_connections: int = _limit(512, 4, 65_536, "Most open connections; beyond it the slowest one has to go.")
    header_seconds: float = _limit(10.0, 0.1, 3600, "Seconds within which the head of a request must have come.")
    body_seconds: float = _limit(30.0, 0.1, 3600, "Seconds within which the body of a request must have come.")
    idle_seconds: float = _limit(30.0, 0.1, 3600, "Seconds that a connection may be kept open between two requests.")
    write_seconds: float = _limit(60.0, 0.1, 3600, "Seconds for which a client may leave its answer unread.")
    max_prompt_characters: int = _limit(
        1_000_000, 1, 1 << 30, "Most characters of all prompts or messages of a request, counted before tokenizing."
    )
    max_messages: int = _limit(2048, 1, 1 << 20, "Most messages of a chat request.")
    max_stop_strings: int = _limit(64, 1, 4096, "Most stop strings of a request, and most stop token ids.")
    max_stop_characters: int = _limit(262_144, 1, 1 << 24, "Most characters of all stop strings of a request.")
    max_choices: int = _limit(256, 1, 65_536, "Most answers of one request: prompts times n.")
    text_workers: int = _limit(2, 1, 64, "Processes that tokenize and fill chat templates.")
    max_waiting_texts: int = _limit(64, 1, 65_536, "Most requests that may wait to be tokenized.")
    text_seconds: float = _limit(10.0, 0.1, 3600, "Seconds for one request's chat template and tokenizing.")
    text_memory_mib: int = _limit(4096, 512, 1 << 20, "Address space of each of these processes, MiB.")
    drain_seconds: float = _limit(5.0, 0.0, 3600, "Seconds that answers in progress get to end after SIGTERM.")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check_limit(field, getattr(self, field.name))


def limits_from_environment(**defaults: float) -> ServerLimits:
    """The limits that the environment states (``HEADROOM_MAX_BODY_BYTES`` and so on), else ``defaults``, else their
    own.

    Raises:
        ConfigError: naming the limit that is no number or out of bounds.
    """
    values: dict[str, Any] = dict(defaults)
    for field in dataclasses.fields(ServerLimits):
        text = os.environ.get(f"{_ENVIRONMENT}{field.name.upper()}")
        if text:
            try:
                values[field.name] = _kind(field)(text)
            except ValueError:
                check_limit(field, math.nan)
    return ServerLimits(**values)


def check_limit(field: dataclasses.Field[Any], value: float) -> None:
    """Refuse a value out of bounds (NaN is out of all).

    Raises:
        ConfigError: naming the limit.
    """
    low, high = field.metadata["low"], field.metadata["high"]
    whole = isinstance(field.default, float) or (isinstance(value, int) and not isinstance(value, bool))
    if not (whole and isinstance(value, int | float) and math.isfinite(value) and low <= value <= high):
        kind = "number" if isinstance(field.default, float) else "whole number"
        remedy = f"Give a {kind} from {low:,} to {high:,}."
        raise ConfigError(f"{value!r} is out of range.", field=field.name, remedy=remedy)


def _kind(field: dataclasses.Field[Any]) -> type[int] | type[float]:
    return float if isinstance(field.default, float) else int


def with_limit_options(command: Callable[..., None]) -> Callable[..., None]:
    """The command with an option for each limit in place of its ``**limits``."""
    own = inspect.signature(command, eval_str=True)
    parameters = [p for p in own.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    annotations = {parameter.name: parameter.annotation for parameter in parameters}
    for field in dataclasses.fields(ServerLimits):
        option = typer.Option(
            help=field.metadata["help"], envvar=f"{_ENVIRONMENT}{field.name.upper()}", rich_help_panel="Limits"
        )
        annotation: Any = Annotated[_kind(field), option]
        annotations[field.name] = annotation
        parameters.append(
            inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=annotation)
        )

    @functools.wraps(command)
    def wrapped(**values: Any) -> None:
        command(**values)

    wrapped.__annotations__ = annotations
    wrapped.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    return wrapped


@dataclasses.dataclass(frozen=True)
class DoorSettings:
    """Who may come in, and under which name.

    Attributes:
        allowed_hosts: names in the ``Host`` header that are answered, without port; "*" answers all. Any other name is
            refused: a web page must not reach the worker by letting its own name point to this machine.
        api_key: asked for by ``/v1`` as a bearer token; None asks for none.
        cors_origins: origins whose pages may read the answers of ``/v1``; "*" is all.
        served_names: what the model is called in the API; empty for its own name.
    """

    allowed_hosts: frozenset[str] = frozenset({"localhost", "127.0.0.1", "::1"})
    api_key: str | None = dataclasses.field(default=None, repr=False)
    cors_origins: tuple[str, ...] = ()
    served_names: tuple[str, ...] = ()

    def admits(self, host_header: str) -> bool:
        """True if a request for that ``Host`` is answered."""
        return "*" in self.allowed_hosts or host_name(host_header) in self.allowed_hosts


def host_name(header: str) -> str:
    """The name in a ``Host`` header: lower case, without port, brackets and the root's dot; "" if it is none.

    >>> host_name("[::1]:8000"), host_name("Localhost.:80"), host_name("[::1].evil.example")
    ('::1', 'localhost', '')
    """
    text = header.strip().lower()
    if text.startswith("["):
        name, _, rest = text[1:].partition("]")
        return name if not rest or (rest.startswith(":") and rest[1:].isdigit()) else ""
    name, colon, port = text.rpartition(":")
    return (name if colon and port.isdigit() else text).rstrip(".")


def allowed_hosts(bound: str, stated: Sequence[str], warn: Callable[[str], None]) -> frozenset[str]:
    """The names to answer for a listener on ``bound``; ``warn`` is told where the operator should say more.

    Raises:
        ConfigError: for an empty name.
    """
    for name in stated:
        if not host_name(name):
            remedy = "Give a host name or an address, or * for all."
            raise ConfigError(f"{name!r} is not a host name.", field="allowed_host", remedy=remedy)
    hosts = {"localhost", "127.0.0.1", "::1", host_name(bound), *map(host_name, stated)}
    if not stated and not is_loopback(bound):
        own = _own_names() if bound in ("", "0.0.0.0", "::") else set()
        hosts |= own
        warn(
            f"listening on {bound}: only requests for {', '.join(sorted(hosts))} are answered; "
            "name other hosts with --allowed-host."
        )
    return frozenset(hosts)


def is_loopback(address: str) -> bool:
    """True if only this machine can reach a listener on that address."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def _own_names() -> set[str]:
    addresses: Iterable[Any] = (item for items in psutil.net_if_addrs().values() for item in items)
    kinds = (socket.AF_INET, socket.AF_INET6)
    found = {item.address.partition("%")[0].lower() for item in addresses if item.family in kinds}
    return found | {socket.gethostname().lower()}


def api_key_from(given: str | None, environment: Mapping[str, str] | None = None) -> str | None:
    """The API key: as given, else that of ``HEADROOM_API_KEY``.

    Raises:
        ConfigError: if it is blank or cannot stand in a header: an empty key must not open the door.
    """
    key = given if given is not None else (os.environ if environment is None else environment).get("HEADROOM_API_KEY")
    if key is None:
        return None
    if not key.strip() or not key.isascii() or not key.isprintable():
        remedy = "Give a key of printable ASCII characters, or none at all."
        raise ConfigError("is blank or has characters that no header can carry.", field="api_key", remedy=remedy)
    return key
