"""Triton reads TRITON_INTERPRET when a kernel is defined, so one process either interprets or compiles, never both.

`interpreter/` is therefore collected only in a process started with TRITON_INTERPRET=1; the suite starts one itself,
in test_triton_kernels_in_the_interpreter.py.
"""

import os

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreter"]
