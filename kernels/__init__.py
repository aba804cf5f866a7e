"""Triton kernels, one concept a file, each beside its torch reference; :mod:`kernels.dispatch` says which runs."""
