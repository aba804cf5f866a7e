"""The command line, one file a command: ``headroom`` and ``python -m engine``."""
