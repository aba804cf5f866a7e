"""Triton kernels, one concept a file, each next to its torch reference; :mod:`kernels.dispatch` says which runs."""
