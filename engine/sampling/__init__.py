"""Sampling: parameters and their bounds, and one file a sampler."""
