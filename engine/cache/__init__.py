"""Paged KV cache: block pool, prefix index, block tables, storage."""
