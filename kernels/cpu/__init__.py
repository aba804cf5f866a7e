"""Kernels for the CPU, in C++: one source file, built by the machine's own compiler at first use."""
