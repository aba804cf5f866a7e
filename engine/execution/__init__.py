"""How a forward pass runs: eager, through our kernels, through compiled layers, or as captured CUDA graphs.

In reading order: ``base`` (a step, what runs over it, a decision), ``environment`` and ``mode`` (the protocol),
``eager``, ``native``, ``fused``, ``compiled``, ``graphs``, ``auto`` (one file a mode), ``modes`` (their table),
``executor`` (asks the current mode at every step). ``direct`` and ``shaped`` hold what several modes have in common.
"""
