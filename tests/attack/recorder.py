"""Records runs without end and says which are on record, until it is killed: the victim of :mod:`.kill_attack`.

python -m tests.attack.recorder URL SEED      # prints "begun ID", "saved ID", "deleted ID", each when it is so
"""

from __future__ import annotations

import dataclasses
import random
import sys

from storage import open_store
from tests.storage.run_examples import make_run


def main() -> None:
    """Begin, save, sometimes delete."""
    url, seed = sys.argv[1], int(sys.argv[2])
    draw, store = random.Random(seed), open_store(url)
    print("open", flush=True)
    number = 0
    while True:
        number += 1
        result = dataclasses.replace(make_run(draw.randrange(10**6)), run_id=f"{seed}-{number}")
        store.begin_run(dataclasses.replace(result, status="running", requests=[], samples=[], metrics={}))
        print("begun", result.run_id, flush=True)
        store.save_run(result)
        print("saved", result.run_id, flush=True)
        if draw.random() < 0.2:
            print("deleting", result.run_id, flush=True)
            store.delete_runs([result.run_id])
            print("deleted", result.run_id, flush=True)


if __name__ == "__main__":
    main()
