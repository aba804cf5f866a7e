"""Headroom's inference engine: paged KV cache, continuous batching, quantization, speculation.

Nothing in this package imports Streamlit or ``storage``; the worker process and the command line
(``python -m engine``) are its two faces. See docs/architecture.md for the rooms.
"""

__version__ = "0.1.0"
