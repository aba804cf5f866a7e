"""``python -m storage``."""

from storage.cli import app

if __name__ == "__main__":
    app(prog_name="python -m storage")
