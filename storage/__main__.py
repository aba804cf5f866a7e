"""``python -m storage``."""

import os

from storage.cli import app

if __name__ == "__main__":
    app(prog_name=os.environ.get("HEADROOM_PROGRAM", "python -m storage"))
