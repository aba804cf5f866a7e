"""Database URLs without what is secret in them, for everything that is printed, logged, shown or raised."""

from __future__ import annotations

import re

from sqlalchemy.engine import URL

_SECRET = re.compile(r"pass|pwd|secret|token", re.IGNORECASE)  # password, sslpassword, passfile …
_MASK = "***"


def masked(url: URL) -> str:
    """The URL with ``***`` for its password, and for what its parameters hold of that kind.

    >>> from sqlalchemy.engine import make_url
    >>> masked(make_url("postgresql://u:p@h/d?sslpassword=q&sslmode=require"))
    'postgresql://u:***@h/d?sslmode=require&sslpassword=***'
    """
    query = {name: _MASK if _SECRET.search(name) else value for name, value in url.query.items()}
    return url.set(query=query).render_as_string(hide_password=True).replace("%2A%2A%2A", _MASK)


def without_secrets(text: str, url: URL) -> str:
    """A driver's message about this database, with ``***`` wherever it quotes a secret of the URL."""
    for secret in sorted(_secrets(url), key=len, reverse=True):
        text = text.replace(secret, _MASK)
    return text


def _secrets(url: URL) -> list[str]:
    values = [str(url.password)] if url.password else []
    for name, value in url.query.items():
        if _SECRET.search(name):
            values += [value] if isinstance(value, str) else list(value)
    return [value for value in values if value]
