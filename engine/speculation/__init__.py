"""Speculative decoding: proposers and lossless verification."""
