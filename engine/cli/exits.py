"""Exit codes of every command."""

from __future__ import annotations

FAILED = 1
"""Something failed that is not the caller's to mend, or a run that failed or was not recorded."""

WRONG_INPUT = 2
INTERRUPTED = 130
