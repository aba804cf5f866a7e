"""``python -m engine``: see :mod:`engine.cli.app`."""

import sys

from engine.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
