"""Values as error messages and pages write them."""

from __future__ import annotations

GIB = 2**30
_LONGEST = 60


def shown(value: object) -> str:
    """A value as an error message quotes it: never longer than a line, whatever it is.

    >>> shown("abc"), shown(10**5000)
    ("'abc'", 'a number of more than 38 digits')
    """
    # Python refuses to print integers of more than 4,300 digits.
    if isinstance(value, int) and value.bit_length() > 128:
        return "a number of more than 38 digits"
    try:
        text = repr(value)
    except ValueError:  # such an integer inside a list
        return f"a {type(value).__name__}"
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def gib(size: int) -> str:
    """Bytes as text: ``"1.50 GiB"``, or MiB where that would round to little.

    >>> gib(3 * 2**29), gib(5 * 2**20), gib(0)
    ('1.50 GiB', '5.00 MiB', '0 GiB')
    """
    if size == 0:
        return "0 GiB"
    return f"{size / GIB:,.2f} GiB" if abs(size) >= 0.1 * GIB else f"{size / 2**20:,.2f} MiB"
