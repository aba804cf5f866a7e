"""Ask a worker for ``/health`` twenty times a second, from a process of its own, so that no client delays the clock.

python -m tests.attack.health PORT FILE      # a line each: unix time, milliseconds, status (0: no answer)
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from tests.attack.wire import get

INTERVAL_S = 0.05
TIMEOUT_S = 10.0


def main() -> None:
    """Sample until ended from outside."""
    port, target = int(sys.argv[1]), Path(sys.argv[2])
    with target.open("a", encoding="ascii", buffering=1) as lines:
        while True:
            began = time.perf_counter()
            answer = get(port, "/health", timeout_s=TIMEOUT_S)
            took_ms = 1e3 * (time.perf_counter() - began)
            lines.write(f"{time.time():.3f} {took_ms:.1f} {answer.status}\n")
            time.sleep(INTERVAL_S)


if __name__ == "__main__":
    main()
