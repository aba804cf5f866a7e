"""A ``config.json`` that remembers what was read of it, so that what was not can be named."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from engine.capacity.model.harmless import HARMLESS, HARMLESS_ENDINGS

_LONGEST_NAME = 60
_MOST_NAMES = 8


class Stated(Mapping[str, Any]):
    """The fields of a JSON object over the defaults of its family. Looking a field up marks it as read.

    >>> config = Stated({"hidden_size": 8, "odd_size": 3, "odd_flag": False, "use_cache": True})
    >>> config["hidden_size"], config.unread()
    (8, ['odd_size'])
    """

    def __init__(self, fields: Mapping[str, Any], defaults: Mapping[str, Any] | None = None, path: str = "") -> None:
        """
        Args:
            fields: as the file states them; names that are no text are left out.
            defaults: of the family, for fields that are absent.
            path: of this object within the file, e.g. ``"text_config."``.
        """
        self._fields = {name: value for name, value in fields.items() if isinstance(name, str)}
        self._defaults = dict(defaults or {})
        self._path = path
        self._read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self._read.add(name)
        return self._fields[name] if name in self._fields else self._defaults[name]

    def __iter__(self) -> Iterator[str]:
        return iter({**self._defaults, **self._fields})

    def __len__(self) -> int:
        return len({**self._defaults, **self._fields})

    def over(self, defaults: Mapping[str, Any]) -> Stated:
        """The same fields over these defaults; what is read of either is read."""
        other = Stated(self._fields, defaults, self._path)
        other._read = self._read
        return other

    def peek(self, name: str) -> Any:
        """The value without marking it as read; None where it is absent."""
        return self._fields.get(name, self._defaults.get(name))

    def mark(self, *names: str) -> None:
        """Mark fields as read that do not apply here: the family has them, and what they say changes nothing."""
        self._read.update(names)

    def unread(self) -> list[str]:
        """Paths of fields that were not read, may matter, and are not at a value that means "none of it"."""
        return [
            f"{self._path}{name}"
            for name, value in self._fields.items()
            if name not in self._read and not _harmless(name) and not _neutral(value)
        ]


def _harmless(name: str) -> bool:
    return name in HARMLESS or name.startswith("_") or name.endswith(HARMLESS_ENDINGS)


def _neutral(value: object) -> bool:
    """True of null, false, zero and what is empty."""
    return value is None or (not value and isinstance(value, bool | int | float | str | list | tuple | Mapping))


def _plain(name: str) -> str:
    """A field's name as text that means nothing to Markdown or a terminal."""
    text = "".join(letter if letter.isalnum() or letter in "_.- '" else "?" for letter in name[:_LONGEST_NAME])
    return text if len(name) <= _LONGEST_NAME else f"{text}…"


def unread_warning(names: list[str], of: str) -> list[str]:
    """The warning that names the fields, none without any.

    >>> unread_warning(["moe_latent_size"], "nemotron_h")[0].startswith("Not read: moe_latent_size.")
    True
    """
    if not names:
        return []
    listed = ", ".join(_plain(name) for name in names[:_MOST_NAMES])
    more = f" and {len(names) - _MOST_NAMES:,} more" if len(names) > _MOST_NAMES else ""
    those = "this field" if len(names) == 1 else "these fields"
    return [
        f"Not read: {listed}{more}. The planner does not know what {those} of the configuration mean"
        f"{'s' if len(names) == 1 else ''} in {of}: if sizes depend on it, this plan is off."
    ]
