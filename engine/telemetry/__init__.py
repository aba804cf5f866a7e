"""Telemetry: readings of the process, the machine and its GPUs, and the thread that takes them."""
