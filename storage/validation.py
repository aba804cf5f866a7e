"""What a run on record must be: types and numbers for everything that is shown, sizes for what comes from outside.

One description, used twice. A document that is imported must satisfy all of it, so that nothing enters the record
that could not be shown; a row that is in a database already must satisfy the part without which it cannot be shown
(``strict=False``): a long label is shown, a start in the year 10^300 is not.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal, Union, get_args, get_origin

from engine.measure.results import RunResult
from storage.rules import ANYTHING, MOMENT, RULES, WHOLE, Rule
from storage.types import Unreadable

_DEEPEST = 16


class UnfitError(Exception):
    """A value that cannot be taken or shown; ``path`` leads to it."""

    def __init__(self, message: str, path: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.path = [path] if path else []

    @property
    def where(self) -> str:
        """The path as people write it: ``requests[2].itl_ms[0]``."""
        return "".join(part if part.startswith("[") else f".{part}" for part in reversed(self.path)).lstrip(".")

    def __str__(self) -> str:
        return f"{self.where} {self.message}"


Check = Callable[[Any], None]


def check(document: Any, record_type: type, *, strict: bool) -> None:
    """Raise :class:`UnfitError` unless ``document`` is what :func:`engine.measure.results.to_json` gives of the type.

    Args:
        document: parsed JSON, or the columns of a row.
        record_type: :class:`RunResult` or one of the records in it.
        strict: with the limits of an import, see the head of this module.
    """
    _checker(record_type, ANYTHING, strict)(document)


def is_moment(value: Any) -> bool:
    """True for seconds since 1970 that dates in tables and charts can hold."""
    return isinstance(value, (int, float)) and MOMENT.low <= value <= MOMENT.high


def shown(value: Any) -> str:
    """A value in an error: as JSON, at most 60 characters."""
    if isinstance(value, Unreadable):
        value = value.text
    text = json.dumps(value, default=repr)
    return text if len(text) <= 60 else text[:57] + "..."


@functools.cache
def _checker(expected: Any, rule: Rule, strict: bool) -> Check:
    """A function that raises unless its argument is of the annotated type."""
    origin, arguments = get_origin(expected), get_args(expected)
    if expected is Any:
        return functools.partial(_check_json, strict=strict)
    if isinstance(expected, type) and dataclasses.is_dataclass(expected):
        return _record_checker(expected, strict)
    if origin in (Union, types.UnionType):
        inner = _checker(next(kind for kind in arguments if kind is not type(None)), rule, strict)
        return lambda value: None if value is None else inner(value)
    if origin is Literal:
        return _text_checker(dataclasses.replace(rule, choices=arguments), strict=True)
    if origin is list:
        return _list_checker(_checker(arguments[0], rule, strict), rule if strict else None)
    if origin is dict:
        return _mapping_checker(_checker(arguments[1], ANYTHING, strict), rule.longest, strict)
    if expected is str:
        return _text_checker(rule, strict)
    if expected is bool:
        return _check_switch
    assert expected in (int, float), expected
    return functools.partial(_check_number, rule=rule, whole=expected is int, bounded=strict or rule.always)


def _record_checker(record_type: Any, strict: bool) -> Check:
    rules = RULES.get(record_type, {})
    hints = typing.get_type_hints(record_type)
    checks = {name: _checker(hint, rules.get(name, ANYTHING), strict) for name, hint in hints.items()}
    if record_type is RunResult:
        checks["disturbed"] = _list_checker(_disturbance_checker(strict), rules["disturbed"] if strict else None)
    required = [
        field.name
        for field in dataclasses.fields(record_type)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]

    def check_record(value: Any) -> None:
        if not isinstance(value, Mapping):
            raise UnfitError(f"is {shown(value)}, which is not an object")
        for name in value:
            if name not in checks:
                raise UnfitError("is not known to this version of Headroom", str(name)[:60])
        for name in required:
            if name not in value:
                raise UnfitError("is missing", name)
        _each(value, lambda name: checks[name])

    return check_record


def _disturbance_checker(strict: bool) -> Check:
    """Of an entry of ``disturbed``: a moment and what happened."""
    moment = functools.partial(_check_number, rule=MOMENT, whole=False, bounded=True)
    checks: dict[str, Check] = {"time_unix_s": moment, "what": _text_checker(ANYTHING, strict)}

    def check_disturbance(value: Any) -> None:
        if not isinstance(value, Mapping) or not set(checks) <= set(value) or (strict and len(value) > len(checks)):
            raise UnfitError(f"is {shown(value)}, which is not an object of time_unix_s and what")
        _each({name: value[name] for name in checks}, lambda name: checks[name])

    return check_disturbance


def _each(values: Mapping[str, Any], check_of: Callable[[str], Check]) -> None:
    for name, value in values.items():
        try:
            check_of(name)(value)
        except UnfitError as error:
            error.path.append(name[:60])
            raise


def _list_checker(check_item: Check, rule: Rule | None) -> Check:
    def check_list(value: Any) -> None:
        if not isinstance(value, list):
            raise UnfitError(f"is {shown(value)}, which is not a list")
        if rule is not None and len(value) > rule.longest:
            raise UnfitError(f"has {len(value):,} items, and at most {rule.longest:,} are accepted")
        for number, item in enumerate(value):
            try:
                check_item(item)
            except UnfitError as error:
                error.path.append(f"[{number}]")
                raise

    return check_list


def _mapping_checker(check_item: Check, most: int, strict: bool) -> Check:
    check_name = _text_checker(Rule(longest=128), strict)

    def check_mapping(value: Any) -> None:
        if not isinstance(value, Mapping):
            raise UnfitError(f"is {shown(value)}, which is not an object")
        if strict and len(value) > most:
            raise UnfitError(f"has {len(value):,} entries, and at most {most:,} are accepted")
        for name in value:
            check_name(name)
        _each(value, lambda _name: check_item)

    return check_mapping


def _text_checker(rule: Rule, strict: bool) -> Check:
    pattern = re.compile(rule.pattern) if rule.pattern and strict else None

    def check_text(value: Any) -> None:
        if not isinstance(value, str):
            raise UnfitError(f"is {shown(value)}, which is not a text")
        if not value.isascii() and _has_surrogates(value):
            raise UnfitError("holds half of a character (a lone surrogate), which is no Unicode text")
        if not strict:
            return
        if "\0" in value:
            raise UnfitError("holds the character NUL, which PostgreSQL cannot keep")
        if len(value) > rule.longest:
            raise UnfitError(f"has {len(value):,} characters, and at most {rule.longest:,} are accepted")
        if rule.choices and value not in rule.choices:
            raise UnfitError(f"is {shown(value)}, which is not one of {', '.join(rule.choices)}")
        if pattern and not pattern.fullmatch(value):
            raise UnfitError(f"is {shown(value)}: it may hold {rule.says}")

    return check_text


def _has_surrogates(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _check_switch(value: Any) -> None:
    if not isinstance(value, bool):
        raise UnfitError(f"is {shown(value)}, which is not true or false")


def _check_number(value: Any, *, rule: Rule, whole: bool, bounded: bool) -> None:
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        raise UnfitError(f"is {shown(value)}, which is not a {'whole ' if whole else ''}number")
    if not -WHOLE - 1 <= value <= WHOLE if isinstance(value, int) else not math.isfinite(value):
        raise UnfitError(f"is {shown(value)}, which is not a finite number of 64 bits")
    if bounded and not rule.low <= value <= rule.high:
        wanted = rule.says or f"a number from {rule.low:g} to {rule.high:g}"
        raise UnfitError(f"is {shown(value)}, which is not {wanted}")


def _check_json(value: Any, *, strict: bool, depth: int = 0) -> None:
    """Of a value that may be any JSON: the texts and numbers in it, and how deep it goes."""
    if value is None or isinstance(value, bool):
        return
    if isinstance(value, str):
        _TEXT[strict](value)
    elif isinstance(value, (int, float)):
        _check_number(value, rule=ANYTHING, whole=False, bounded=False)
    elif depth == _DEEPEST:
        raise UnfitError(f"is nested more than {_DEEPEST} deep")
    elif isinstance(value, list):
        inner = functools.partial(_check_json, strict=strict, depth=depth + 1)
        _list_checker(inner, ANYTHING if strict else None)(value)
    elif isinstance(value, dict):
        inner = functools.partial(_check_json, strict=strict, depth=depth + 1)
        _mapping_checker(inner, ANYTHING.longest, strict)(value)
    else:
        raise UnfitError("is not JSON")


_TEXT = {strict: _text_checker(ANYTHING, strict) for strict in (False, True)}
