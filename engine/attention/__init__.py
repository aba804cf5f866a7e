"""Attention: one interface over the paged cache, one file a backend, one operator for compiled programs."""
