"""``python -m engine``: the commands of ``headroom`` without an installation. See :mod:`engine.cli.app`."""

import sys

from engine.cli.app import main

if __name__ == "__main__":
    sys.exit(main(program="python -m engine"))
