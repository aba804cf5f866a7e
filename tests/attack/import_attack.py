"""Imports: mutated documents of runs into a database, which must go on listing, exporting and deleting."""

from __future__ import annotations

import copy
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sqlalchemy

from engine.measure.results import to_json
from storage import RunFilter, StorageError, Store, open_store
from storage.cli import _line
from storage.tables import StoredRun
from tests.attack.outcome import Tally
from tests.attack.target import ROOT
from tests.storage.run_examples import failed_run, make_run

DEMANDED = 300
DEEP = 2000
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 0.5, -0.5, 1e308, -1e308, 1e16, -1e16, float("inf"), float("nan"), 253402300800.0),
    *(
        2**31,
        2**63 - 1,
        2**63,
        -(2**63) - 1,
        10**30,
        10**400,
        "",
        "x",
        "1",
        "x" * 5000,
        "a\0b",
        "\ud800",
        "\udc00\ud800",
    ),
    *("=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", 'a\r\nb,c"d', "<script>alert(1)</script>", "../../etc/passwd"),
    *("'; DROP TABLE runs; --", "%s%n%d", "{x}", "\u202e", "💩" * 100, {}, [], [[]], [None], {"a": {"b": {"c": []}}}),
    *({"": 1}, {"\ud800": 1}, {"x" * 3000: 1}, ["x"] * 300, [1e308] * 50, [0.0] * 20_000),
)


def attack(seed: int, folder: Path, end: float, count: int = DEMANDED) -> Tally:
    """Import ``count`` mutated documents; after each the record must still answer."""
    tally = Tally("imports", "documents", count)
    url = f"sqlite:///{folder}/record.db"
    store = open_store(url)
    try:
        store.import_json(json.dumps([to_json(make_run(number)) for number in (1, 2)]))
        kept = {row.run_id for row in store.list_runs()}
        for number, (kind, text) in enumerate(documents(seed, count)):
            if time.monotonic() > end:
                break
            _attempt(store, tally, kind, text, kept)
            if number % 75 == 0:
                _command_line(tally, url)
        _whole(store, tally, "at the end")
        _command_line(tally, url)
    finally:
        store.close()
    return tally


def documents(seed: int, count: int) -> Iterator[tuple[str, bytes]]:
    """(what is odd about it, text) of distinct documents."""
    draw = random.Random(f"imports/{seed}")
    named = [
        ("started_unix_s: 1e308", {"started_unix_s": 1e308}),
        ("started_unix_s: -1e308", {"started_unix_s": -1e308}),
    ]
    named += [(f"label: {text!r}", {"label": text}) for text in ("=1+1", "\ud800", "a\0b", "x" * 5000)]
    for kind, fields in named:
        yield kind, _text(_run(draw) | fields)
    for kind, text in _texts(draw):
        yield kind, text
    for number in range(count - len(named) - len(list(_texts(random.Random(0))))):
        document = _run(draw)
        kinds = [_mutate(draw, document) for _ in range(draw.choice((1, 1, 1, 2, 4)))]
        yield f"{number}: {'; '.join(kinds)}", _text(document)


def _run(draw: random.Random) -> dict[str, Any]:
    make = draw.choice((make_run, make_run, failed_run))
    return copy.deepcopy(to_json(make(draw.randrange(10**6))))


def _text(document: Any) -> bytes:
    return json.dumps(document).encode("utf-8", "surrogatepass")


def _texts(draw: random.Random) -> Iterator[tuple[str, bytes]]:
    """Texts that are no runs."""
    good = _text(_run(draw))
    for what, text in {
        "nothing": b"",
        "half": good[: len(good) // 2],
        "twice": good + good,
        "UTF-16": good.decode().encode("utf-16"),
        "a mark": b"\xef\xbb\xbf" + good,
        "bytes": bytes(draw.randrange(256) for _ in range(2000)),
        "brackets": b"[" * 100_000,
        "deep": b'{"runs":' * DEEP + b"1" + b"}" * DEEP,
        "a deep config": good.replace(b'"config": {', b'"config": {"deep": ' + b"[" * DEEP + b"]" * DEEP + b", ", 1),
        "the same run twice": b"[" + good + b"," + good + b"]",
        "10,000 empty objects": b"[" + b"{}," * 9999 + b"{}]",
        "a million digits": good.replace(b'"seed": ', b'"seed": ' + b"9" * 1_000_000, 1),
        "an encoded surrogate": good.replace(b'"label": "', b'"label": "\xed\xa0\x80', 1),
        "a number": b"1",
        "a list of lists": b"[[[]]]",
        "runs that are none": b'{"runs": 5}',
    }.items():
        yield f"text: {what}", text


def _mutate(draw: random.Random, document: dict[str, Any]) -> str:
    """Change one thing somewhere in it, and say what."""
    place: Any = document
    path: list[Any] = []
    while True:
        keys: list[Any] = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = draw.choice(keys)
        path.append(key)
        inner = place[key]
        if not isinstance(inner, dict | list) or not inner or draw.random() < 0.3:
            break
        place = inner
    where = ".".join(map(str, path))
    deed = draw.random()
    if deed < 0.1:
        del place[key]
        return f"without {where}"
    if deed < 0.2 and isinstance(place, dict):
        place[draw.choice(("extra", "", "\ud800", "run_id ", "__class__"))] = draw.choice(VALUES)
        return f"more in {where}"
    value = draw.choice(VALUES)
    place[key] = copy.deepcopy(value)
    return f"{where} = {value!r:.60}"


def _attempt(store: Store, tally: Tally, kind: str, text: bytes, kept: set[str]) -> None:
    try:
        store.import_json(text)
        verdict = "served"
    except StorageError:
        verdict = "refused"
    except Exception as problem:
        tally.add("failed", kind, f"import: {type(problem).__name__}: {problem}")
        return
    fault = _fault_afterwards(store, kept, exported=verdict == "served")
    if fault:
        tally.add("failed", kind, fault)
        _empty_by_force(store, kept)
    else:
        tally.add(verdict, kind)  # type: ignore[arg-type]


def _fault_afterwards(store: Store, kept: set[str], *, exported: bool) -> str:
    """What no longer works after an import, or ""; what was imported is deleted."""
    step = "list"
    try:
        rows = store.list_runs()
        new = [row.run_id for row in rows if row.run_id not in kept]
        if exported:
            step = "queries of History"
            store.list_runs(RunFilter(text="a"))
            for order in ("output_tokens_s", "started_unix_s"):
                store.list_runs(order_by=order)
            store.facets(), store.outline(), store.list_comparisons()
            step = "detail"
            store.get_runs([*new])
            step = "CSV"
            store.export_csv().encode(), store.export_requests_csv(new).encode()
            step = "JSON"
            store.export_json(new).encode()
            step = "line of `storage list`"
            _lines(rows)
        step = "delete"
        if store.delete_runs(new) != len(new):
            return "delete: not everything went"
    except Exception as problem:
        return f"{step}: {type(problem).__name__}: {problem}"
    return "" if kept <= {row.run_id for row in rows} else "a run that was there before is lost"


def _lines(rows: list[Any]) -> None:
    for row in rows:
        _line(row).encode()


def _empty_by_force(store: Store, kept: set[str]) -> None:
    """Past a run that breaks the record, so that the next document is judged for itself."""
    with store._writing() as connection:
        connection.execute(sqlalchemy.delete(StoredRun).where(StoredRun.run_id.not_in(kept)))


def _whole(store: Store, tally: Tally, when: str) -> None:
    with store._reading() as connection:
        found = connection.execute(sqlalchemy.text("PRAGMA integrity_check")).scalar()
    if found != "ok":
        tally.add("failed", f"integrity {when}", str(found))


def _command_line(tally: Tally, url: str) -> None:
    for arguments in (("list",), ("export", "--format", "csv")):
        command = [sys.executable, "-m", "storage", *arguments, "--db", url]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=120)
        tally.read_log(done.stderr.decode(errors="replace"))
        if done.returncode != 0:
            tally.add("failed", f"storage {arguments[0]}", done.stderr[-300:].decode(errors="replace"))
