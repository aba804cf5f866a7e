"""Errors that reach a user: each names the field at fault and the remedy.

The HTTP server turns them into 4xx answers, the command line into exit code 2, the pages into an error box.
Anything else that escapes is a bug in the engine and is reported as one.
"""


class HeadroomError(Exception):
    """Base of every error that is the caller's to mend.

    Args:
        message: what is wrong, in one sentence, with the offending value.
        field: the name of the input at fault (a knob, a request field, a path), if there is one.
        remedy: what to do about it, in one sentence.
    """

    def __init__(self, message: str, *, field: str | None = None, remedy: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.remedy = remedy

    def __str__(self) -> str:
        prefix = f"{self.field}: " if self.field else ""
        suffix = f" {self.remedy}" if self.remedy else ""
        return f"{prefix}{self.message}{suffix}"

    def to_dict(self) -> dict[str, str | None]:
        """The error as a JSON object: ``{"message", "field", "remedy"}``."""
        return {"message": self.message, "field": self.field, "remedy": self.remedy}


class ConfigError(HeadroomError):
    """A knob is unknown, out of bounds, or cannot be combined with another."""


class ModelLoadError(HeadroomError):
    """A model cannot be found, read, or is of a family the engine does not run."""


class RequestError(HeadroomError):
    """A generation request cannot be accepted."""


class QueueFullError(HeadroomError):
    """As many requests are in flight as the engine takes; the same request may be accepted a little later."""


class CapacityError(HeadroomError):
    """What was asked for does not fit into the memory it was given."""


class WorkloadError(HeadroomError):
    """A workload definition cannot be run."""


class EngineDeadError(HeadroomError):
    """The engine's stepping thread has stopped; nothing can be submitted any more."""


SHOWN_CHARACTERS = 80


def shown(value: object) -> str:
    """A value from outside as an error message quotes it: its ``repr``, cut where it is long.

    >>> shown("a" * 1000)[-7:], shown(10**5000)
    ("aaa …'", 'a number of more than 4,000 digits')
    """
    try:
        text = repr(value)
    except ValueError:  # Python writes no number of so many digits
        return "a number of more than 4,000 digits"
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]} …{text[-1]}"
